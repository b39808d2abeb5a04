"""A run's folder is one run's."""

import csv
import os
import signal
import time
from pathlib import Path

import pytest

from mfm_lightning.modules import MFMPretraining
from mfm_lightning.utils.folder_lock import LOCK, FolderInUseError, FolderLock
from tests.inputs.tiny_runs import fit, last
from tests.processes import ended, forked


def waiting(place: Path) -> None:
    step = MFMPretraining.training_step

    def slow(self, batch, batch_idx):
        (place / "trains").touch()
        time.sleep(0.2)
        return step(self, batch, batch_idx)

    MFMPretraining.training_step = slow
    fit("run", 200)


def when_it_trains(place: Path):
    process = forked(waiting, place)
    while not (place / "trains").exists():
        assert process.is_alive()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("options", [[], ["--ckpt_path=last"], ["--overwrite"]])
def test_two_runs_in_one_folder(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    process = when_it_trains(tmp_path)
    with pytest.raises(FolderInUseError, match=rf"run is being written to by mfm fit, process {process.pid} on"):
        fit("run", 2, *options)
    fit("other", 2)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    fit("run", 2, "--ckpt_path=last")  # the lock died with its owner
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_fresh_run_does_not_write_over_a_longer_one(tmp_path, monkeypatch):
    """Also where there is no model yet, for the run was stopped."""
    monkeypatch.chdir(tmp_path)
    fit("run", 6)
    Path("run/model.safetensors").unlink()
    fit("other", 2)
    for options in ([], ["--ckpt_path=other/last.ckpt"]):
        with pytest.raises(FileExistsError, match=r"run/last\.ckpt is of a run that was trained so far.*--overwrite"):
            fit("run", 4, *options)
        assert last("run")["global_step"] == 6
    fit("run", 7, f"--ckpt_path={tmp_path}/run/last.ckpt")  # its own, by another spelling
    assert last("run")["global_step"] == 7
    fit("run", 4, "--ckpt_path=other/last.ckpt", "--overwrite")
    assert last("run")["global_step"] == 4
    fit("run", 2, "--overwrite")
    assert last("run")["global_step"] == 2


def test_a_refused_run_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 2)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError):
        fit("run", 4)
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [95, 38, 37], ids=["EOPNOTSUPP", "ENOSYS", "ENOLCK"])
def test_a_lock_where_there_is_no_flock(tmp_path, monkeypatch, number):
    """A file with the owner's process in its place; one of a process that is gone is taken over."""
    import fcntl

    def missing(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)
    first, second = FolderLock(tmp_path, "mfm fit"), FolderLock(tmp_path, "mfm fit")
    first.acquire()
    with pytest.raises(FolderInUseError, match=str(os.getpid())):
        second.acquire()
    first.release()
    process = forked(lambda: (FolderLock(tmp_path, "mfm fit").acquire(), os.kill(os.getpid(), signal.SIGKILL)))
    assert ended(process) == -signal.SIGKILL
    second.acquire()
    second.release()


def test_going_on_from_elsewhere_is_beginning_anew_here(tmp_path, monkeypatch):
    """A finished model stays, and the rows of another run do not pass for this one's."""
    monkeypatch.chdir(tmp_path)
    fit("one", 2)
    fit("two", 3)
    Path("two/last.ckpt").unlink()
    before = Path("two/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"two/model\.safetensors is of a finished run"):
        fit("two", 4, "--ckpt_path=one/last.ckpt")
    assert Path("two/model.safetensors").read_bytes() == before
    Path("two/model.safetensors").unlink()
    old = Path("two/logs/csv/metrics.csv").read_text()
    fit("two", 4, "--ckpt_path=one/last.ckpt")
    assert Path("two/logs/csv/metrics.before.csv").read_text() == old
    with open("two/logs/csv/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3"]


def test_last_without_a_checkpoint_moves_nothing_before_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 2)
    Path("run/last.ckpt").unlink()
    old = Path("run/logs/csv/metrics.csv").read_text()
    with pytest.raises(FileExistsError, match="is of a finished run"):
        fit("run", 4, "--ckpt_path=last")
    assert Path("run/logs/csv/metrics.csv").read_text() == old
