"""Two processes on the CPU (gloo), started as a user would: `mfm fit` with two devices, and resumed."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT

ROOT = Path(__file__).parents[1]


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "mfm_lightning.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def mfm(folder: Path, *arguments: str) -> str:
    done = start(folder, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


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


def write_config(folder: Path, module: str = "StepPretraining") -> None:
    """A distilled objective on the samples of `distributed_parts`, with a teacher of random weights."""
    torch.manual_seed(0)
    teacher = MetaFlowMap(DiT(**NETWORK))
    for p in teacher.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    save_model(teacher, folder / "teacher.safetensors")
    terms = [{"name": "distilled_diagonal"}, {"name": "eulerian_teacher"}]
    config = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": "out", "max_steps": 5, "max_epochs": -1, "accelerator": "cpu", "devices": 1,
            "gradient_clip_val": 1.5, "log_every_n_steps": 1, "limit_val_batches": 0, "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "out"}}],
            "callbacks": [
                {"class_path": f"mfm_lightning.callbacks.{name}"} for name in ("EMA", "ExportModel", "LastCheckpoint")
            ],
        },
        "model": {
            "class_path": f"tests.distributed_parts.{module}",
            "init_args": {
                "network": {"class_path": "mfm_lightning.networks.DiT", "init_args": NETWORK},
                "objective": {"terms": terms, "pairs": {"guidance_scale": 2.5}},
                "teacher": {
                    "class_path": "mfm_lightning.teachers.CheckpointTeacher",
                    "init_args": {"path": str(folder / "teacher.safetensors")},
                },
                "initial": str(folder / "teacher.safetensors"),
                "optimization": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_steps": 3},
            },
        },
        "data": {"class_path": "tests.distributed_parts.StepData"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def fit(folder: Path, name: str, *arguments: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The exported (averaged) weights of a run, and its losses."""
    out = [f"--trainer.default_root_dir={name}", f"--trainer.logger.init_args.save_dir={name}"]
    mfm(folder, "fit", "--config", "config.yaml", *out, *arguments)
    metrics = sorted((folder / name).rglob("metrics.csv"))[-1]
    with open(metrics) as file:
        losses = [float(row["global_loss"]) for row in csv.DictReader(file) if row.get("global_loss")]
    return load_file(folder / name / "model.safetensors"), losses


def test_ddp_fsdp_and_one_process_are_the_same_training(tmp_path):
    """Five steps of the same global batches: one process; DDP that accumulates; FSDP with checkpointed blocks after
    three steps of one process, and before two. Relative error 1e-4 in weights, or 1 % of their way (AdamW turns the
    rounding of small gradients into steps), and 1e-5 in losses."""
    write_config(tmp_path)
    two = ["--trainer.devices=2"]
    single, fsdp = [], [*two, FSDP, "--model.init_args.execution.checkpoint_activations=true"]
    found = {
        "single": fit(tmp_path, "single"),
        "ddp": fit(tmp_path, "ddp", *two, "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=2"),
    }
    for name, first, second in (("to_fsdp", single, fsdp), ("from_fsdp", fsdp, single)):
        fit(tmp_path, name, *first, "--trainer.max_steps=3")
        found[name] = fit(tmp_path, name, *second, f"--ckpt_path={name}/last.ckpt")
    weights, losses = found.pop("single")
    began = load_file(tmp_path / "teacher.safetensors")
    assert len(losses) == 5
    moved = {name: (weights[name] - began[name]).norm() for name in weights}
    assert sum(m > 0 for m in moved.values()) > 50
    for name, (ours, our_losses) in found.items():
        if name != "ddp":  # which logs each half
            torch.testing.assert_close(our_losses, losses[-len(our_losses) :], rtol=1e-5, atol=1e-6, msg=name)
        assert ours.keys() == weights.keys()
        for key, expected in weights.items():
            assert (ours[key] - expected).norm() <= 1e-4 * expected.norm() + 1e-2 * moved[key], f"{name}: {key}"


@pytest.mark.parametrize("strategy", ["--trainer.strategy=ddp", FSDP])
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
    mfm(tmp_path, *fit, "--trainer.max_steps=4")
    last = tmp_path / "outputs/gmm/finetune/last.ckpt"
    half = torch.load(last, weights_only=True)
    assert half["state_dict"]["normaliser.updates"].tolist() == [4]  # once a step, with the draws of both
    # noise and policy samples are each rank's own, and all are in the checkpoint
    first, second = (state["cpu"] for state in half["rng_state"])
    assert not torch.equal(first, second)
    buffers = half["OffPolicyDataModule"]["buffers"]
    assert len(buffers) == 2
    assert not torch.equal(buffers[0][0], buffers[1][0])
    mfm(tmp_path, *fit, "--trainer.max_steps=8", "--ckpt_path=outputs/gmm/finetune/last.ckpt")
    resumed = torch.load(last, weights_only=True)
    assert resumed["state_dict"]["normaliser.updates"].tolist() == [8]
    assert load_model(tmp_path / "outputs/gmm/finetune/model.safetensors").state_shape == (2,)
