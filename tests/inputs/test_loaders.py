"""Training goes on in the data, epoch after epoch."""

import itertools

import pytest
import torch

from mfm_lightning.data import DigitsDataModule, LatentShards, OffPolicyDataModule
from mfm_lightning.data.stream import BatchStream
from mfm_lightning.modules import MFMPretraining
from tests.inputs.tiny_runs import fit
from tests.latent_data import shards


@pytest.fixture
def seen(monkeypatch):
    """The first batch of pixels of each training step."""
    found, step = [], MFMPretraining.training_step

    def noted(self, batch, batch_idx):
        found.append(batch[0].clone())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MFMPretraining, "training_step", noted)
    return found


def expected(count: int) -> list[torch.Tensor]:
    """Batches of the data in their order, from the DataModule alone."""
    data = DigitsDataModule(batch_size=16)
    data.setup()
    return [data.train_batch(step)[0] for step in range(count)]


@pytest.mark.parametrize(
    ("steps", "batches", "options"),
    [
        (7, 7, ["limit_train_batches=2"]),
        (6, 6, ["limit_train_batches=0.34"]),  # 2 of 6
        (4, 6, ["limit_train_batches=3", "accumulate_grad_batches=2"]),  # a step of two batches, then one of one
        (9, 6, ["limit_train_batches=2", "max_epochs=3"]),
        (5, 5, ["limit_train_batches=2", "check_val_every_n_epoch=1", "val_check_interval=1.0"]),
        (5, 5, ["limit_train_batches=3", "reload_dataloaders_every_n_epochs=1"]),
    ],
)
def test_epochs_do_not_repeat(tmp_path, monkeypatch, seen, steps, batches, options):
    monkeypatch.chdir(tmp_path)
    fit("run", steps, *[f"--trainer.{option}" for option in options])
    assert len(seen) == batches
    for ours, theirs in zip(seen, expected(batches), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first", [3, 4, 5])
def test_a_resumed_run_goes_on_within_and_between_epochs(tmp_path, monkeypatch, seen, first):
    monkeypatch.chdir(tmp_path)
    fit("run", first, "--trainer.limit_train_batches=2")
    fit("run", 8, "--trainer.limit_train_batches=2", "--ckpt_path=last")
    for ours, theirs in zip(seen, expected(8), strict=True):
        assert torch.equal(ours, theirs)


def test_overfit_batches_are_the_same_few(tmp_path, monkeypatch, seen):
    """That is what the option means."""
    monkeypatch.chdir(tmp_path)
    fit("run", 5, "--trainer.overfit_batches=2")
    few = expected(2)
    for step, ours in enumerate(seen):
        assert torch.equal(ours, few[step % 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_shards_goes_on(tmp_path, workers):
    folder = shards(tmp_path / "shards", [6, 5, 7])  # of means 0..17
    data = LatentShards(str(folder), 4, num_workers=workers, val_shards=0, flip=False, shuffle_buffer=8)
    data.setup()
    loader, whole = data.loader(), [x for x, _ in data.loader(length=12)]
    passes = [[x.clone() for x, _ in loader] for _ in range(3)]
    assert [len(part) for part in passes] == [4, 4, 4]
    assert torch.equal(torch.cat([x for part in passes for x in part]), torch.cat(whole))
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))


def test_a_validation_loader_is_the_same_each_time(tmp_path):
    folder = shards(tmp_path / "shards", [6, 5, 7])
    data = LatentShards(str(folder), 4, num_workers=0, val_shards=1)
    data.setup()
    loader = data.loader("val")
    once, twice = ([label.tolist() for _, label in loader] for _ in range(2))
    assert once == twice
    assert sum(map(len, once)) == 7


def test_a_pass_that_is_left_early_is_not_begun_again():
    loader = BatchStream(lambda step: step, 10, start=2)
    assert list(itertools.islice(loader, 3)) == [2, 3, 4]
    assert list(loader) == [5, 6, 7, 8, 9]
    assert next(iter(loader)) == 10


def test_off_policy_batches_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken, batch = [], OffPolicyDataModule.train_batch

    def noted(self, step):
        taken.append(step)
        return batch(self, step)

    monkeypatch.setattr(OffPolicyDataModule, "train_batch", noted)
    data = ["--data=mfm_lightning.data.OffPolicyDataModule", "--data.policy_share=0"]
    data += ["--data.data=mfm_lightning.data.DigitsDataModule", "--data.data.batch_size=16"]
    fit("run", 5, "--trainer.limit_train_batches=2", *data)
    assert taken == [0, 1, 2, 3, 4]
