"""Two processes on the CPU (gloo), started as a user would: `mfm fit` with two devices, and resumed."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP

ROOT = Path(__file__).parents[1]


def mfm(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "mfm_lightning.cli", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
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
                assert (ours[name] - expected).norm() <= 1e-2 * expected.norm() + 1e-4, f"{case}: {name}"


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
