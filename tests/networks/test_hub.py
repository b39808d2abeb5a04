"""Models on Hugging Face's hub, by its own mixin, without reaching it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from mfm_lightning.checkpoints import load_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, ImageClassifier
from mfm_lightning.networks.files import CheckpointError, read_metadata, save_network


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MetaFlowMap(MLP(dim=2, hidden_size=8, depth=1))


def test_a_folder_gives_back_the_model_and_what_was_said_of_it(tmp_path, model):
    said = {"kind": "base_flow", "data": "two moons", "licence": "MIT"}
    model.save_pretrained(tmp_path / "saved", said)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert (config["network"], config["config"]["hidden_size"], config["data"]) == ("MLP", 8, "two moons")
    loaded = MetaFlowMap.from_pretrained(tmp_path / "saved")
    assert loaded.metadata == said
    s, x = torch.rand(3), torch.randn(3, 2)
    assert torch.equal(loaded.velocity(s, 1.0, x, 0.2, x), model.velocity(s, 1.0, x, 0.2, x))
    card = (tmp_path / "saved/README.md").read_text()
    for line in ("library_name: mfm-lightning", "- Data: two moons", "- Licence: MIT", "A base flow: `MLP`"):
        assert line in card
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text() == card


FIGURES = {"step": "8", "accuracy": json.dumps({"accuracy": 0.5, "images": 10, "low": 0.2, "high": 0.8})}


@pytest.mark.parametrize("load", [load_model, MetaFlowMap.from_pretrained])
def test_what_a_file_says_of_its_weights_is_not_said_of_others(tmp_path, model, caplog, load):
    model.save_pretrained(tmp_path / "first", {"kind": "base_flow", "data": "moons", **FIGURES})
    loaded = load(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "same")
    assert read_metadata(tmp_path / "same/model.safetensors").items() >= FIGURES.items()
    assert not [message for message in caplog.messages if "left out" in message]
    loaded.network.output.weight.data[0, 0] += 1e-6
    loaded.save_pretrained(tmp_path / "changed")
    (said,) = [message for message in caplog.messages if "left out" in message]
    assert "(step, accuracy)" in said
    header = read_metadata(tmp_path / "changed/model.safetensors")
    assert (header["data"], header["kind"]) == ("moons", "base_flow")
    assert not header.keys() & FIGURES.keys()
    loaded.save_pretrained(tmp_path / "said", {"step": "9"})
    assert read_metadata(tmp_path / "said/model.safetensors")["step"] == "9"


@pytest.mark.parametrize("kind", ["classifier", None])
def test_a_file_of_another_kind_is_refused_in_a_line_that_says_what_loads_it(tmp_path, kind):
    said = {} if kind is None else {"kind": kind}
    save_network(ImageClassifier(1, 3, 4, 1), tmp_path / "model.safetensors", said)
    message = "holds a ImageClassifier: expected one of DiT, MLP, UNet; it is loaded by .*load_classifier$"
    for loader in (MetaFlowMap.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=message):
            loader(tmp_path)


class Linear(nn.Linear):
    """A network of a user's own that is none for a Meta Flow Map."""

    def __init__(self, width: int = 2) -> None:
        super().__init__(width, width)
        self.config = {"width": width}


def test_a_network_that_is_none_for_a_flow_map_is_refused_in_a_line(tmp_path):
    save_network(Linear(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no Meta Flow Map: a Linear has no state_shape"):
        MetaFlowMap.from_pretrained(tmp_path)


def test_what_is_pushed_is_what_is_saved(tmp_path, model, monkeypatch):
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            assert token == "mine"

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, **_):
            pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return f"https://hub/{repo_id}/{revision}/{commit_message}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    address = model.push_to_hub("org/name", {"data": "moons"}, token="mine", branch="b", commit_message="first")
    assert address == "https://hub/org/name/b/first"
    model.save_pretrained(tmp_path / "saved", {"data": "moons"})
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert sorted(pushed) == sorted(saved) == ["README.md", "config.json", "model.safetensors"]
    tensors = load(pushed.pop("model.safetensors")), load(saved.pop("model.safetensors"))
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert b'load_model("org/name"' in pushed["README.md"]
    saved["README.md"] = saved["README.md"].replace(b"ORG/NAME", b"org/name")
    assert pushed == saved


def test_a_repository_is_loaded_from_the_cache(tmp_path, model, monkeypatch):
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    model.save_pretrained(folder / "snapshots" / ("0" * 40), {"data": "moons"})
    loaded = MetaFlowMap.from_pretrained("org/name", cache_dir=tmp_path, local_files_only=True)
    assert loaded.metadata == {"data": "moons"}
    assert torch.equal(loaded.network.output.weight, model.network.output.weight)
    (folder / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"org/name has no model\.safetensors"):
        MetaFlowMap.from_pretrained("org/name", cache_dir=tmp_path, local_files_only=True)


def test_a_hub_that_is_not_reached_is_a_line():
    message = r"model\.safetensors of org/none is not in Hugging Face's cache"
    with pytest.raises(FileNotFoundError, match=message) as error:
        MetaFlowMap.from_pretrained("org/none", local_files_only=True)
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_a_line_says_what_to_install(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (model.save_pretrained, model.push_to_hub, MetaFlowMap.from_pretrained):
        with pytest.raises(ImportError, match="pip install huggingface-hub"):
            call(str(tmp_path / "folder"))
    assert not list(tmp_path.iterdir())
