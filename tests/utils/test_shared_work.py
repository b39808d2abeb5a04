"""Work that processes share: all of it, once, whoever dies."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest

from mfm_benchmarks.claiming import simulate
from mfm_lightning.utils import shared_work
from mfm_lightning.utils.atomic import whole_file
from mfm_lightning.utils.leases import Leases
from mfm_lightning.utils.shared_work import DEATHS, Board, Piece, share

# piece k adds k to what it needs: the pieces before it of the same remainder by 5
PIECES = [Piece(f"p{k}", f"piece {k}", (f"p{k - 5}",) if k >= 5 else ()) for k in range(40)]
VALUES = {f"p{k}": sum(range(k % 5, k + 1, 5)) for k in range(40)}


def work(folder, log, seconds=0.0, pieces=PIECES, fail=(), lease=120.0):
    """As a process does it; `log` has a line for each piece that was finished."""

    def do(piece, held):
        time.sleep(seconds)
        if piece.key in fail:
            raise ValueError("no luck")
        value = int(piece.key[1:]) + sum(json.loads((folder / f"{n}.json").read_text())["value"] for n in piece.needs)
        if not held.is_held:
            return
        with whole_file(folder / f"{piece.key}.json") as partial:
            partial.write_text(json.dumps({"value": value}))
        with open(log, "a") as file:  # one write of a short line is whole
            file.write(f"{piece.key} {os.getpid()}\n")

    share(pieces, Board(folder), Leases(folder / "claims", lease), do)


def values(folder):
    return {path.stem: json.loads(path.read_text())["value"] for path in folder.glob("*.json")}


def test_one_process_does_all_in_order(tmp_path):
    work(tmp_path / "results", tmp_path / "log")
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == [p.key for p in PIECES]
    assert values(tmp_path / "results") == VALUES
    work(tmp_path / "results", tmp_path / "log")
    assert len((tmp_path / "log").read_text().splitlines()) == len(PIECES)


def test_kills_at_any_moment_lose_and_double_nothing(tmp_path):
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    folder, log = tmp_path / "results", tmp_path / "log"
    pieces = [*PIECES, *(Piece(f"p{k}", f"piece {k}") for k in range(40, 600))]

    def begin():
        process = context.Process(target=work, args=(folder, log, 0.03, pieces))
        process.start()
        return process

    running, kills = [begin() for _ in range(4)], 0
    while kills < 20 and any(process.is_alive() for process in running):
        time.sleep(chance.uniform(0.0, 0.12))
        victim = chance.randrange(len(running))
        if running[victim].is_alive():
            os.kill(running[victim].pid, signal.SIGKILL)
            running[victim].join()
            kills += 1
            running[victim] = begin()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert kills == 20
    assert values(folder) == VALUES | {f"p{k}": k for k in range(40, 600)}
    finished = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(finished) == len(set(finished))  # a kill between the file and the line leaves one line out
    assert len(finished) >= len(pieces) - kills
    assert not list((folder / "claims").glob("*.lease"))


def test_a_failure_is_tried_again_by_another_run_and_what_needs_it_is_left(tmp_path):
    folder = tmp_path / "results"
    work(folder, tmp_path / "log", fail=("p7",))
    lost = {"p7", "p12", "p17", "p22", "p27", "p32", "p37"}
    assert values(folder) == {key: value for key, value in VALUES.items() if key not in lost}
    assert Board(folder).failure("p7") == "ValueError: no luck"
    assert Board(folder).look().failed.keys() == {"p7"}
    work(folder, tmp_path / "log")
    assert values(folder) == VALUES
    assert not Board(folder).look().failed


def test_a_failure_of_a_process_beside_is_not_tried_again(tmp_path):
    folder, begun = tmp_path / "results", []

    def do(piece, held):
        begun.append(piece.key)
        if piece.key == "p0":  # while we are at the first, another process fails at the second
            Board(folder).fail(PIECES[1], "of another process")
        (folder / f"{piece.key}.json").write_text("{}")

    folder.mkdir()
    share([PIECES[0], PIECES[1], PIECES[2]], Board(folder), Leases(folder / "claims"), do)
    assert begun == ["p0", "p2"]


def test_what_kills_every_process_fails_in_the_end(tmp_path, monkeypatch):
    folder, context = tmp_path / "results", multiprocessing.get_context("fork")

    def die(piece, held):
        if piece.key == "p1":
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / f"{piece.key}.json").write_text("{}")

    def begin():
        share(PIECES[:3], Board(folder), Leases(folder / "claims"), die)

    folder.mkdir()
    codes = []
    for _ in range(DEATHS + 1):
        process = context.Process(target=begin)
        process.start()
        process.join(60)
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * DEATHS + [0]
    assert "3 processes ended while they were at it" in Board(folder).failure("p1")
    assert Board(folder).look().done == {"p0", "p2"}


def test_an_interrupt_gives_back_what_was_begun(tmp_path):
    folder = tmp_path / "results"

    def do(piece, held):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share(PIECES, Board(folder), Leases(folder / "claims"), do)
    assert not list((folder / "claims").glob("*.lease"))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("a", "A"), Piece("a", "B")], "two pieces of work are called a"),
        ([Piece("a", "A", ("b",)), Piece("b", "B")], "A needs b, which is no piece of work before it"),
    ],
)
def test_work_that_cannot_be_done_in_its_order_is_refused(tmp_path, pieces, message):
    with pytest.raises(ValueError, match=message):
        share(pieces, Board(tmp_path), Leases(tmp_path / "claims"), lambda piece, held: None)


@pytest.mark.parametrize("processes", [48, pytest.param(512, marks=pytest.mark.long)])
def test_many_processes_do_each_cell_once_and_ask_little_of_the_file_system(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(shared_work, "LATEST", 1.0)
    cells = 4 * processes
    found = simulate(tmp_path / "results", processes, cells, seconds=0.2)
    assert (found["cells"], found["done"], found["failed"], found["left"]) == (cells, cells, 0, 0)
    # 12 for one process alone (whole_file's are 6 of them); without the random choice it is over 100
    assert sum(found["operations"].values()) < 60


def test_what_needs_a_piece_that_was_taken_over_waits_for_who_has_it(tmp_path):
    leases, begun = Leases(tmp_path / "claims", 5.0), []
    first, second = Piece("a", "a"), Piece("b", "b", ("a",))

    def finish():  # the other process, on another machine
        (tmp_path / "a.json").write_text("{}")
        for generation in range(2):
            leases.path("a", generation).unlink(missing_ok=True)

    other = threading.Timer(0.5, finish)

    def do(piece, held):
        begun.append(piece.key)
        if piece.key == "a":
            leases.path("a", 1).write_text("{}")
            other.start()
            assert not held.is_held
            return
        assert (tmp_path / "a.json").is_file()
        (tmp_path / "b.json").write_text("{}")

    share([first, second], Board(tmp_path), leases, do)
    other.join()
    assert begun == ["a", "b"]
    assert not Board(tmp_path).look().failed


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b""])
def test_a_note_of_a_failure_that_cannot_be_read_is_none(tmp_path, content):
    board = Board(tmp_path / "results")
    board.fail(PIECES[0], "no luck")
    (board.failures / "p0.json").write_bytes(content)
    assert board.failure("p0") == ""
    work(tmp_path / "results", tmp_path / "log", pieces=PIECES[:1])
    assert board.look().done == {"p0"}
