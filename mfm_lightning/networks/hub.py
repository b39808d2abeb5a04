"""A network on Hugging Face's hub, by huggingface_hub's mixin; this module needs that package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn

from mfm_lightning.networks.card import card
from mfm_lightning.networks.files import load_network, read_metadata, said_in, save_network
from mfm_rewards.hub import from_hub

FILE = "model.safetensors"
_CARD = """---
{{ card_data }}
---

# A model of mfm-lightning

Meta Flow Maps: [arXiv 2601.14430]({{ paper_url }}).

```python
from mfm_lightning import load_model

model = load_model("{{ repository }}", allow_download=True)  # of this repository
```

{{ section }}"""


class HubNetwork(
    ModelHubMixin,
    library_name="mfm-lightning",
    tags=["meta-flow-maps", "flow-matching"],
    paper_url="https://arxiv.org/abs/2601.14430",
    model_card_template=_CARD,
):
    """A network with what its file says, as the hub keeps it: `model.safetensors`, `config.json` and a model card.

    Args:
        network: a network of `mfm_lightning.networks`, or of the user's own with a `config`.
        metadata: what the file says besides class and config.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, str] | None = None) -> None:
        self.network, self.metadata = network, dict(metadata or {})
        self._section = ""

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_network(self.network, save_directory / FILE, self.metadata)
        header = read_metadata(path)
        config = {"network": header["network"], "config": json.loads(header["config"]), **self.metadata}
        (save_directory / "config.json").write_text(json.dumps(config, indent=1))
        self._section = card(path)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return super().generate_model_card(*args, section=self._section, **{"repository": "ORG/NAME", **kwargs})

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubNetwork:  # of the mixin's, a folder needs none
        path = Path(model_id) / FILE
        return cls(load_network(path), said_in(path))


def find_folder(
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: a local one, or a repository's, at once (the mixin asks for each file, and asks again for
    half a minute where there is no network); options as of huggingface_hub.

    Raises:
        FileNotFoundError: if it is nowhere, or has no model.
    """
    if Path(name).is_dir():
        return Path(name)

    def snapshot() -> Path:
        folder = Path(
            snapshot_download(
                name, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, allow_patterns=[FILE, "config.json"],
            )
        )  # fmt: skip
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{name} has no {FILE}")
        return folder

    return from_hub([snapshot], name, name, [FILE], "model", revision)
