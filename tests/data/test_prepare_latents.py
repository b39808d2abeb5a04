"""Latent shards made from photographs: by any number of processes, killed and gone on with, verified."""

import gzip
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mfm_lightning.commands.main import run
from mfm_lightning.data.latents.image_sources import InputError, WebDatasetSource
from mfm_lightning.data.latents.index import LatentIndex
from mfm_lightning.data.latents.moments import MomentEncoder
from mfm_lightning.data.latents.preparation import Preparation, prepare
from mfm_lightning.data.latents.shard_writer import finished, write_shard
from mfm_lightning.utils.decoding import center_crop
from mfm_lightning.utils.distributed import Process
from tests.latent_data import arguments, photographs
from tests.processes import forked


def main(args):
    run(["prepare-latents", *args])


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.slow
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
    (tmp_path / "classes.json").write_text('{"china": 0, "flower": 1, "pagoda": 2}')
    with pytest.raises(ValueError, match=r"other settings \(class_index was None, is [0-9a-f]{64}\)"):
        main([*pipe, "--allow-pipe", "--class-index", str(tmp_path / "classes.json")])
    (tmp_path / "classes.json").write_text('{"china": 0}')
    with pytest.raises(ValueError, match=r"sample '0009' of .*in-0\.tar: label 1 is outside 0\.\.0"):
        main(["--input", *inputs, *rest, "--output", str(tmp_path / "x"), "--class-index", f"{tmp_path}/classes.json"])
    os.truncate(tmp_path / "in-1.tar", 3000)
    with pytest.raises(ValueError, match=r"shard .*in-1\.tar cannot be read"):
        main(["--input", *inputs, *rest, "--output", str(tmp_path / "y")])


@pytest.mark.parametrize("stream", ["file", "pipe", "gz"])
def test_damaged_image_shards_are_not_taken_for_shorter_ones(tmp_path, stream):
    """Python's tarfile ends without an error at any header that is none, as `tar` does not."""
    path = tmp_path / "in.tar"
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for i in range(4):
            tar.write({"__key__": f"{i:04d}", "png": b"x" * 700, "cls": i})
    whole, at = path.read_bytes(), 2 * 5 * 512  # of the third sample: two headers, label, 700 bytes

    def labels(content: bytes) -> list[int]:
        path.write_bytes(gzip.compress(content) if stream == "gz" else content)
        url = f"pipe:cat {path}" if stream == "pipe" else str(path)
        return [image.label for image in WebDatasetSource([url], allow_pipe=True).read(0)]

    assert labels(whole) == labels(whole[: 4 * 5 * 512 + 512]) == [0, 1, 2, 3]  # one block of zeros is an end
    for content, message in (
        (
            whole[:at] + b"?" + whole[at + 1 :],
            r"1 samples: .* archive's end at byte 5,120 \(bad checksum\): damaged or",
        ),
        (whole[:at], r"1 samples: .* at byte 5,120 \(empty header\)"),
        (whole[: at + 100], r"1 samples: .* at byte 5,120 \(truncated header\)"),
        (whole[: at + 2000], "2 samples: unexpected end of data"),
        (whole[:at] + bytes(512) + whole[at + 512 :], "1 samples: more after its end at byte 5,120"),
        (whole + whole, "3 samples: more after its end at byte 10,240"),
        (b"", r"0 samples: .* at byte 0 \(empty header\)"),
    ):
        with pytest.raises(InputError, match=rf"shard .*{path} cannot be read after {message}"):
            labels(content)


def test_bad_input_is_refused_before_work(made, tmp_path, capsys):
    def refused(message: str, *change: str, **kinds: Path) -> None:
        usual = arguments(made)
        if "--input" in change:  # which takes several, and stands once
            usual = usual[: usual.index("--input")] + usual[usual.index("--input") + 2 :]
        given = ["prepare-latents", *usual, "--output", str(tmp_path / "none"), *change]
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            main(given[1:])
        assert not (tmp_path / "none").exists()

    (tmp_path / "empty").mkdir()
    (tmp_path / "one/class").mkdir(parents=True)
    refused("no input at", "--input", str(tmp_path / "nowhere"))
    refused("Couldn't find any class folder", "--input", str(tmp_path / "empty"))
    refused("Found no valid file for the classes class", "--input", str(tmp_path / "one"))
    names = {"c/" + "x" * 93: "too long for a name", "__c__/x": "skipped by webdataset", "c/\udcff": "no UTF-8"}
    for k, (name, message) in enumerate(names.items()):
        path = tmp_path / f"names{k}/{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        refused(message, "--input", str(tmp_path / f"names{k}"))
    refused("no shard", "--input", str(tmp_path / "x-{0..3}.tar"))
    refused("nothing opens ftpx:", "--input", "ftpx://host/a.tar")
    refused("no VAE at", "--vae", str(tmp_path / "empty"))
    refused("must be a multiple of 4", "--image-size", "30")
    refused("shard size 0", "--shard-size", "0")
    refused("precision: 'fp8' is not one of", "--precision", "fp8")
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
        time.sleep(0.2)  # longer than it takes to see the file and kill
        return encode(self, images)

    monkeypatch.setattr(MomentEncoder, "__call__", slow)
    for shards_there in (0, 1, 2):  # the last shard is encoded at once, before it is written
        left = len(list((tmp_path / "out").glob("*.tar.partial-*")))
        process = forked(main, command)
        while process.is_alive():
            partial = list((tmp_path / "out").glob("*.tar.partial-*"))
            if len(partial) > left and len(list((tmp_path / "out").glob("*.tar"))) > shards_there:
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


def test_writers_of_one_shard_do_not_meet(tmp_path):
    """One writes it while another does: processes whose numbers may be the same, on two machines."""

    def samples(more: bool):
        for i in range(3):
            if more and i == 2:
                write_shard(tmp_path, "latents-000000.tar", samples(False), [])
                assert finished(tmp_path, "latents-000000.tar")["samples"] == 3
            yield f"{i:06d}", i, np.ones((2, 2, 4, 2, 2), np.float16)

    write_shard(tmp_path, "latents-000000.tar", samples(True), [])
    content = (tmp_path / "latents-000000.tar").read_bytes()
    assert hashlib.sha256(content).hexdigest() == finished(tmp_path, "latents-000000.tar")["sha256"]
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_sample_of_another_size_is_no_shard(tmp_path):
    samples = [(f"{i}", 0, np.ones((2, 2, 4, size, size), np.float16)) for i, size in enumerate((2, 8))]
    with pytest.raises(ValueError, match=r"latents-0\.tar: sample '1' ends at byte \d+, not at 2 \* 2048"):
        write_shard(tmp_path, "latents-0.tar", samples, [])
    assert not list(tmp_path.iterdir())


def assert_same(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir() if p.is_file())
    assert sorted(p.name for p in other.iterdir() if p.is_file()) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
