"""Latent shards from photographs to training: prepared, verified, read in any constellation of ranks and workers."""

import csv
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mfm_benchmarks.command import main as benchmark
from mfm_lightning.cli import main as mfm
from mfm_lightning.cli import run
from mfm_lightning.data import LatentShards, OffPolicyDataModule
from mfm_lightning.data.epoch_plan import EpochPlan
from mfm_lightning.data.image_sources import center_crop
from mfm_lightning.data.latent_index import LatentIndex
from mfm_lightning.data.moments import MomentEncoder
from mfm_lightning.data.prepare import Preparation, prepare
from mfm_lightning.decoders import VAEDecoder
from mfm_lightning.distributed import Process
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.prepare_command import main
from tests.latent_data import numbers, photographs, shards, small_vae


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """In this process and in spawned ones, as forked ones have it: then sums are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photographs, a VAE, and their shards: 18 images of 2 classes in 5 shards."""
    folder = tmp_path_factory.mktemp("latents")
    photographs(folder / "images")
    vae = small_vae(folder / "vae")
    main([*arguments(folder, vae), "--output", str(folder / "shards"), "--verify"])
    return folder


def arguments(folder: Path, vae: str | None = None) -> list[str]:
    vae = vae or str(folder / "vae")
    sizes = ["--image-size", "32", "--shard-size", "4", "--batch-size", "3", "--threads", "1", "--device", "cpu"]
    return ["--input", str(folder / "images"), "--vae", vae, *sizes]


def forked(function: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that has all imported already; with one thread, since a fork does not take OpenMP's along."""

    def alone() -> None:
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    process.join(timeout=120)
    if process.is_alive():  # it hangs: that is no exit status
        process.kill()
    return process.exitcode


# -- preparation -------------------------------------------------------------------------------------------------------


def test_shards_hold_the_moments_of_every_image(made):
    index = LatentIndex.load(made / "shards")
    assert [shard.samples for shard in index.shards] == [4, 4, 4, 4, 2]
    assert (index.state_shape, index.num_classes, index.scale) == ((4, 8, 8), 2, 0.18215)
    assert json.loads((made / "shards/classes.json").read_text()) == {"china": 0, "flower": 1}
    assert not list((made / "shards").rglob("*.partial*"))
    encoder = MomentEncoder(str(made / "vae"))
    # by webdataset, as anybody would read them
    urls = sorted(str(p) for p in (made / "shards").glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "cls", "npy"))
    assert len({key for key, _, _ in found}) == 18
    mixed = [len({label for _, label, _ in found[i : i + 4]}) for i in range(0, 16, 4)]
    assert max(mixed) == 2  # classes are dealt to all shards
    for key, label, moments in found:
        name, number = re.fullmatch(r"(\w+)/\w+_(\d\d)_png", key).groups()
        assert label == {"china": 0, "flower": 1}[name]
        with Image.open(made / f"images/{name}/{name}.{number}.png") as image:
            pixels = center_crop(image, 32)
        both = torch.from_numpy(np.stack([pixels, pixels[:, ::-1]]).copy()).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = encoder.vae.encode(both).latent_dist
        expected = torch.stack([posterior.mean, posterior.std], dim=1).numpy()
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments, expected, atol=2e-3)


def test_crops_are_those_of_adm():
    def adm(pil_image, image_size):  # guided-diffusion's center_crop_arr
        while min(*pil_image.size) >= 2 * image_size:
            pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
        scale = image_size / min(*pil_image.size)
        pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
        arr = np.array(pil_image)
        crop_y, crop_x = (arr.shape[0] - image_size) // 2, (arr.shape[1] - image_size) // 2
        return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]

    random = np.random.default_rng(0)
    for height, width in ((70, 131), (33, 32), (20, 47)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.array_equal(center_crop(image, 32), adm(image, 32))


def test_several_processes_make_the_same_shards(made, monkeypatch, tmp_path):
    main([*arguments(made), "--output", str(tmp_path / "workers"), "--num-workers", "2"])
    assert_same(made / "shards", tmp_path / "workers")
    for rank in (1, 0):  # two of torchrun's, one after the other
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        main([*arguments(made), "--output", str(tmp_path / "ranks")])
        assert (tmp_path / "ranks/index.json").exists() == (rank == 0)
    assert_same(made / "shards", tmp_path / "ranks")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert Process.from_environment() == Process(0, 1, 0)  # a batch script's own environment is no srun
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert Process.from_environment() == Process(3, 8, 0)


def test_image_shards_as_input(made, tmp_path):
    """From local tars, and from a pipe where it is allowed; unequal ones, that number their keys alike."""
    files = sorted((made / "images").rglob("*.png"))
    for k, part in enumerate((files[:11], files[11:])):
        with webdataset.TarWriter(str(tmp_path / f"in-{k}.tar")) as tar:
            for i, file in enumerate(part):
                tar.write({"__key__": f"{i:04d}", "png": file.read_bytes(), "cls": int("flower" in file.name)})
    rest = arguments(made)[2:]
    inputs = [str(tmp_path / "in-{0..1}.tar")]
    main(["--input", *inputs, *rest, "--output", str(tmp_path / "out"), "--verify"])
    index = LatentIndex.load(tmp_path / "out")
    assert [(s.name[:14], s.samples) for s in index.shards] == list(
        zip(["latents-000000"] * 3 + ["latents-000001"] * 2, [4, 4, 3, 4, 3], strict=True)
    )
    assert np.concatenate([s.labels for s in index.shards]).tolist() == [0] * 9 + [1] * 9
    pipe = ["--input", f"pipe:cat {tmp_path}/in-0.tar", *rest, "--output", str(tmp_path / "piped")]
    with pytest.raises(ValueError, match="runs a shell command"):
        main(pipe)
    main([*pipe, "--allow-pipe"])
    assert LatentIndex.load(tmp_path / "piped").samples == 11
    (tmp_path / "classes.json").write_text('{"china": 0}')
    with pytest.raises(ValueError, match=r"sample '0009' of .*in-0\.tar: label 1 is outside 0\.\.0"):
        main(["--input", *inputs, *rest, "--output", str(tmp_path / "x"), "--class-index", f"{tmp_path}/classes.json"])
    os.truncate(tmp_path / "in-1.tar", 3000)
    with pytest.raises(ValueError, match=r"shard .*in-1\.tar cannot be read"):
        main(["--input", *inputs, *rest, "--output", str(tmp_path / "y")])


def test_bad_input_is_refused_before_work(made, tmp_path, capsys):
    def refused(message: str, *change: str, **kinds: Path) -> None:
        given = ["prepare-latents", *arguments(made), "--output", str(tmp_path / "none"), *change]
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            main(given[1:])
        assert not (tmp_path / "none").exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "one/class").mkdir(parents=True)
    refused("no input at", "--input", str(tmp_path / "nowhere"))
    refused("Couldn't find any class folder", "--input", str(tmp_path / "empty"))
    refused("Found no valid file for the classes class", "--input", str(tmp_path / "one"))
    refused("no shard", "--input", str(tmp_path / "x-{0..3}.tar"))
    refused("nothing opens ftpx:", "--input", "ftpx://host/a.tar")
    refused("no VAE at", "--vae", str(tmp_path / "empty"))
    refused("must be a multiple of 4", "--image-size", "30")
    refused("shard size 0", "--shard-size", "0")
    refused("precision 'fp8'", "--precision", "fp8")
    (tmp_path / "classes.json").write_text('{"a": 1, "b": 3}')
    refused("labels must be 0..1, each once", "--class-index", str(tmp_path / "classes.json"))
    # other settings than those that the shards were begun with
    with pytest.raises(ValueError, match=r"other settings \(batch_size was 3, is 5\)"):
        main([*arguments(made), "--output", str(made / "shards"), "--batch-size", "5"])


def test_images_that_cannot_be_decoded(made, tmp_path):
    images = photographs(tmp_path / "images", per_class=3)
    (images / "china/china.01.png").write_bytes(b"no image")
    command = ["--input", str(images), *arguments(made)[2:], "--output"]
    with pytest.raises(ValueError, match=r"china\.01\.png cannot be decoded.*--skip-broken"):
        main([*command, str(tmp_path / "out")])
    main([*command, str(tmp_path / "skipped"), "--skip-broken", "--verify"])
    index = LatentIndex.load(tmp_path / "skipped")
    assert (index.samples, index.broken) == (5, ["china/china_01_png"])


def test_killed_preparations_end_as_if_they_had_not_been(made, tmp_path, monkeypatch):
    """kill -9 again and again, in the middle of a shard, until all is there: the same bytes."""
    command, encode = [*arguments(made), "--output", str(tmp_path / "out")], MomentEncoder.__call__

    def slow(self, images):
        time.sleep(0.1)
        return encode(self, images)

    monkeypatch.setattr(MomentEncoder, "__call__", slow)
    for shards_there in (0, 1, 3):
        process = forked(main, command)
        while process.is_alive():
            partial = list((tmp_path / "out").glob(f"*.partial-{process.pid}"))
            if partial and len(list((tmp_path / "out").glob("*.tar"))) > shards_there:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out/index.json").exists()
    assert len(list((tmp_path / "out").glob("*.partial*"))) == 3  # what was being written
    monkeypatch.undo()
    job = Preparation((str(made / "images"),), str(tmp_path / "out"), str(made / "vae"), 32, 4, 3, device="cpu")
    with pytest.raises(SystemExit, match="the one that started it is gone"):
        prepare(job, show=False, parent=-1)
    main([*command, "--verify"])
    assert_same(made / "shards", tmp_path / "out")
    (tmp_path / "out/latents-000002.tar").unlink()  # lost after all was done: made again
    main([*command, "--verify"])
    assert_same(made / "shards", tmp_path / "out")


def assert_same(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir() if p.is_file())
    assert sorted(p.name for p in other.iterdir() if p.is_file()) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


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


def test_throughput_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--samples", "60", "--shard_size", "25", "--batch_size", "8", "--passes", "1", "--rounds", "2"]
    benchmark(["data-throughput", *small, "--state_shape", "[4,4,4]", "--workers", "[0,1]", "--output", "out"])
    with open("out/report/throughput.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["files"] for row in rows} == {"from the cache", "from disk"}
    found = {row["reader"]: row for row in rows if row["files"] == "from the cache"}
    ours = ["LatentShards, 0 workers", "LatentShards, 1 worker"]
    assert list(found) == ["raw read", "tarfile", "webdataset, decoded", *ours]
    assert all(float(row["samples/s"]) > 0 for row in found.values())
    assert float(found["raw read"]["of a raw read"]) == 1
    assert "of a raw read" in (tmp_path / "out/report/index.html").read_text()
