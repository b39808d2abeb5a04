"""Training on latent shards: by command line, by two processes, killed and resumed, and within off-policy data."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from mfm_lightning.commands.main import main as mfm
from mfm_lightning.commands.main import run
from mfm_lightning.data import GaussianMixtureDataModule, OffPolicyDataModule
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.networks.decoders import VAEDecoder
from tests.latent_data import data, numbers, shards
from tests.processes import ended, forked, torchrun
from tests.short_jobs import tiny_fit

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = tiny_fit(
    channels=4,
    classes=2,
    terms="[{name: data_diagonal}, {name: mean_flow}]",
    data="""
  class_path: mfm_lightning.data.LatentShards
  init_args: {folder: shards, batch_size: 4, num_workers: 1, shuffle_buffer: 8}
""",
)


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A folder with the config and the photographs' shards."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "shards").symlink_to(made / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mfm"])
    return tmp_path


@pytest.mark.slow
def test_fit_on_photographs(place, made):
    fit = ["fit", "--config", "tiny.yaml"]
    decoder = f"{{class_path: mfm_lightning.networks.VAEDecoder, init_args: {{path: '{made / 'vae'}'}}}}"
    trained = run([*fit, f"--data.init_args.decoder={decoder}"])
    assert trained.trainer.global_step == 3
    assert "val/loss" in (place / "outputs/logs/csv/metrics.csv").read_text()
    latents = next(iter(trained.datamodule.val_dataloader()))[0]
    assert isinstance(trained.datamodule.decoder, VAEDecoder)
    assert trained.datamodule.decode(latents).shape == (2, 3, 32, 32)
    run(["test", "--config", "tiny.yaml", "--ckpt_path", "outputs/last.ckpt"])
    run([*fit, "--overwrite", "--data.init_args.val_shards=0"])  # without validation


@pytest.mark.slow
def test_wrong_networks_and_settings_are_refused(place, capsys):
    network, init = "--model.init_args.network.init_args", "--data.init_args"
    for change, message in (
        (f"{network}.in_channels=3", "data of shape (4, 8, 8), but the network takes (3, 8, 8)"),
        (f"{network}.input_size=16", "data of shape (4, 8, 8), but the network takes (4, 16, 16)"),
        (f"{network}.num_classes=10", "data of 2 classes, but the network has 10"),
        (f"{init}.batch_size=64", "16 samples are not one batch of 64 for each of 1 ranks"),
        (f"{init}.val_shards=5", "val_shards 5 of the 5 in shards leave none to train on"),
        (f"{init}.folder=nowhere", "no index.json in nowhere"),
        (f"{init}.folder=pipe:cat shards/{{name}}", "runs a shell command"),
        (f"{init}.corrupt=ignore", "corrupt"),
    ):
        with pytest.raises(SystemExit) as stopped:
            mfm(["fit", "--config", "tiny.yaml", change])
        assert message in str(stopped.value) + capsys.readouterr().err
    run(
        [
            "fit",
            "--config",
            "tiny.yaml",
            "--overwrite",
            f"{init}.folder=pipe:cat shards/{{name}}",
            f"{init}.allow_pipe=true",
        ]
    )


@pytest.mark.slow
def test_two_processes_and_uneven_shards(place):
    """Two gloo ranks train and validate to their end, also resumed, where shards of 7 and 1 would leave one waiting."""
    shards(place / "uneven", [7, 1, 8, 1, 5], num_classes=2, state_shape=(4, 8, 8), std=0.5)
    fit = ["fit", "--config", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += ["--data.init_args.folder=uneven", "--data.init_args.val_shards=2", "--data.init_args.batch_size=2"]

    for steps, more in ((5, []), (9, ["--ckpt_path", "outputs/last.ckpt"])):
        torchrun(place, 2, *fit, f"--trainer.max_steps={steps}", *more)
        assert torch.load("outputs/last.ckpt", weights_only=True)["global_step"] == steps


@pytest.mark.slow
def test_killed_in_an_epoch_and_resumed_exactly(place, monkeypatch):
    """kill -9 while training: the resumed run has the losses that an uninterrupted one has."""
    shards(place / "uneven", [7, 1, 8, 6], num_classes=2, state_shape=(4, 8, 8), std=0.5)
    options = ["--trainer.max_steps=11", "--trainer.limit_val_batches=0", "--trainer.logger=false"]
    options += ["--data.init_args.folder=uneven", "--data.init_args.num_workers=2"]
    step = MFMPretraining.training_step

    def fit(folder: str, *more: str, kill_at: int | None = None) -> dict[int, float]:
        def recorded(self, batch, batch_idx):
            if self.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = step(self, batch, batch_idx)
            with open(f"{folder}.jsonl", "a") as file:
                file.write(json.dumps([self.global_step, loss.item()]) + "\n")
            return loss

        monkeypatch.setattr(MFMPretraining, "training_step", recorded)
        command = ["fit", "--config", "tiny.yaml", f"--trainer.default_root_dir={folder}", *options, *more]
        assert ended(forked(run, command)) == (0 if kill_at is None else -signal.SIGKILL)
        return dict(map(json.loads, Path(f"{folder}.jsonl").read_text().splitlines()))

    whole = fit("whole")
    assert sorted(whole) == list(range(11))
    assert sorted(fit("killed", kill_at=7)) == list(range(7))
    assert torch.load("killed/last.ckpt", weights_only=True)["global_step"] == 6
    assert fit("killed", "--ckpt_path", "killed/last.ckpt") == whole
    assert torch.load("killed/last.ckpt", weights_only=True)["global_step"] == 11


class Recorder(L.LightningModule):
    """Trains one number, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.x, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].tolist())
        return self.x

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("kind", ["shards", "mixture"])
def test_lightning_takes_a_resumed_run_for_exact(uneven, tmp_path, kind):
    """It warns of loaders that it takes for not resumable."""

    def fit(steps: int, resume: Path | None = None) -> L.Trainer:
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
        )  # fmt: skip
        module = data(uneven) if kind == "shards" else GaussianMixtureDataModule(batch_size=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*not resumable.*")
            trainer.fit(Recorder(), module, ckpt_path=resume, weights_only=resume and True)
        return trainer

    fit(3).save_checkpoint(tmp_path / "middle.ckpt")
    resumed, whole = fit(7, tmp_path / "middle.ckpt"), fit(7)
    assert resumed.global_step == 7
    assert resumed.lightning_module.seen == whole.lightning_module.seen[3:]


def test_another_order_is_said(uneven, caplog):
    module, other = data(uneven), data(uneven, num_workers=3)
    state = module.state_dict()
    module.load_state_dict(state)
    assert not caplog.records
    other.load_state_dict(state)
    assert "num_workers 0 to 3" in caplog.text


def test_fine_tuning_takes_them_too(uneven):
    off_policy = OffPolicyDataModule(data(uneven), policy_share=0.0)
    off_policy.trainer = SimpleNamespace(
        accumulate_grad_batches=2, global_step=3, max_steps=5, global_rank=1, world_size=2, datamodule=off_policy
    )
    off_policy.setup("fit")
    expected = data(uneven).loader("train", 1, 2, start=6, length=10)
    ours = list(off_policy.train_dataloader())
    assert [numbers(batch) for batch in ours] == [numbers(batch) for batch in expected]
    assert off_policy.state_shape == (4, 2, 2)


def test_fine_tuning_passes_on_what_they_say(tmp_path, caplog):
    """Another order in a resumed run, and at its end how many samples were skipped."""
    folder = shards(tmp_path, [8, 8])
    os.truncate(folder / "latents-000001.tar", 100)

    def off_policy(**settings) -> OffPolicyDataModule:
        module = OffPolicyDataModule(data(folder, corrupt="skip", **settings), policy_share=0.0)
        module.trainer = SimpleNamespace(
            accumulate_grad_batches=1, global_step=0, max_steps=4, global_rank=0, world_size=1, datamodule=module
        )
        module.setup("fit")
        return module

    module = off_policy()
    list(module.train_dataloader())
    module.teardown("fit")
    assert caplog.messages[-1] == f"{module.data.skipped} corrupt samples were skipped"
    assert module.data.skipped == 8
    caplog.clear()
    off_policy(num_workers=3).load_state_dict(module.state_dict())  # its batches are read in the training process
    assert "order" not in caplog.text
    off_policy(seed=1, shuffle_buffer=4).load_state_dict(module.state_dict())
    assert "went from seed 0 to 1, shuffle_buffer 2048 to 4" in caplog.text
