"""`mfm export` of a run's checkpoint: the file that training itself leaves, from shards, by one process."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import call
from mfm_lightning.commands.weights import export_weights
from mfm_lightning.training.consolidation import consolidate
from tests.inputs.tiny_runs import fit
from tests.processes import ended, forked, torchrun

SHARDED = ["--trainer.strategy=mfm_lightning.training.fsdp.FSDP", "--trainer.strategy.save_sharded=true"]


def export(*arguments: str) -> None:
    """As the command line calls it."""
    call(export_weights, "export", arguments)


def header(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three steps on two ranks of FSDP2 with a checkpoint in shards, and the same of one process with one file."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        import yaml

        from tests.inputs.tiny_runs import CONFIG

        Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
        options = ["--config=tiny.yaml", "--trainer.max_steps=3", "--trainer.default_root_dir=shards"]
        torchrun(folder, 2, "fit", *options, "--trainer.devices=2", "--trainer.logger=false", *SHARDED)
        assert ended(forked(fit, "file", 3, "--trainer.logger=false")) == 0
    return folder


@pytest.fixture
def workplace(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")


@pytest.mark.parametrize("run", ["shards", "file"])
def test_it_is_the_file_that_training_leaves(workplace, run):
    export(f"{run}/last.ckpt", "--output=averaged.safetensors")
    assert not dist.is_initialized()
    wanted = load_file(f"{run}/model.safetensors")  # of ExportModel, with the averaged weights
    found = load_file("averaged.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    ours = {k: v for k, v in header(f"{run}/model.safetensors").items() if k != "checkpoint"}
    assert header("averaged.safetensors") == {**ours, "averaged": "true"}
    assert load_model("averaged.safetensors").state_shape == (1, 8, 8)
    # those of the last step, against torch's own conversion
    export(f"{run}/last.ckpt", "--output=weights.safetensors", "--no_average")
    if run == "shards":
        dcp_to_torch_save("shards/last.ckpt", "whole.pt")
    path = "whole.pt" if run == "shards" else "file/last.ckpt"
    state = torch.load(path, weights_only=run == "file")["state_dict"]
    last = load_file("weights.safetensors")
    assert {f"model.network.{name}" for name in last} == set(state)
    for name, tensor in last.items():
        assert torch.equal(tensor, state[f"model.network.{name}"]), name
    assert any(not torch.equal(last[name], wanted[name]) for name in last)
    assert header("weights.safetensors")["averaged"] == "false"


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_what_would_run_code_is_refused_and_not_run(workplace, tmp_path):
    mark = tmp_path / "ran"
    plan = Path("shards/last.ckpt/.metadata")
    whole = plan.read_bytes()
    evil = pickle.loads(whole)
    evil.planner_data = Payload(mark)  # within a true plan
    plan.write_bytes(pickle.dumps(evil))
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt/\.metadata names pathlib\.Path\.touch, which is no part of a"
    ):
        export("shards/last.ckpt", "--output=out.safetensors")
    plan.write_bytes(whole)
    torch.save({"callbacks": Payload(mark)}, "shards/last.ckpt/meta.pt")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors and numbers"):
        export("shards/last.ckpt", "--output=out.safetensors")
    assert not mark.exists()
    assert not Path("out.safetensors").exists()


def test_a_payload_in_place_of_a_tensor_in_a_shard_is_not_run(workplace, tmp_path):
    mark = tmp_path / "ran"
    torch.save(Payload(mark), content := io.BytesIO())
    evil = content.getvalue()
    for shard in Path("shards/last.ckpt").glob("*.distcp"):
        whole = shard.read_bytes()
        shard.write_bytes(evil + bytes(max(0, len(whole) - len(evil))))
    with pytest.raises(CheckpointError, match=r"shards/last\.ckpt cannot be put together"):
        consolidate("shards/last.ckpt", "out.safetensors", average=False)
    assert not mark.exists()


def test_what_cannot_be_exported_is_said(workplace):
    first = next(Path("shards/last.ckpt").glob("*.distcp"))
    first.rename("kept")
    with pytest.raises(CheckpointError, match=r"cannot be put together .*: a file of it is missing or damaged"):
        export("shards/last.ckpt", "--output=out.safetensors")
    Path("kept").rename(first)
    with pytest.raises(
        CommandLineError, match=r"--dtype: of a last\.ckpt the output is a \.safetensors in our own names"
    ):
        export("shards/last.ckpt", "--output=out.safetensors", "--dtype=bf16")
    with pytest.raises(CommandLineError, match=r"--no_average is for the last\.ckpt of a run"):
        export("shards/model.safetensors", "--output=out.safetensors", "--no_average")
    content = torch.load("file/last.ckpt", weights_only=True)
    content["callbacks"] = {}
    torch.save(content, "file/last.ckpt")
    export("file/last.ckpt", "--output=out.safetensors")
    assert header("out.safetensors")["averaged"] == "false"  # there is none
    next(iter(content["state_dict"].values())).flatten()[0] = float("nan")
    torch.save(content, "file/last.ckpt")
    with pytest.raises(CheckpointError, match=r"out\.safetensors is not written: weight .* is not finite"):
        export("file/last.ckpt", "--output=out.safetensors")
    del content["network"]
    torch.save(content, "file/last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"does not say what its network is: .* go on from it by mfm fit --ckpt_path"
    ):
        export("file/last.ckpt", "--output=out.safetensors")


def test_shards_of_two_ranks_go_on_with_one(workplace):
    """Weights and averages are those of the two ranks, and training goes on from them."""
    one = ["--trainer.logger=false", "--trainer.devices=1", *SHARDED, "--ckpt_path=last"]
    export("shards/last.ckpt", "--output=before.safetensors")
    shutil.copytree("shards", "again")
    assert ended(forked(fit, "again", 3, *one)) == 0  # nothing is left to train: the file is written again
    wanted, found = load_file("before.safetensors"), load_file("again/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert ended(forked(fit, "shards", 5, *one)) == 0
    assert torch.load("shards/last.ckpt/meta.pt", weights_only=True)["global_step"] == 5
    export("shards/last.ckpt", "--output=after.safetensors")
    assert any(not torch.equal(load_file("after.safetensors")[name], tensor) for name, tensor in wanted.items())
