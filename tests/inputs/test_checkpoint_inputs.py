"""What `--ckpt_path` is given, and what a checkpoint cannot be written to."""

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from mfm_lightning.callbacks.checkpoint import AtomicCheckpointIO
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.stream import LostWorkerError
from mfm_lightning.training.run_checkpoints import check_checkpoint, check_plan
from tests.inputs.tiny_runs import fit, job, last
from tests.latent_data import shards
from tests.processes import ended, forked


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def write(kind: str, path: Path, whole: bytes) -> None:
    content = {
        "empty": b"", "cut": whole[: len(whole) * 2 // 3], "nearly whole": whole[:-30], "text": b"not a checkpoint",
        "html": b"<!DOCTYPE html><html>", "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }  # fmt: skip
    if kind in content:
        path.write_bytes(content[kind])
    elif kind == "safetensors":
        save_file({"x": torch.ones(3)}, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        foreign = {
            "tensor": torch.ones(3), "weights": {"a.weight": torch.ones(3)}, "nothing": {},
            "other trainer": {"model": {"w": torch.ones(2)}, "optimizer": {}, "epoch": 3},
            "no training state": {"state_dict": {"w": torch.ones(2)}},
            "code": {"state_dict": {}, "x": Payload(path.with_suffix(".ran"))},
        }  # fmt: skip
        torch.save(foreign[kind], path)


KINDS = {
    "empty": r"is empty \(0 bytes\)",
    "cut": "is cut off at",
    "nearly whole": "is cut off at",
    "text": "is no file of torch.save",
    "html": "is no file of torch.save",
    "lfs": "is no file of torch.save",
    "safetensors": "is a model, not a run's checkpoint",
    "fifo": "is no regular file",
    "folder": "is a folder without .metadata and meta.pt",
    "tensor": "holds a Tensor",
    "weights": r"has no state_dict \(it holds 'a.weight'\)",
    "nothing": r"has no state_dict \(it holds nothing\)",
    "other trainer": "has no state_dict",
    "no training state": "holds weights alone: it has no optimizer_states, loops, global_step",
    "code": "damaged, or holds code",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("whole")
        patched.chdir(folder)
        fit("run", 2, "--trainer.logger=false")
    return folder / "run/last.ckpt"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_of_a_run(tmp_path, whole, kind):
    path = tmp_path / "given.ckpt"
    write(kind, path, whole.read_bytes())
    with pytest.raises(CheckpointError, match=rf"given\.ckpt .*{KINDS[kind]}"):
        check_checkpoint(path, resumed=True)
    assert not path.with_suffix(".ran").exists()


@pytest.mark.parametrize("kind", ["empty", "cut", "safetensors", "other trainer"])
@pytest.mark.parametrize("command", ["fit", "test", "last"])
def test_by_the_commands(tmp_path, monkeypatch, whole, kind, command):
    """Before anything is written; `--ckpt_path last` is looked at, too."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("run/last.ckpt" if command == "last" else "given.ckpt")
    path.parent.mkdir(exist_ok=True)
    write(kind, path, whole.read_bytes())
    given = "last" if command == "last" else str(path)
    with pytest.raises(CheckpointError, match=path.name):
        job("test" if command == "test" else "fit", "run", f"--ckpt_path={given}", "--trainer.max_steps=4")
    assert not list(Path().rglob("metrics.csv"))


def test_weights_alone_can_be_measured(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    content = torch.load(whole, weights_only=True)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        content.pop(key, None)
    torch.save(content, "weights.ckpt")
    job("test", "run", "--ckpt_path=weights.ckpt", "--trainer.logger=false")
    with pytest.raises(CheckpointError, match="holds weights alone"):
        fit("run", 4, "--ckpt_path=weights.ckpt")


@pytest.mark.parametrize("setting", ["hidden_size=32", "depth=2", "num_classes=10"])
def test_of_another_network(tmp_path, monkeypatch, whole, setting):
    monkeypatch.chdir(tmp_path)
    options = [f"--ckpt_path={whole}", f"--model.init_args.network.init_args.{setting}", "--trainer.logger=false"]
    if setting == "num_classes=10":  # the same
        fit("run", 3, *options)
        assert last("run")["global_step"] == 3
        return
    with pytest.raises(CheckpointError, match=r"last\.ckpt is of another network than the config's: \d+ of its \d+"):
        fit("run", 3, *options)


@pytest.mark.parametrize("attack", ["system", "global", "state"])
def test_a_plan_that_would_run_code(tmp_path, attack):
    mark = tmp_path / "ran"
    content = {
        "system": Payload(mark),
        "global": {"state": torch.load},
        "state": Metadata(state_dict_metadata={"x": Payload(mark)}, planner_data=None),  # within the right class
    }[attack]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata names .*no part of a checkpoint's plan"):
        check_plan(tmp_path)
    assert not mark.exists()


@pytest.mark.slow
def test_a_checkpoint_in_shards_is_read_and_its_shards_run_nothing(tmp_path, monkeypatch):
    """A true one passes; a payload in place of a number within a shard is not run either."""
    monkeypatch.chdir(tmp_path)
    sharded = ["--trainer.strategy=mfm_lightning.training.fsdp.FSDP", "--trainer.strategy.save_sharded=true"]
    sharded += ["--trainer.logger=false"]

    def work(*arguments) -> None:
        fit(*arguments)

    assert ended(forked(work, "run", 2, *sharded)) == 0
    check_checkpoint("run/last.ckpt", resumed=True)
    shutil.copytree("run", "evil")
    assert ended(forked(work, "run", 3, *sharded, "--ckpt_path=last")) == 0
    mark = tmp_path / "ran"

    def attacked() -> None:
        import io

        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        load = DefaultLoadPlanner.load_bytes

        def other(self, item, value):
            torch.save(Payload(mark), changed := io.BytesIO())
            changed.seek(0)
            return load(self, item, changed)

        DefaultLoadPlanner.load_bytes = other
        fit("evil", 3, *sharded, "--ckpt_path=last")

    assert ended(forked(attacked)) != 0
    assert not mark.exists()


@pytest.mark.parametrize("size", [1_000, 100_000, 3_000_000])
def test_a_full_disk_is_said(tmp_path, size):
    """A quota on the file's size; torch's own words are "unexpected pos 64 vs 0"."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(3)}, path)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(2_000_000)}, path)
        except OSError as error:
            message = str(error)
            os._exit(0 if "one before it is intact: File too large" in message and str(path) in message else 3)

    assert ended(forked(work)) == 0
    assert torch.load(path, weights_only=True)["x"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_lost_worker_is_named(tmp_path):
    folder = shards(tmp_path / "shards", [8, 8])
    data = LatentShards(str(folder), 4, num_workers=1, val_shards=0)
    data.setup()

    def killed(step, out=None):
        os.kill(os.getpid(), signal.SIGKILL)

    loader = data.loader()
    loader.stream._fill = killed
    with pytest.raises(LostWorkerError, match=r"shards: a data worker has died .*lower data\.num_workers"):
        list(loader)
