"""What stands for a file of weights: its path, the name of one that comes with the package, or a Hugging Face id."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mfm_lightning.utils.names import nearest
from mfm_rewards.hub import SUFFIXES, find_file

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).parents[1] / "weights"
_FILE = "model.safetensors"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def shipped() -> dict[str, Path]:
    """The files that come with the package by name, such as "mnist/flow"."""
    return {str(path.relative_to(SHIPPED).with_suffix("")): path for path in sorted(SHIPPED.glob("*/*.safetensors"))}


def find_weights(
    name: str | Path,
    what: str = "model",
    hint: str = "",
    allow_download: bool = False,
    revision: str | None = None,
) -> Path:
    """The file of a model, classifier or value network. Of several that a text could stand for, the first is taken:

    1. a file, or a folder with a `model.safetensors`, on this machine; where it hides a name, this is said;
    2. a name of the package's: "mnist" for its Meta Flow Map or classifier, "mnist/flow", "mnist/features";
    3. a Hugging Face repository, "org/name" or "hf:org/name/file", in its cache on this machine.

    Args:
        name: a path, a Hugging Face id, or the name of weights in the package.
        what: "model", "teacher", "classifier" or "value network", for the name and for errors.
        hint: what to do where it is nowhere.
        allow_download: fetch a repository's file where it is not in the cache.
        revision: of the repository.

    Raises:
        FileNotFoundError: if it is nowhere; with the nearest name, or the hint.
        ImportError: for a repository, without huggingface_hub.
        ValueError: for a repository of several checkpoints.
    """
    text, known = str(name), shipped()
    usual = {"classifier": "classifier", "value network": "value"}.get(what, "mfm")
    of_package = known.get(text) or known.get(f"{text}/{usual}")
    for path in (Path(text), Path(text) / _FILE):
        if path.is_file():
            if of_package is not None:
                log.warning("%s is taken for the file %s here, not for the %s of the package", text, path, what)
            return path
    if of_package is not None:
        return of_package
    if text.startswith("hf:"):
        return find_file(text, allow_download, revision)
    names = [*known, *(key.removesuffix(f"/{usual}") for key in known if key.endswith(f"/{usual}"))]
    folder, folders = text.split("/")[0], {key.split("/")[0] for key in known}
    # of runs/mfm, mnist/mfm is no misspelling
    meant = nearest(text, names) if Path(text).suffix not in SUFFIXES and nearest(folder, folders) else None
    hint = f"did you mean {meant}?" if meant else hint
    nowhere = f"no {what} at {text}" + (f": {hint}" if hint else "")
    if folder in folders or not _is_hub_id(text):
        raise FileNotFoundError(nowhere)
    try:
        return find_file(text, allow_download, revision)
    except (FileNotFoundError, ImportError) as error:
        if not hint:
            raise
        # a path of two parts looks like a repository
        kind = ImportError if isinstance(error, ImportError) else FileNotFoundError
        raise kind(f"{nowhere}; if a Hugging Face repository is meant: {error}") from error


def is_there(name: str | Path) -> bool:
    """Whether a path, name or id stands for a model that is on this machine."""
    try:
        return find_weights(name).is_file()
    except (FileNotFoundError, ImportError, ValueError):
        return False


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and Path(text).suffix not in SUFFIXES and not Path(text.split("/")[0]).exists()
