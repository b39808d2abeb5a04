"""Two processes on the CPU (gloo): `mfm fit` with two devices, as Lightning or torchrun starts them, and resumed."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT, UNet
from tests.processes import torchrun, torchrun_statuses

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "mfm_lightning", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_tangents_on_two_processes(tmp_path):
    """Losses and gradients of the explicit tangents under DDP and FSDP2 (also with checkpointed blocks, and under
    autocast) are those of one process with the whole batch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.tangent_worker", str(folder), str(rank), str(world_size)],
                cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        messages = [worker.communicate(timeout=120)[1] for worker in workers]
        assert all(worker.returncode == 0 for worker in workers), messages
        found[world_size] = torch.load(folder / "found.pt", weights_only=True)
    assert len(found[2]) == 4
    for case, ours in found[2].items():
        precision = case.split()[0]
        reference = found[1][precision]
        assert ours.keys() == reference.keys()
        assert len(ours) > 50
        for name, expected in reference.items():
            if precision == "exact":
                torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=f"{case}: {name}")
            else:  # halves of the batch are rounded to bf16 before they are averaged
                assert (ours[name] - expected).norm() <= 3e-2 * expected.norm() + 1e-3, f"{case}: {name}"


NETWORK = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 4}
NETWORK |= {"encoder_depth": 2, "num_classes": 5, "guidance_scales": [2.5]}
FSDP = "--trainer.strategy=fsdp2"


UNET = {"input_size": 8, "in_channels": 1, "channels": 16, "channel_multipliers": [1, 2], "num_blocks": 1}
UNET |= {"attention_resolutions": [4], "num_heads": 2, "norm_groups": 4, "num_classes": 5, "guidance_scales": [2.5]}


def write_config(
    folder: Path, module: str = "StepPretraining", every_n_steps: int = 500, kind: type[Any] = DiT, **network: int
) -> None:
    """A distilled objective on the samples of `distributed_parts`, with a teacher of random weights."""
    torch.manual_seed(0)
    network = (NETWORK if kind is DiT else UNET) | network
    teacher = MetaFlowMap(kind(**network))
    for p in teacher.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_model(teacher, folder / "teacher.safetensors")
    terms = [{"name": "distilled_diagonal"}, {"name": "eulerian_teacher"}]
    config = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": "out", "max_steps": 6, "accelerator": "cpu", "gradient_clip_val": 1.5,
            "log_every_n_steps": 1, "val_check_interval": 3, "enable_progress_bar": False,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "out"}}],
            "callbacks": [{"class_path": "tests.distributed_parts.CheckedEMA"}],
        },
        "checkpoint": {"every_n_steps": every_n_steps},
        "model": {
            "class_path": f"tests.distributed_parts.{module}",
            "init_args": {
                "network": {"class_path": f"mfm_lightning.networks.{kind.__name__}", "init_args": network},
                "objective": {"terms": terms, "pairs": {"guidance_scale": 2.5}},
                "teacher": {
                    "class_path": "mfm_lightning.objectives.CheckpointTeacher",
                    "init_args": {"path": str(folder / "teacher.safetensors")},
                },
                "initial": str(folder / "teacher.safetensors"),
                "optimization": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_steps": 3},
            },
        },
        "data": {"class_path": "tests.distributed_parts.StepData"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def run_of(name: str) -> list[str]:
    return ["--config=config.yaml", f"--trainer.default_root_dir={name}", f"--trainer.logger.init_args.save_dir={name}"]


def logged(folder: Path, column: str) -> dict[int, float]:
    """A run's values by step, of all its parts where it was resumed."""
    found = {}
    for path in folder.rglob("metrics.csv"):
        with open(path) as file:
            found |= {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}
    return found


def assert_same_weights(folder: Path, run: str, other: str) -> None:
    """Relative error 1e-4, or 1 % of their way: AdamW turns the rounding of small gradients into steps."""
    paths = ("teacher.safetensors", f"{run}/model.safetensors", f"{other}/model.safetensors")
    began, ours, weights = (load_file(folder / path) for path in paths)
    moved = {name: (weights[name] - began[name]).norm() for name in weights}
    assert sum(m > 0 for m in moved.values()) > 50
    assert ours.keys() == weights.keys()
    for name, expected in weights.items():
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-2 * moved[name], f"{run}: {name}"


def test_ddp_fsdp_and_one_process_are_the_same_training(tmp_path):
    """Six steps of the same global batches, with validation after three and six: one process; DDP that accumulates,
    interrupted within the fourth on one rank and resumed; five of FSDP with checkpointed blocks after one of one
    process, and before one. Relative error 1e-5 in losses."""
    write_config(tmp_path)
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=2"]
    ddp += ["--trainer.val_check_interval=6"]
    fsdp = ["--trainer.devices=2", FSDP, "--model.init_args.execution.checkpoint_activations=true"]
    stop = "--model=tests.distributed_parts.InterruptedPretraining"
    torchrun(tmp_path, 1, "fit", *run_of("single"))
    stopped = start(tmp_path, "fit", *run_of("ddp"), *ddp, stop)
    assert stopped.returncode != 0
    assert "stopped by SIGINT after step 4" in stopped.stderr + stopped.stdout
    assert torch.load(tmp_path / "ddp/last.ckpt", weights_only=True)["global_step"] == 4
    torchrun(tmp_path, 2, "fit", *run_of("ddp"), *ddp, "--ckpt_path=last")
    torchrun(tmp_path, 1, "fit", *run_of("to_fsdp"), "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    torchrun(tmp_path, 2, "fit", *run_of("to_fsdp"), *fsdp, "--ckpt_path=last")
    torchrun(tmp_path, 2, "validate", *run_of("validate"), *fsdp, "--ckpt_path=to_fsdp/last.ckpt")
    torchrun(tmp_path, 2, "fit", *run_of("from_fsdp"), *fsdp, "--trainer.max_steps=5")
    torchrun(tmp_path, 1, "fit", *run_of("from_fsdp"), "--ckpt_path=last")

    losses, validation = logged(tmp_path / "single", "global_loss"), logged(tmp_path / "single", "val/loss")
    assert list(losses) == list(range(6))
    assert list(validation) == [2, 5]
    assert list(logged(tmp_path / "validate", "val/loss").values()) == [pytest.approx(validation[5], rel=1e-5)]
    for name in ("ddp", "to_fsdp", "from_fsdp"):
        missing = {3} if name == "ddp" else set()  # Lightning does not log the step that was the last of a stopped run
        ours = logged(tmp_path / name, "global_loss")
        assert ours == pytest.approx({step: losses[step] for step in losses.keys() - missing}, rel=1e-5), name
        ours = logged(tmp_path / name, "val/loss")
        assert {step: ours[step] for step in validation} == pytest.approx(validation, rel=1e-5), name
        assert_same_weights(tmp_path, name, "single")


@pytest.mark.slow
def test_a_unet_in_shards_is_the_same_training(tmp_path):
    """Three steps by two processes with checkpointed blocks are those of one; the file of weights is whole."""
    write_config(tmp_path, kind=UNet)
    options = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    sharded = ["--trainer.devices=2", FSDP, "--model.init_args.execution.checkpoint_activations=true"]
    torchrun(tmp_path, 1, "fit", *run_of("single"), *options)
    torchrun(tmp_path, 2, "fit", *run_of("sharded"), *options, *sharded)
    losses = logged(tmp_path / "single", "global_loss")
    assert list(losses) == [0, 1, 2]
    assert len(set(losses.values())) == 3
    assert logged(tmp_path / "sharded", "global_loss") == pytest.approx(losses, rel=1e-5)
    validation = logged(tmp_path / "single", "val/loss")
    assert logged(tmp_path / "sharded", "val/loss") == pytest.approx(validation, rel=1e-5)
    assert_same_weights(tmp_path, "sharded", "single")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_compiled_under_ddp_and_fsdp(tmp_path):
    """Two steps, compiled, are those of one eager process. The second strategy finds the first one's kernels."""
    import torch._inductor.compile_fx

    write_config(tmp_path, "CompiledPretraining", hidden_size=16, depth=2, encoder_depth=1, num_heads=2)
    options = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0"]  # as few graphs as can be
    options += ["--model.init_args.objective.terms=[{name: eulerian_teacher}]"]
    options += ["--model.init_args.objective.pairs.guidance_scale=1"]
    compiled = ["--trainer.devices=2", "--model.init_args.execution.compile=true"]
    torchrun(tmp_path, 1, "fit", *run_of("eager"), *options)
    losses = logged(tmp_path / "eager", "global_loss")
    assert list(losses) == [0, 1]
    with torch._inductor.config.patch(compile_threads=1):  # no pool of more processes
        for strategy in ("ddp", "fsdp2"):
            torchrun(tmp_path, 2, "fit", *run_of(strategy), *options, *compiled, f"--trainer.strategy={strategy}")
            assert logged(tmp_path / strategy, "global_loss") == pytest.approx(losses, rel=1e-5), strategy
            assert_same_weights(tmp_path, strategy, "eager")


@pytest.mark.long
def test_a_save_in_shards_that_fails_leaves_the_one_before(tmp_path, monkeypatch, capfd):
    """A disk that is full for one rank, and kill -9 between shards and `meta.pt`, at the second save; resumed from the
    first, training is that of one process."""
    write_config(tmp_path, every_n_steps=2)
    options = ["--trainer.max_steps=4", "--trainer.limit_val_batches=0"]
    sharded = [*options, "--trainer.devices=2", "--trainer.strategy=mfm_lightning.training.fsdp.FSDP"]
    sharded += ["--trainer.strategy.save_sharded=true"]
    save, write = torch.save, FileSystemWriter.write_data

    def killed(checkpoint, path, **settings):
        if Path(str(path)).name == "meta.pt" and checkpoint["global_step"] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(checkpoint, path, **settings)

    def full(self, *arguments):
        type(self).saves = getattr(self, "saves", 0) + 1
        if self.saves == 2 and torch.distributed.get_rank() == 1:
            raise OSError("No space left on device")
        return write(self, *arguments)

    for name, (owner, function) in {
        "killed": ((torch, "save"), killed), "full": ((FileSystemWriter, "write_data"), full),
    }.items():  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(*owner, function)
            statuses = torchrun_statuses(tmp_path, 2, "fit", *run_of(name), *sharded)
        assert all(statuses), name
        assert torch.load(tmp_path / name / "last.ckpt/meta.pt", weights_only=True)["global_step"] == 2
    message = "checkpoint full/last.ckpt could not be written, the one before it is intact"
    assert message in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "full").glob("last*")] == ["last.ckpt"]
    # a kill when the new one was about to take the place
    (tmp_path / "killed/last.ckpt").rename(tmp_path / "killed/last.ckpt.old")
    torchrun(tmp_path, 2, "fit", *run_of("killed"), *sharded, "--ckpt_path=last")
    assert [path.name for path in (tmp_path / "killed").glob("last*")] == ["last.ckpt"]
    torchrun(tmp_path, 1, "fit", *run_of("single"), *options)
    assert_same_weights(tmp_path, "killed", "single")


@pytest.mark.parametrize("strategy", ["--trainer.strategy=ddp", pytest.param(FSDP, marks=pytest.mark.long)])
def test_a_rank_that_dies_ends_the_job(tmp_path, strategy):
    write_config(tmp_path, "FailingPretraining")
    begin = time.monotonic()
    done = start(tmp_path, "fit", "--config", "config.yaml", "--trainer.devices=2", strategy)
    assert done.returncode != 0
    assert "this rank has died" in done.stderr + done.stdout
    assert time.monotonic() - begin < 90  # not the half hour that a collective waits


def test_fine_tuning_on_two_processes(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 16, 1))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    save_model(model, tmp_path / "outputs/gmm/mfm/model.safetensors")
    fit = ["fit", "--config", "configs/gmm/finetune.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += ["--trainer.limit_val_batches=0", "--trainer.val_check_interval=4", "--trainer.accelerator=cpu"]
    fit += ["--data.init_args.buffer_size=64", "--data.init_args.refresh_every=3", "--data.init_args.ode_steps=2"]
    torchrun(tmp_path, 2, *fit, "--trainer.max_steps=4")
    last = tmp_path / "outputs/gmm/finetune/last.ckpt"
    half = torch.load(last, weights_only=True)
    assert half["state_dict"]["normaliser.updates"].tolist() == [4, 4]  # once a step, with the draws of both
    # noise and policy samples are each rank's own, and all are in the checkpoint
    first, second = (state["cpu"] for state in half["rng_state"])
    assert not torch.equal(first, second)
    buffers = half["OffPolicyDataModule"]["buffers"]
    assert len(buffers) == 2
    assert not torch.equal(buffers[0][0], buffers[1][0])
    torchrun(tmp_path, 2, *fit, "--trainer.max_steps=8", "--ckpt_path=outputs/gmm/finetune/last.ckpt")
    resumed = torch.load(last, weights_only=True)
    assert resumed["state_dict"]["normaliser.updates"].tolist() == [8, 8]
    assert load_model(tmp_path / "outputs/gmm/finetune/model.safetensors").state_shape == (2,)


@pytest.mark.slow
def test_what_was_read_is_said_once(tmp_path):
    """By the first of the processes that Lightning starts, and not by each: 40 images of 8x8, held out by tenths."""
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", arr_0=images, labels=np.arange(40) % 2)
    data = [
        "--data=ImageDataModule",
        "--data.source=NpzImages",
        "--data.source.path=own.npz",
        "--data.source.labels=labels",
        "--data.batch_size=4",
    ]
    data += ["--data.val_fraction=0.1", "--data.test_source=null", "--model.network.num_classes=2"]
    network = ["--model.network.width=8", "--model.optimization.warmup_steps=1", "--trainer.logger=false"]
    steps = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.devices=2", "--trainer.strategy=ddp"]
    config = f"--config={ROOT / 'configs/mnist/classifier.yaml'}"
    done = start(tmp_path, "fit", config, *data, *network, *steps, "--trainer.default_root_dir=run")
    assert done.returncode == 0, done.stderr
    said = (done.stderr + done.stdout).splitlines()
    assert len([line for line in said if "images decoded into" in line and line.startswith("train")]) == 1, said
    assert len([line for line in said if "GLOBAL_RANK: 1" in line]) == 1  # there were two
