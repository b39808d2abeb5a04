"""Folders of shards and of samples that are not what they should be; outputs that cannot be written; stops."""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import main
from mfm_lightning.data.latents import shard_writer
from mfm_lightning.data.latents.index import INDEX, LatentIndex
from mfm_lightning.data.latents.moments import MomentEncoder
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.sampling import outputs
from mfm_lightning.utils import atomic, stopping
from mfm_lightning.utils.stopping import Stopped, stoppable
from tests.inputs.pictures import mfm, moments, picture, prepare, refused, save
from tests.latent_data import shards
from tests.processes import ended, forked

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file of a random model of pixels."""
    torch.manual_seed(0)
    network = DiT(16, 8, 3, 32, 2, 2, 1, num_classes=3)
    return save_model(MetaFlowMap(network), tmp_path_factory.mktemp("model") / "model.safetensors")


def sample(model: Path, output: Path, *more: object) -> tuple[int, str]:
    small = ["--num-samples", 6, "--batch-size", 2, "--steps", 1, "--device", "cpu"]
    return mfm("sample", model, "--output", output, *small, *more)


# -- indices that pass wrongly ----------------------------------------------------------------------------------------


HEADS = {
    "null": ("scale", None), "zero": ("scale", 0), "NaN": ("scale", float("nan")), "negative": ("scale", -0.18),
    "infinite": ("scale", float("inf")), "text": ("scale", "0.18215"), "true": ("scale", True),
    "flat shape": ("state_shape", [16]), "no height": ("state_shape", [4, 0, 2]), "no classes": ("num_classes", 0),
    "half classes": ("num_classes", 2.5), "more samples": ("samples", 99),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_an_index_of_impossible_numbers_is_refused(kind, tmp_path):
    """By `--verify` and where it is read for training."""
    field, value = HEADS[kind]
    folder = shards(tmp_path / "x", [4, 3])
    assert mfm("prepare-latents", "--verify", "--output", folder)[0] == 0
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, field: value}))
    refused(mfm("prepare-latents", "--verify", "--output", folder), f"{folder}/index.json", f"{field} {value}")
    with pytest.raises(ValueError, match=rf"index\.json: {field} "):
        LatentIndex.load(folder)


@pytest.mark.parametrize("value", [-1.0, np.nan, -np.inf])
def test_deviations_below_zero_do_not_verify(value, tmp_path):
    """In the image's moments and in those of its mirror image."""
    for side in (0, 1):
        folder = shards(tmp_path / f"{side}", [2])
        array = np.ones((2, 2, 4, 2, 2), np.float16)
        array[side, 1, 2, 1, 0] = value
        shard_writer.write_shard(folder, "latents-000000.tar", [("0", 0, array), ("1", 1, np.ones_like(array))], [])
        made = json.loads((folder / "parts/latents-000000.tar.json").read_text())
        index = json.loads((folder / INDEX).read_text())
        index["shards"] = [made]
        (folder / INDEX).write_text(json.dumps(index))
        refused(mfm("prepare-latents", "--verify", "--output", folder), "latents-000000.tar: sample 0 (0)")


def test_a_shard_listed_twice_is_refused(tmp_path):
    folder = shards(tmp_path / "x", [4])
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "samples": 8, "shards": index["shards"] * 2}))
    refused(mfm("prepare-latents", "--verify", "--output", folder), "a shard is listed twice")


# -- what `mfm fid` is given -------------------------------------------------------------------------------------------


def spoiled(mu: np.ndarray, sigma: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "mu":
        mu[3] = np.nan
    if kind == "sigma":
        sigma[2, 2] = np.inf
    if kind == "asymmetric":
        sigma[0, 1] = 5
    if kind == "negative":
        sigma[4, 4] = -1
    return mu, sigma


@pytest.mark.parametrize("kind", ["mu", "sigma", "asymmetric", "negative"])
def test_statistics_that_are_none_are_refused(kind, fid, tmp_path):
    for i in range(2):
        save(tmp_path / "x" / f"{i}.png", picture(20, i))
    mu, sigma = spoiled(np.zeros(64), np.eye(64), kind)
    np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "good.npz", mu=np.zeros(64), sigma=np.eye(64))
    assert fid(tmp_path / "x", tmp_path / "good.npz")[0] == 0
    for said in (fid(tmp_path / "x", tmp_path / "bad.npz"), fid(tmp_path / "bad.npz", tmp_path / "good.npz")):
        refused(said, f"{tmp_path}/bad.npz: ", "not finite" if kind in ("mu", "sigma") else "no covariance")


@pytest.mark.parametrize("form", ["png", "npz", "webdataset"])
def test_unfinished_samples_are_not_measured(form, model, fid, tmp_path, monkeypatch):
    """Stopped in the second batch, as by a kill; finished by the same command, and measured."""
    write = outputs.PNGFolder.write if form == "png" else outputs._Parts.write
    owner = outputs.PNGFolder if form == "png" else outputs._Parts

    def stops(self, batch, images):
        if batch.start >= 2:
            raise KeyboardInterrupt
        write(self, batch, images)

    with monkeypatch.context() as patch:
        patch.setattr(owner, "write", stops)
        assert sample(model, tmp_path / "out", "--format", form)[0] == 130
    refused(fid(tmp_path / "out"), f"{tmp_path}/out is unfinished", "run the same mfm sample command again")
    refused(fid(tmp_path / "out", tmp_path / "out"), "is unfinished")
    assert sample(model, tmp_path / "out", "--format", form)[0] == 0
    status, said = fid(tmp_path / "out", None, "--output", tmp_path / "fid.json")
    assert status == 0, said
    assert json.loads((tmp_path / "fid.json").read_text())["num_samples"] == 6
    if form != "png":
        (tmp_path / "out/parts").mkdir()
        refused(fid(tmp_path / "out"), "parts is still there")
    else:
        save(tmp_path / "out/00000006.png", picture())
        refused(fid(tmp_path / "out"), "has 7 samples", "says 6")


def test_others_images_are_not_taken_for_samples(model, tmp_path):
    save(tmp_path / "out/00000000.png", picture())
    before = (tmp_path / "out/00000000.png").read_bytes()
    refused(sample(model, tmp_path / "out"), "has files that mfm sample did not write (1, such as 00000000.png)")
    assert (tmp_path / "out/00000000.png").read_bytes() == before
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz/samples.npz", np.zeros(3))
    refused(sample(model, tmp_path / "npz", "--format", "npz"), "did not write (1, such as samples.npz)")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/log.txt").write_text("a user's own")
    assert sample(model, tmp_path / "notes")[0] == 0


# -- outputs that cannot be written ------------------------------------------------------------------------------------


def test_outputs_that_are_files_or_folders(made, model, fid, tmp_path):
    save(tmp_path / "x/c/a.png", picture())
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file/below"):
        for said in (
            prepare(made, tmp_path / "x", output),
            sample(model, output),
            mfm("prepare-latents", "--verify", "--output", output),
            fid(tmp_path / "x/c", None, "--output", output / "out.json"),
        ):
            refused(said, f"{tmp_path}/file is a file: expected a folder to write to")
    for option in ("--output", "--save-statistics"):
        refused(fid(tmp_path / "x/c", None, option, tmp_path / "x"), f"{tmp_path}/x is a folder: expected the name")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_a_line_with_the_file(number, made, model, tmp_path, monkeypatch):
    """Of shards, their notes, and samples; then there is space again, and the same command goes on."""
    for i in range(3):
        save(tmp_path / "x/c" / f"{i}.png", picture(20, i))

    def full(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", full)
        refused(prepare(made, tmp_path / "x", tmp_path / "out"), os.strerror(number), "out/preparation.json")
        refused(sample(model, tmp_path / "samples"), os.strerror(number), "samples/samples.json")
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_tar_writer", full)
        refused(prepare(made, tmp_path / "x", tmp_path / "out"), os.strerror(number), "out/latents-000000.tar")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "encode_png", full)
        refused(sample(model, tmp_path / "samples"), os.strerror(number), "samples/00000000.png")
    assert not list(tmp_path.rglob("*.partial*"))
    assert prepare(made, tmp_path / "x", tmp_path / "out", "--verify")[0] == 0
    assert sample(model, tmp_path / "samples")[0] == 0


def test_a_folder_that_may_not_be_written(made, model, tmp_path, monkeypatch):
    """As a user who is not root finds it; root, as which tests may run, may write anywhere."""
    save(tmp_path / "x/c/a.png", picture())
    mkdir = Path.mkdir

    def denied(self, *args, **kwargs):
        if "locked" in self.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", denied)
    for said in (prepare(made, tmp_path / "x", tmp_path / "locked/out"), sample(model, tmp_path / "locked/out")):
        refused(said, "Permission denied", "locked/out")


def test_two_preparations_at_once_do_not_trip(made, tmp_path, monkeypatch):
    """The other one finishes, and clears what it takes for left over, while this one writes its shard or a note."""
    for i in range(3):
        save(tmp_path / "x/c" / f"{i}.png", picture(20, i))
    for where in ("shard", "note"):
        output, inside = tmp_path / where, [False]

        def other(output=output, inside=inside):
            if not inside[0]:
                inside[0] = True
                assert prepare(made, tmp_path / "x", output)[0] == 0
                assert not list(output.rglob("*.partial*"))

        with monkeypatch.context() as patch:
            if where == "shard":
                encode = MomentEncoder.__call__
                patch.setattr(MomentEncoder, "__call__", lambda self, x, e=encode, o=other: (e(self, x), o())[0])
                made_of = shard_writer._tar_writer

                def begun(file, made_of=made_of, other=other):  # the partial file is there
                    other()
                    return made_of(file)

                patch.setattr(shard_writer, "_tar_writer", begun)
            else:
                fsync = os.fsync

                def synced(number, fsync=fsync, other=other, output=output):
                    if list(output.glob("parts/unit-*.partial*")):
                        other()
                    fsync(number)

                patch.setattr(atomic.os, "fsync", synced)
            status, said = prepare(made, tmp_path / "x", output)
            assert status == 0, said
        assert inside[0]
        assert mfm("prepare-latents", "--verify", "--output", output)[0] == 0
        assert len(moments(output)) == 3


# -- stops -------------------------------------------------------------------------------------------------------------


def stopped(work, number: int, begun, after: float = 0.0) -> tuple[int, float]:
    """Status of a process that is sent a signal once `begun()`, and the seconds that it took to end."""
    process = forked(work)
    try:
        limit = time.monotonic() + 60
        while not begun() and time.monotonic() < limit and process.is_alive():
            time.sleep(0.01)
        time.sleep(after)
        os.kill(process.pid, number)
        begin = time.monotonic()
        return ended(process), time.monotonic() - begin
    finally:
        if process.is_alive():
            process.kill()


def said_by(work, path: Path) -> object:
    """The work with its standard error in a file."""

    def run():
        with open(path, "a") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            work()

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", ["prepare-latents", "sample"])
def test_a_stop_is_a_line_and_the_same_command_goes_on(command, number, made, model, tmp_path, monkeypatch):
    output = tmp_path / "out"
    if command == "prepare-latents":
        for i in range(20):
            save(tmp_path / "x/c" / f"{i}.png", picture(20, i))
        encode = MomentEncoder.__call__
        monkeypatch.setattr(MomentEncoder, "__call__", lambda *args: (time.sleep(0.3), encode(*args))[1])
        arguments = ["--input", tmp_path / "x", "--vae", made / "vae", "--image-size", 16, "--shard-size", 4]
        arguments = [*arguments, "--batch-size", 2, "--threads", 2]
    else:
        draw = outputs.PNGFolder.write
        monkeypatch.setattr(outputs.PNGFolder, "write", lambda *args: (time.sleep(0.3), draw(*args))[1])
        arguments = [model, "--num-samples", 20, "--batch-size", 2, "--steps", 1]
    line = [command, *map(str, arguments), "--output", str(output), "--device", "cpu"]
    kind = "tar" if command == "prepare-latents" else "png"
    work = said_by(lambda: main(line), tmp_path / "said")
    status, seconds = stopped(work, number, lambda: any(output.glob(f"*.{kind}")))
    said = (tmp_path / "said").read_text()
    assert status == 128 + number, said
    assert seconds < 5
    assert "Traceback" not in said
    assert f"mfm: stopped by {number.name}: the same command goes on with what is missing" in said
    assert not list(output.rglob("*.partial*"))
    there = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.glob(f"*.{kind}")}
    assert 0 < len(there) < (5 if kind == "tar" else 20)
    monkeypatch.undo()
    main(line)
    assert all(path.read_bytes() == content for path, (_, content) in there.items())
    # a batch of samples that was half written is drawn again
    assert sum(path.stat().st_mtime_ns != when for path, (when, _) in there.items()) <= (kind == "png")
    assert len(list(output.glob(f"*.{kind}"))) == (5 if kind == "tar" else 20)


def test_a_long_operation_does_not_hold_up_a_stop(tmp_path, monkeypatch):
    """One that does not come back to Python, such as a kernel: here C waits for a signal that nobody sends."""
    monkeypatch.setattr(stopping, "GRACE", 0.5)

    def work():
        libc, signals = ctypes.CDLL(None), (ctypes.c_ulong * 16)(1 << (signal.SIGUSR2 - 1))
        with stoppable("begin anew"):
            (tmp_path / "begun").touch()
            libc.sigwait(ctypes.byref(signals), ctypes.byref(ctypes.c_int()))

    path = tmp_path / "said"
    status, seconds = stopped(said_by(work, path), signal.SIGTERM, (tmp_path / "begun").exists, after=0.3)
    assert status == 128 + signal.SIGTERM
    assert seconds < 5
    assert path.read_text() == "mfm: stopped by SIGTERM: begin anew\n"


def test_handlers_are_as_they_were(tmp_path):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    threads = threading.active_count()
    for _ in range(3):
        with stoppable("x"):
            assert signal.getsignal(signal.SIGTERM) is not before[1]

    def is_stopped():
        with stoppable("x"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(Stopped) as stop:
        is_stopped()
    assert stop.value.code == 143
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert threading.active_count() == threads
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with stoppable("x"):
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before[2])


@pytest.mark.long
@pytest.mark.slow
def test_worker_processes_end_with_their_command(made, tmp_path):
    """At Ctrl-C, which a terminal sends to all of the group; they do not hear it, and are ended."""
    for i in range(200):
        save(tmp_path / "x/c" / f"{i}.png", picture(20, i))
    output = tmp_path / "out"
    line = [
        "prepare-latents", "--input", tmp_path / "x", "--vae", made / "vae", "--image-size", 256, "--shard-size", 4,
        "--batch-size", 2, "--threads", 1, "--device", "cpu", "--num-workers", 2, "--output", output,
    ]  # fmt: skip
    command = [sys.executable, "-m", "mfm_lightning", *map(str, line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=said, stdout=subprocess.DEVNULL, start_new_session=True
        )
        limit = time.monotonic() + 120
        while not list(output.glob("*.tar")) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        children = _children(process.pid)
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=60)
    text = (tmp_path / "said").read_text()
    assert (status, "Traceback" in text) == (128 + signal.SIGINT, False), text
    assert time.monotonic() - begin < 5
    assert len(children) >= 2
    time.sleep(0.2)
    assert not [child for child in children if os.path.exists(f"/proc/{child}/exe") and _alive(child)]
    assert not (output / INDEX).exists()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False
