"""Training on shards that others made: by command line, by two processes, stopped and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_lightning.commands.data_report import report
from mfm_lightning.commands.main import run
from mfm_lightning.data import OffPolicyDataModule, WebDatasetDataModule
from mfm_lightning.utils.configs import read_config
from tests.data.web_shards import image_shards, npy, write
from tests.processes import torchrun, torchrun_statuses
from tests.short_jobs import tiny_fit

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = tiny_fit(
    channels=3,
    classes=3,
    terms="[{name: data_diagonal}]",
    data="""
  class_path: mfm_lightning.data.WebDatasetDataModule
  init_args:
    {urls: "shards/{000..004}.tar", image: png, val_urls: "shards/{001..002}.tar", batch_size: 2, num_workers: 2}
""",
)
FIT = ["fit", "--config", "tiny.yaml"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the config and uneven shards."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    image_shards(tmp_path / "shards", [7, 1, 8, 3, 5])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_and_uneven_shards(place, workers):
    """Two gloo ranks train and validate to their end, also resumed, where shards of 7 and 1 would leave one waiting."""
    fit = [*FIT, "--trainer.devices=2", "--trainer.strategy=ddp", f"--data.init_args.num_workers={workers}"]
    for steps, more in ((5, []), (16, ["--ckpt_path", "outputs/last.ckpt"])):
        torchrun(place, 2, *fit, f"--trainer.max_steps={steps}", *more)
        assert torch.load("outputs/last.ckpt", weights_only=True)["global_step"] == steps
    assert "val/loss" in (place / "outputs/logs/csv/metrics.csv").read_text()


@pytest.mark.slow
def test_fewer_shards_than_processes(place):
    fit = [*FIT, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.urls=shards/000.tar"]
    assert 0 not in torchrun_statuses(place, 2, *fit)
    torchrun(place, 2, *fit, "--data.init_args.resampled=true", "--overwrite")
    assert torch.load("outputs/last.ckpt", weights_only=True)["global_step"] == 3


@pytest.mark.slow
def test_latents_and_captions_train_in_epochs(place):
    array = np.random.default_rng(0).normal(size=(6, 8, 8)).astype(np.float32) ** 2
    for k in range(5):
        write(place / f"shards/00{k}.tar", [{"npy": npy(array), "txt": b"a text"}] * 4, 4 * k)
    data = "--data.init_args"
    latents = [f"{data}.image=null", f"{data}.latent=npy", f"{data}.holds=mean_std", f"{data}.scale=0.2"]
    latents += [f"{data}.label=null", f"{data}.caption=txt", f"{data}.num_classes=3", "--trainer.limit_train_batches=2"]
    done = run([*FIT, *latents, "--trainer.max_steps=5"])
    assert done.trainer.global_step == 5
    assert next(iter(done.datamodule.val_dataloader()))[1]["prompts"] == ["a text", "a text"]


def test_mfm_data_shows_what_is_read(place):
    report(place / "tiny.yaml", place / "seen", 4)
    rows = json.loads((place / "seen/classes.json").read_text())
    assert [row["train"] for row in rows] == [8, 8, 8]
    assert (place / "seen/batch.png").is_file()


def test_off_policy_data_take_batches_by_step(place):
    init = read_config(place / "tiny.yaml")["data"]["init_args"]
    data = OffPolicyDataModule(WebDatasetDataModule(**init), policy_share=0.0)
    assert (data.state_shape, data.num_classes) == ((3, 8, 8), 3)
    assert data.train_batch(0)[0].shape == (2, 3, 8, 8)
