"""Leases: one owner at a time, and the end of dead ones."""

import errno
import gc
import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mfm_lightning.utils.leases import BEATS, Holder, Leases, alone, machine


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_one_has_a_piece_until_it_gives_it_back(tmp_path):
    ours, theirs = Leases(tmp_path / "claims", device="cuda:3"), Leases(tmp_path / "claims")
    with ours.claim("a") as lease:
        assert lease.is_held
        assert theirs.claim("a") is None
        assert theirs.claim("b") is not None
        holder = theirs.holders()["a"]
        assert (holder.process, holder.device, holder.generation) == (os.getpid(), "cuda:3", 0)
        assert not holder.is_gone
        assert theirs.claimed() == {"a", "b"}
    assert not lease.is_held
    assert theirs.claim("a").generation == 0
    assert ours.claim("a") is None


def test_a_lease_lapses_for_who_watched_it_for_its_length(tmp_path):
    clock = Clock()
    ours, theirs, third = (Leases(tmp_path, 100.0, clock=clock) for _ in range(3))
    lease = ours.claim("a")
    # another machine's: whether the process is there cannot be told from here
    path = ours.path("a")
    path.write_text(path.read_text().replace(f'"machine": "{machine()}"', '"machine": "another"'))
    assert theirs.claim("a") is None  # from here on it is watched
    for clock.now in (40.0, 80.0, 99.0):
        assert theirs.claim("a") is None
        assert theirs.at_work() == {"a"}
    assert third.claim("a") is None  # begins to watch late
    os.utime(path, (5, 5))  # a sign
    clock.now = 101.0
    assert theirs.claim("a") is None
    for clock.now in (140.0, 180.0, 200.0):
        assert theirs.claim("a") is None
    clock.now = 205.0
    assert theirs.at_work() == set()
    assert third.at_work() == {"a"}
    taken = theirs.claim("a")
    assert taken.generation == 1
    assert taken.is_held
    assert not lease.is_held
    assert third.claim("a") is None
    lease.release()  # by the one that had it: the taker keeps it
    assert taken.is_held
    assert ours.claim("a") is None
    taken.release()
    assert not list(tmp_path.glob("*.lease"))
    del ours, theirs, third, lease, taken
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_who_did_not_look_for_long_has_not_watched(tmp_path):
    """A process that was stopped for longer than the lease, or cut off from the files with all others."""
    clock = Clock()
    ours, theirs = (Leases(tmp_path, 100.0, clock=clock) for _ in range(2))
    ours.claim("a")
    path = ours.path("a")
    path.write_text(path.read_text().replace(f'"machine": "{machine()}"', '"machine": "another"'))
    assert theirs.claim("a") is None
    clock.now = 500.0
    assert theirs.claim("a") is None
    for clock.now in (540.0, 580.0, 600.0):
        assert theirs.claim("a") is None
    clock.now = 601.0
    assert theirs.claim("a").generation == 1


def test_without_links_a_file_is_made_for_each_claim(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", none)
    ours, theirs = Leases(tmp_path), Leases(tmp_path)
    with ours.claim("a") as lease:
        assert theirs.claim("a") is None
        assert lease.is_held
        assert theirs.holders()["a"].process == os.getpid()
    assert theirs.claim("a") is not None


def test_a_file_that_its_owner_was_killed_writing_lapses_too(tmp_path):
    clock = Clock()
    leases = Leases(tmp_path, 100.0, clock=clock)
    leases.path("a").touch()
    assert leases.claim("a") is None
    for clock.now in (40.0, 80.0, 100.0):
        assert leases.claim("a") is None
    clock.now = 101.0
    assert leases.claim("a").generation == 1


def _hold(folder, held, end):
    with Leases(folder).claim("a"):
        held.set()
        end.wait()


@pytest.mark.parametrize("collected", [False, True])  # a zombie, which nobody has waited for, is dead, too
def test_of_a_process_of_this_machine_that_was_killed_it_lapses_at_once(tmp_path, collected):
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, end))
    process.start()
    assert held.wait(30)
    leases = Leases(tmp_path)
    assert leases.claim("a") is None
    os.kill(process.pid, signal.SIGKILL)
    if collected:
        process.join()
    deadline = time.monotonic() + 30
    while leases.at_work() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leases.holders()["a"].process == process.pid
    while (lease := leases.claim("a")) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lease.generation == 1
    process.join()


def test_what_is_held_gives_signs(tmp_path):
    leases = Leases(tmp_path, seconds=0.4)
    with leases.claim("a"):
        os.utime(leases.path("a"), (5, 5))
        deadline = time.monotonic() + 30
        while leases.holders()["a"].seen == 5 and time.monotonic() < deadline:
            time.sleep(0.4 / BEATS)
        assert leases.holders()["a"].seen > 5


def test_what_one_does_the_others_wait_for(tmp_path):
    mark, begun = tmp_path / "done", []
    for _ in alone(Leases(tmp_path / "claims"), "fit", mark.exists):
        begun.append(1)
        mark.touch()
    for _ in alone(Leases(tmp_path / "claims"), "fit", mark.exists):
        begun.append(2)
    assert begun == [1]


def test_a_length_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="above 0"):
        Leases(tmp_path, 0.0)


def _left_by_a_dead_process(path):
    path.write_text(json.dumps(asdict(Holder("dead", "here", os.getpid(), machine(), birth="1"))))


def test_who_died_giving_a_piece_back_leaves_one_that_can_be_had(tmp_path):
    # it had taken the piece over, and came to remove the first generation, but not its own
    leases = Leases(tmp_path)
    _left_by_a_dead_process(leases.path("a", 1))
    assert leases.claim("a", take_over=False) is None
    with leases.claim("a") as lease:
        assert lease.is_held
        assert Leases(tmp_path).claim("a") is None
    assert not leases.claimed()
    # one that is alive is only on its way
    with Leases(tmp_path).claim("a"):
        leases.path("a", 0).rename(leases.path("a", 1))
        assert leases.claim("a") is None
        assert [path.name for path in tmp_path.glob("*.lease")] == ["a~1.lease"]


def test_a_link_whose_answer_was_lost_counts(tmp_path, monkeypatch):
    link = os.link

    def made_twice(source, path):  # as NFS does it: the first answer is lost, the second says that it is there
        link(source, path)
        link(source, path)

    monkeypatch.setattr(os, "link", made_twice)
    leases = Leases(tmp_path)
    with leases.claim("a") as lease:
        assert lease.is_held
        assert leases.claim("a") is None
        assert Leases(tmp_path).claim("a") is None
    assert not leases.claimed()


def test_a_lease_that_is_removed_while_it_is_read_is_none(tmp_path, monkeypatch):
    leases = Leases(tmp_path)
    with leases.claim("a") as lease:
        read = Path.read_text

        def stale(path, *args, **kwargs):
            if path.suffix == ".lease":
                raise OSError(errno.ESTALE, "Stale file handle")
            return read(path, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", stale)
        assert not lease.is_held
        assert leases.holders() == {}
        monkeypatch.undo()
