"""Latent shards read in any constellation of ranks and workers, and trained on."""

import json
import math
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from mfm_lightning.cli import main as mfm
from mfm_lightning.cli import run
from mfm_lightning.data import GaussianMixtureDataModule, LatentShards, OffPolicyDataModule
from mfm_lightning.data.epoch_plan import EpochPlan
from mfm_lightning.data.verify import verify
from mfm_lightning.decoders import VAEDecoder
from mfm_lightning.modules import MFMPretraining
from tests.latent_data import ended, forked, numbers, shards

pytestmark = pytest.mark.usefixtures("one_thread")


# -- order -------------------------------------------------------------------------------------------------------------

COUNTS = [5, 1, 9, 0, 3, 6, 2, 10, 4]  # 40


def data(folder: Path, **settings) -> LatentShards:
    return LatentShards(str(folder), **{"batch_size": 4, "num_workers": 0, "val_shards": 0, **settings})


def epochs(module: LatentShards, rank: int, world_size: int, workers: int, count: int = 1) -> list[list[int]]:
    """The samples of each batch, by the streams that the workers would have, in DataLoader's order."""
    loader = module.loader("train", rank, world_size, num_workers=workers)
    length = count * loader.stream.plan.batches
    streams = [
        module.loader("train", rank, world_size, length=length, num_workers=workers).stream for _ in range(workers)
    ]
    return [numbers(streams[k % workers].batch(k)) for k in range(length)]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("uneven"), COUNTS)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 1), (2, 2), (5, 1), (5, 4)])
def test_every_sample_once_whatever_ranks_and_workers(uneven, world_size, workers):
    module = data(uneven, batch_size=2, shuffle_buffer=4)
    by_rank = [epochs(module, rank, world_size, workers, count=2) for rank in range(world_size)]
    assert {len(batches) for batches in by_rank} == {2 * 20 // world_size}
    assert {len(batch) for batches in by_rank for batch in batches} == {2}
    both = [[i for batches in by_rank for batch in half(batches, e) for i in batch] for e in range(2)]
    assert sorted(both[0]) == sorted(both[1]) == list(range(40))
    assert both[0] != both[1] != list(range(40))


def half(batches: list, e: int) -> list:
    n = len(batches) // 2
    return batches[e * n : (e + 1) * n]


def test_what_is_left_over_differs_by_epoch(uneven):
    module = data(uneven, batch_size=7)  # on two ranks: 28 of 40
    left = []
    for e in range(6):
        seen = [i for r in range(2) for b in epochs(module, r, 2, 1, 6)[2 * e : 2 * e + 2] for i in b]
        assert len(set(seen)) == len(seen) == 28
        left.append(set(range(40)) - set(seen))
    assert set.intersection(*left) == set()


def test_more_ranks_than_shards(tmp_path):
    folder = shards(tmp_path, [20, 21])
    module = data(folder)
    seen = [i for rank in range(8) for batch in epochs(module, rank, 8, 1) for i in batch]
    assert len(seen) == len(set(seen)) == 32
    with pytest.raises(ValueError, match="2 shards for 8 ranks"):
        data(folder, few_shards="error").loader("train", 0, 8)
    resampled = data(folder, few_shards="resample")
    by_rank = [epochs(resampled, rank, 8, 1, 2) for rank in range(8)]
    assert {tuple(map(len, batches)) for batches in by_rank} == {(4, 4)}
    assert by_rank[0] != by_rank[1]
    assert by_rank == [epochs(resampled, rank, 8, 1, 2) for rank in range(8)]
    # fewer samples than one batch for each rank
    with pytest.raises(ValueError, match="41 samples are not one batch of 4 for each of 11 ranks"):
        module.loader("train", 0, 11)
    assert [len(b) for b in epochs(resampled, 10, 11, 2)] == [4]
    wide = data(folder, few_shards="resample", batch_size=64)  # more than all samples
    assert [len(b) for b in epochs(wide, 1, 2, 1)] == [64]


def test_validation_is_complete_and_equal_on_all_ranks(uneven):
    module = data(uneven, batch_size=3, val_shards=3)  # 16 samples, 24..39
    for world_size in (1, 2, 3, 5, 40):
        for workers in (0, 2):
            found = []
            for rank in range(world_size):
                stream = module.loader("val", rank, world_size, num_workers=workers).stream
                found.append([numbers(stream.batch(k)) for k in range(len(module.loader("val", rank, world_size)))])
            assert len({tuple(map(len, batches)) for batches in found}) == 1
            seen = [i for batches in found for batch in batches for i in batch]
            assert set(seen) == set(range(24, 40))
            assert len(seen) == max(16 + (-16) % world_size, world_size)
    train = {i for batch in epochs(module, 0, 1, 1) for i in batch}
    assert train == set(range(24))


def test_plans_of_large_sets_are_exact():
    counts = np.random.default_rng(0).integers(1, 2000, 1281)
    for world_size, lanes in ((8, 4), (48, 7)):
        plan = EpochPlan(counts, 256, world_size - 1, world_size, lanes)
        assert plan.batches == counts.sum() // (256 * world_size)
        assert sum(plan.lane_length(lane) for lane in range(lanes)) == plan.batches * 256
        stretches = [s for lane in range(lanes) for s in plan.stretches(3, lane, 0, plan.lane_length(lane))]
        assert sum(s.last - s.first for s in stretches) == plan.batches * 256
        assert len({s.shard for s in stretches}) <= 2 * math.ceil(1281 / world_size) + 2 * lanes
        assert all(0 <= s.first < s.last <= counts[s.shard] for s in stretches)


def test_workers_and_resume_see_the_same_batches(tmp_path):
    """Through real worker processes; started at any step, as a resumed run is."""
    folder = shards(tmp_path, COUNTS, std=1.0)
    for workers in (0, 2):
        module = data(folder, shuffle_buffer=8, num_workers=workers)
        whole = list(module.loader(length=23))
        assert len(whole) == 23
        for start in (7, 12):
            rest = list(module.loader(start=start, length=23))
            assert len(rest) == 23 - start
            for ours, theirs in zip(rest, whole[start:], strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])
        assert not torch.equal(whole[0][0], whole[10][0])  # ten batches an epoch
    other = next(iter(data(folder, seed=1, num_workers=0).loader()))
    assert not torch.equal(other[0], whole[0][0])


def test_class_filter(uneven):
    module = data(uneven, classes=[1, 3], batch_size=5, shuffle_buffer=10)
    for workers in (1, 3):
        seen = [i for rank in range(2) for batch in epochs(module, rank, 2, workers) for i in batch]
        assert sorted(seen) == [i for i in range(40) if i % 4 in (1, 3)]
    with pytest.raises(ValueError, match=r"classes \[7\]: the shards have labels 0..3"):
        data(uneven, classes=[7]).loader()


@pytest.mark.parametrize("folder", ["Straße/日本", "x" * 150, "x" * 90])
def test_any_name_leaves_the_layout_as_it_is(tmp_path, folder):
    """Names that are not ASCII, or longer than the field of a tar's header, once took more blocks."""
    shards(tmp_path, [5, 3], key=folder + "/" + "n" * 80 + "é{:06d}")
    assert sorted(i for batch in data(tmp_path, batch_size=2).loader() for i in numbers(batch)) == list(range(8))
    assert verify(str(tmp_path)).samples == 8


# -- draws -------------------------------------------------------------------------------------------------------------


def test_latents_are_draws_from_the_moments(tmp_path):
    folder = shards(tmp_path, [64], state_shape=(4, 16, 16), std=0.5)
    module = data(folder, batch_size=64, shuffle_buffer=64)
    x, label = next(iter(module.loader()))
    assert (x.dtype, label.dtype, x.shape, label.shape) == (torch.float32, torch.int64, (64, 4, 16, 16), (64,))
    z = x / 0.5  # the index's scale
    mean = z.mean(dim=(1, 2, 3)).round()
    assert torch.equal(mean.abs().long() % 4, label)
    assert 15 < int((mean < 0).sum()) < 49  # mirrored
    assert abs(float((z - mean[:, None, None, None]).std()) - 0.5) < 0.01
    steady = data(folder, batch_size=64, flip=False, scale=2.0)
    assert next(iter(steady.loader()))[0].mean(dim=(1, 2, 3)).min() > -0.1
    assert float(next(iter(steady.loader()))[0].max()) > 100


# -- training ----------------------------------------------------------------------------------------------------------

TINY = """
trainer:
  default_root_dir: outputs
  max_steps: 3
  max_epochs: -1
  accelerator: cpu
  devices: 1
  val_check_interval: 3
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: outputs, name: logs, version: csv}}
  callbacks:
    - class_path: mfm_lightning.callbacks.LastCheckpoint
      init_args: {every_n_steps: 2}
seed_everything: 0
model:
  class_path: mfm_lightning.modules.MFMPretraining
  init_args:
    network:
      class_path: mfm_lightning.networks.DiT
      init_args:
        {input_size: 8, patch_size: 4, in_channels: 4, hidden_size: 16, depth: 2, num_heads: 2, encoder_depth: 1,
         num_classes: 2, guidance_scales: []}
    objective:
      terms: [{name: data_diagonal}, {name: mean_flow}]
data:
  class_path: mfm_lightning.data.LatentShards
  init_args: {folder: shards, batch_size: 4, num_workers: 1, shuffle_buffer: 8}
"""


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A folder with the config and the photographs' shards."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "shards").symlink_to(made / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mfm"])
    return tmp_path


def test_fit_on_photographs(place, made):
    fit = ["fit", "--config", "tiny.yaml"]
    decoder = f"{{class_path: mfm_lightning.decoders.VAEDecoder, init_args: {{path: '{made / 'vae'}'}}}}"
    trained = run([*fit, f"--data.init_args.decoder={decoder}"])
    assert trained.trainer.global_step == 3
    assert "val/loss" in (place / "outputs/logs/csv/metrics.csv").read_text()
    latents = next(iter(trained.datamodule.val_dataloader()))[0]
    assert isinstance(trained.datamodule.decoder, VAEDecoder)
    assert trained.datamodule.decode(latents).shape == (2, 3, 32, 32)
    run(["test", "--config", "tiny.yaml", "--ckpt_path", "outputs/last.ckpt"])
    run([*fit, "--data.init_args.val_shards=0"])  # without validation


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
    run(["fit", "--config", "tiny.yaml", f"{init}.folder=pipe:cat shards/{{name}}", f"{init}.allow_pipe=true"])


def test_two_processes_and_uneven_shards(place):
    """Two gloo ranks train and validate to their end, also resumed, where shards of 7 and 1 would leave one waiting."""
    shards(place / "uneven", [7, 1, 8, 1, 5], num_classes=2, state_shape=(4, 8, 8), std=0.5)
    fit = ["fit", "--config", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit += ["--data.init_args.folder=uneven", "--data.init_args.val_shards=2", "--data.init_args.batch_size=2"]

    def rank_of_torchrun(rank: int, port: int, command: list[str]) -> None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
            os.environ[name] = str(value)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
        run(command)

    for steps, more in ((5, []), (9, ["--ckpt_path", "outputs/last.ckpt"])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*fit, f"--trainer.max_steps={steps}", *more]
        ranks = [forked(rank_of_torchrun, rank, port, command) for rank in range(2)]
        assert [ended(rank) for rank in ranks] == [0, 0]
        assert torch.load("outputs/last.ckpt", weights_only=True)["global_step"] == steps


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
    assert module.data.skipped >= 8
    caplog.clear()
    off_policy(num_workers=3).load_state_dict(module.state_dict())  # its batches are read in the training process
    assert "order" not in caplog.text
    off_policy(seed=1, shuffle_buffer=4).load_state_dict(module.state_dict())
    assert "went from seed 0 to 1, shuffle_buffer 2048 to 4" in caplog.text
