"""Runs that are asked to stop, or that fail, and go on."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file

from mfm_lightning.callbacks import LastCheckpoint
from mfm_lightning.commands.main import run
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.networks import DiT
from mfm_lightning.objectives import Objective, WeightedTerm
from tests.distributed_parts import StepData
from tests.latent_data import shards
from tests.processes import ended, forked

CONFIG = """
trainer:
  accelerator: cpu
  accumulate_grad_batches: 2
  limit_val_batches: 0
  enable_progress_bar: false
  logger: false
checkpoint: {every_n_steps: 2}
seed_everything: 0
model:
  class_path: mfm_lightning.modules.MFMPretraining
  init_args:
    network:
      class_path: mfm_lightning.networks.DiT
      init_args:
        {input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 16, depth: 2, num_heads: 2, encoder_depth: 1,
         num_classes: 5, guidance_scales: []}
    objective: {terms: [{name: data_diagonal}]}
    optimization: {optimizer: adamw, learning_rate: 1.0e-3}
data:
  class_path: mfm_lightning.data.LatentShards
  init_args: {folder: shards, batch_size: 4, num_workers: 2, val_shards: 0, shuffle_buffer: 8}
"""
STEP_DATA = ["--data=tests.distributed_parts.StepData"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mfm"])
    return tmp_path


def fit(folder: str, steps: int, *more: str) -> None:
    options = [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={steps}", *more]
    run(["fit", "--config", "config.yaml", *options])


def at_batch(monkeypatch, batch: int, act) -> None:
    """Do something in the middle of a batch's training step."""
    step = MFMPretraining.training_step

    def acting(self, data, batch_idx):
        loss = step(self, data, batch_idx)
        if batch_idx == batch:
            act()
        return loss

    monkeypatch.setattr(MFMPretraining, "training_step", acting)


@pytest.mark.slow
def test_stopped_between_micro_batches_and_resumed_exactly(place, monkeypatch):
    """Bit for bit what an uninterrupted run gives. The terminal's Ctrl-C, and SLURM's signal, reach data workers, too,
    and more batches are still to come from them than they have ready."""
    shards(place / "shards", [30, 40], num_classes=5, state_shape=(1, 8, 8), std=0.5)

    def job(*arguments) -> int:
        def foreground() -> None:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fit(*arguments, "--trainer.accumulate_grad_batches=12")

        return ended(forked(foreground))

    assert job("whole", 3, "--ckpt_path=last") == 0  # there is none yet
    expected, averages = torch.load("whole/last.ckpt", weights_only=True), load_file("whole/model.safetensors")
    for number in (signal.SIGINT, signal.SIGUSR1):
        name = number.name
        with monkeypatch.context() as patched:
            at_batch(patched, 13, lambda number=number: os.killpg(0, number))  # the second of step 1's
            assert job(name, 3) == 128 + number
        assert torch.load(f"{name}/last.ckpt", weights_only=True)["global_step"] == 2
        assert not Path(f"{name}/model.safetensors").exists()
        assert job(name, 3, "--ckpt_path=last") == 0
        ours = torch.load(f"{name}/last.ckpt", weights_only=True)
        for part in ("state_dict", "rng_state", "optimizer_states"):
            torch.testing.assert_close(ours[part], expected[part], rtol=0, atol=0)
        torch.testing.assert_close(load_file(f"{name}/model.safetensors"), averages, rtol=0, atol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_within_the_optimiser_leaves_the_checkpoint(place, monkeypatch, error):
    """Also the second Ctrl-C, which interrupts at once."""
    step = torch.optim.AdamW.step

    def half(self, closure=None):
        count = self.count = getattr(self, "count", 0) + 1
        if count < 4:
            return step(self, closure)
        closure()
        next(iter(self.param_groups[0]["params"])).data.add_(1.0)
        raise error("within the step")

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", half)
        with pytest.raises((SystemExit, RuntimeError)):  # Lightning's way to end at Ctrl-C is the first
            fit("run", 8, *STEP_DATA)
    saved = torch.load("run/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    fit("two", 2, *STEP_DATA)
    for name, tensor in torch.load("two/last.ckpt", weights_only=True)["state_dict"].items():
        assert torch.equal(saved["state_dict"][name], tensor), name


def test_a_second_ctrl_c_interrupts_at_once(place, monkeypatch):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_batch(monkeypatch, 6, twice)
    with pytest.raises(SystemExit):
        fit("run", 8, *STEP_DATA)
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    ("number", "auto_requeue", "requeued"),
    [(signal.SIGUSR1, True, ["requeue 7_3"]), (signal.SIGUSR1, False, []), (signal.SIGTERM, True, [])],
)
def test_slurm(tmp_path, monkeypatch, number, auto_requeue, requeued):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    slurm = {"NTASKS": 1, "JOB_ID": 9, "ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 3, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    class Signal(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                signal.raise_signal(number)

    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=5, guidance_scales=())
    trainer = L.Trainer(
        max_steps=6, max_epochs=-1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=1, limit_val_batches=0,
        callbacks=[LastCheckpoint(), Signal()], plugins=[SLURMEnvironment(auto_requeue)],
    )  # fmt: skip
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        trainer.fit(MFMPretraining(network, Objective([WeightedTerm("data_diagonal")])), StepData())
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == (["calls"] if requeued else []) + ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    if requeued:
        assert (tmp_path / "calls").read_text().splitlines() == requeued
