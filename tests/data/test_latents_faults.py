"""Latent shards that are damaged, missing, or not what they say: found, named, and skipped where that is wanted."""

import functools
import http.server
import json
import os
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mfm_lightning.commands.main import run
from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.index import INDEX, LatentIndex, LatentIndexError, Layout
from mfm_lightning.data.latents.shard_reader import CorruptSampleError
from mfm_lightning.data.latents.shard_writer import write_shard
from tests.latent_data import STATE_SHAPE, numbers, shards


def main(args):
    run(["prepare-latents", *args])


LAYOUT = Layout(STATE_SHAPE)
COUNTS = [6, 5, 7, 6]


@pytest.fixture
def folder(tmp_path) -> Path:
    return shards(tmp_path / "shards", COUNTS)


def data(folder: Path | str, **settings) -> LatentShards:
    options = {"batch_size": 4, "num_workers": 0, "val_shards": 0, "shuffle_buffer": 8, **settings}
    module = LatentShards(str(folder), **options)
    module.setup("fit")
    return module


def overwrite(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def verified(folder: Path) -> str:
    with pytest.raises(LatentIndexError) as error:
        main(["--verify", "--output", str(folder)])
    return str(error.value)


NAN = np.array([np.nan], "<f2").tobytes()
DAMAGES = {  # where in a sample, what is written there, and what is said of it
    "header": (20, b"x", "its tar header is damaged"),
    "label": (LAYOUT.label_at, b"9", "its label is not the index's"),
    "array": (LAYOUT.npy_at, b"y", "it is no array of the index's shape"),
    "moments": (LAYOUT.moments_at + 4, NAN, "its moments are not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupt_sample(folder, damage):
    at, content, message = DAMAGES[damage]
    overwrite(folder / "latents-000002.tar", 3 * LAYOUT.stride + at, content)  # sample 14 of all
    with pytest.raises(CorruptSampleError, match=rf"sample 3 of latents-000002\.tar in .*: {message}"):
        list(data(folder, flip=False).loader())
    with pytest.raises(CorruptSampleError, match=r"sample 3 of latents-000002\.tar"):
        list(data(folder, flip=False, num_workers=2).loader())
    for workers in (0, 2):
        module = data(folder, corrupt="skip", flip=False, num_workers=workers)
        batches = list(module.loader(length=12))  # two epochs
        seen = [numbers(batch) for batch in batches]
        assert [len(batch) for batch in seen] == [4] * 12
        assert module.skipped == 1  # in both epochs
        for epoch in (seen[:6], seen[6:]):
            assert {i for batch in epoch for i in batch} == set(range(24)) - {14}
        resumed = [
            numbers(batch)
            for batch in data(folder, corrupt="skip", flip=False, num_workers=workers).loader(start=3, length=12)
        ]
        assert resumed == seen[3:]
    assert "latents-000002.tar: its sha256 is another one" in verified(folder)


def test_a_truncated_shard(folder, caplog):
    path = folder / "latents-000001.tar"
    os.truncate(path, 2 * LAYOUT.stride + 100)
    with pytest.raises(
        LatentIndexError, match=r"1 of 4 shards.*latents-000001\.tar has 4,\d\d\d bytes, the index says"
    ):
        data(folder)
    module = data(folder, corrupt="skip")
    seen = [i for batch in module.loader() for i in numbers(batch)]
    assert len(seen) == 24
    assert set(seen) == set(range(24)) - {8, 9, 10}
    assert module.skipped == 3
    assert "the shard ends before it" in caplog.text
    assert "bytes instead of" in verified(folder)
    # cut while it is read, after it was looked at
    module = data(shards(folder.parent / "other", COUNTS))
    os.truncate(folder.parent / "other/latents-000003.tar", LAYOUT.stride)
    with pytest.raises(CorruptSampleError, match=r"latents-000003\.tar in .*: the shard ends before it"):
        list(module.loader())


def test_a_missing_shard(folder):
    (folder / "latents-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 shards cannot be used: .*latents-000000\.tar is missing"):
        data(folder)
    module = data(folder, corrupt="skip", shuffle_buffer=64)
    seen = [i for batch in module.loader() for i in numbers(batch)]
    assert set(seen) == set(range(6, 24))
    assert len(seen) == 24
    assert "latents-000000.tar: cannot be read" in verified(folder)
    for name in ("latents-000001.tar", "latents-000002.tar", "latents-000003.tar"):
        (folder / name).unlink()
    with pytest.raises(CorruptSampleError, match="all that were read with it are corrupt too"):
        list(data(folder, corrupt="skip").loader())


def test_no_shards(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no index\.json in .*empty"):
        data(tmp_path / "empty")
    change(folder, shards=[])
    with pytest.raises(LatentIndexError, match="lists no shards with samples"):
        data(folder)


def change(folder: Path, **to) -> None:
    found = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**found, **to}))


def first_shard(folder: Path, **to) -> None:
    found = json.loads((folder / INDEX).read_text())
    change(folder, shards=[{**found["shards"][0], **to}, *found["shards"][1:]])


def test_indices_that_do_not_fit(folder):
    change(folder, num_classes=3)
    with pytest.raises(LatentIndexError, match=r"labels 0\.\.3 in latents-000000\.tar, outside 0\.\.2 of 3 classes"):
        data(folder)
    change(folder, num_classes=4, state_shape=[4, 4, 4])  # not what is in the shards
    with pytest.raises(CorruptSampleError, match="sample"):
        list(data(folder).loader())
    change(folder, state_shape=[4, 2, 2])
    for name in ("../secret.tar", "pipe:touch x", "/tmp/x.tar", "-"):
        first_shard(folder, name=name)
        with pytest.raises(LatentIndexError, match="no plain file name"):
            data(folder)
    first_shard(folder, name="latents-000000.tar")
    for captions in ({"tensors": [["text", "fp8", [2, 3]]], "caption_bytes": 512}, {"tensors": []}, ["text"]):
        change(folder, captions=captions)
        with pytest.raises(LatentIndexError, match="no index of latent shards"):
            data(folder)
    change(folder, captions={"tensors": [["text", "bf16", [2, 3]]], "caption_bytes": 512})  # which the shards lack
    with pytest.raises(CorruptSampleError, match="sample"):
        list(data(folder).loader())
    found = json.loads((folder / INDEX).read_text())
    del found["captions"]
    (folder / INDEX).write_text(json.dumps(found))
    first_shard(folder, name="latents-000000.tar", labels=[0, 1])
    with pytest.raises(LatentIndexError, match="6 samples, but 2 labels"):
        data(folder)
    change(folder, version=3)
    with pytest.raises(LatentIndexError, match="format mfm-latents 3, not mfm-latents 1 or 2"):
        data(folder)
    (folder / INDEX).write_text('{"format": ')
    with pytest.raises(LatentIndexError, match="no index of latent shards"):
        data(folder)


def test_validation_shards_that_do_not_fit(folder, tmp_path):
    shards(tmp_path / "val", [4], num_classes=5)
    with pytest.raises(LatentIndexError, match=r"val has latents .* of 5 classes, .* of 4"):
        data(folder, val_folder=str(tmp_path / "val"))
    val = shards(tmp_path / "val", [4])
    assert [numbers(b) for b in data(folder, val_folder=str(val)).loader("val")] == [[0, 1, 2, 3]]
    change(val, shift=0.1, version=2)
    with pytest.raises(LatentIndexError, match=r"val was made with shift 0\.1, .*shards with 0\.0: prepare both"):
        data(folder, val_folder=str(val))
    change(val, shift=0.0, scale=0.25)
    with pytest.raises(LatentIndexError, match=r"val has latents to be scaled by 0\.25, .*shards by 0\.5"):
        data(folder, val_folder=str(val))
    data(folder, val_folder=str(val), scale=0.5)
    for path, vae in ((folder, "a"), (val, "b")):
        change(path, made_with={"vae_sha256": vae * 64})
    with pytest.raises(LatentIndexError, match=r"val was made with another VAE \(sha256 b{12}\) than .* \(a{12}\)"):
        data(folder, val_folder=str(val), scale=0.5)


def test_verify_finds_what_is_wrong(folder):
    main(["--verify", "--output", str(folder)])
    (folder / "latents-000009.tar").write_bytes(b"")
    assert "latents-000009.tar is not in the index" in verified(folder)
    (folder / "latents-000009.tar").unlink()
    good = np.ones((2, 2, *STATE_SHAPE), np.float16)

    def rewritten(first: str, label: int, moments: np.ndarray) -> str:
        """The first shard with another first sample, and an index that knows no better."""
        rest = [(f"{i:06d}", i % 4, good) for i in range(1, 6)]
        write_shard(folder, "latents-000000.tar", [(first, label, moments), *rest], [])
        made = json.loads((folder / "parts/latents-000000.tar.json").read_text())
        first_shard(folder, **{k: v for k, v in made.items() if k in ("bytes", "sha256")})
        return verified(folder)

    def first_array(content: bytes) -> str:
        """A shard of one sample, whose array has that content."""
        with webdataset.TarWriter(str(folder / "latents-000000.tar"), mtime=0) as tar:
            tar.write({"__key__": "000000", "cls": 0, "npy": content})
        return verified(folder)

    for content in (b"", b"PK\x03\x04", b"\x93NUMPY"):  # to numpy the end of a file, a zip, and an array
        assert "latents-000000.tar: sample 0 (000000): cannot be read" in first_array(content)
    assert "key '000007' is in latents-000000.tar, too" in rewritten("000007", 0, good)
    assert "label 1 instead of 0" in rewritten("000000", 1, good)
    assert "moments that are not finite" in rewritten(
        "000000", 0, np.where(good.cumsum() == 3, np.inf, 1).reshape(good.shape)
    )
    assert "a standard deviation below 0" in rewritten("000000", 0, -good)
    assert "float16 (2, 2, 4, 2, 1) instead of float16 (2, 2, 4, 2, 2)" in rewritten("000000", 0, good[..., :1])


# -- by URL ------------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_from_a_server(folder, served):
    local = [numbers(b) for b in data(folder, num_workers=2).loader(length=9)]
    assert [numbers(b) for b in data(served, num_workers=2).loader(length=9)] == local
    assert [numbers(b) for b in data(served, num_workers=2).loader(start=5, length=9)] == local[5:]
    main(["--verify", "--output", served])
    os.truncate(folder / "latents-000001.tar", 2 * LAYOUT.stride)
    (folder / "latents-000002.tar").unlink()
    with pytest.raises(CorruptSampleError, match=r"latents-00000[12]\.tar"):
        list(data(served).loader())
    module = data(served, corrupt="skip", shuffle_buffer=64)
    assert set(i for batch in module.loader() for i in numbers(batch)) == {*range(8), *range(18, 24)}
    with pytest.raises(FileNotFoundError, match=r"nothing/index\.json cannot be read"):
        data(f"{served}/nothing")


def test_shards_from_s3(folder, tmp_path, monkeypatch):
    """By the provider's command line: here one that has the files at hand."""
    program = tmp_path / "bin/aws"
    program.parent.mkdir()
    program.write_text(
        f'#!{sys.executable}\nimport sys\nassert sys.argv[1:3] == ["s3", "cp"] and sys.argv[4] == "-"\n'
        f'name = sys.argv[3].removeprefix("s3://bucket/")\n'
        f'sys.stdout.buffer.write(open("{folder}/" + name, "rb").read())\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert [numbers(b) for b in data("s3://bucket").loader()] == [numbers(b) for b in data(folder).loader()]


def test_rewritten_urls_cannot_run_commands(folder, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", "http://x=pipe:cat ")
    with pytest.raises(ValueError, match="runs a shell command"):
        LatentIndex.load("http://x")
