"""Pieces of work that any number of processes do together: each is done once, whoever dies.

A piece is done when its file is there. Processes know nothing of each other but the files: they may begin and end at
any time, on any machine that sees the folder.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mfm_lightning.utils.atomic import save_json
from mfm_lightning.utils.leases import Lease, Leases

log = logging.getLogger(__name__)
DEATHS = 3  # processes that a piece may take with it before it counts as failed
SHARE = 0.005  # of the time goes into looking at the folder, at most
SOONEST, LATEST = 0.2, 10.0  # seconds between looks of a process that waits
MISSES = 3  # pieces found taken or done, after which the last look is too old
WATCHED = 8  # pieces of others that a process which waits watches at a time, to take them over


@dataclass(frozen=True)
class Piece:
    """Attributes:
    key: the name of its file, without the ending.
    name: as people read it.
    needs: keys of pieces that must be done first.
    """

    key: str
    name: str
    needs: tuple[str, ...] = ()


@dataclass
class Look:
    """What a look at the folder found: keys `done`, and of those that failed the failures' own numbers."""

    done: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


class Board:
    """What of the work is done, and what failed: files of a folder.

    Args:
        folder: with a `KEY.json` for each piece that is done; failures are in its `failures/`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.failures = Path(folder), Path(folder) / "failures"

    def look(self) -> Look:
        """All of it, by reading two folders."""
        return Look(set(_keys(self.folder)), {key: self._note(key).get("id", "") for key in _keys(self.failures)})

    def is_done(self, key: str) -> bool:
        return (self.folder / f"{key}.json").is_file()

    def failure(self, key: str) -> str:
        """What went wrong with a piece; empty where nothing did."""
        return str(self._note(key).get("error", ""))

    def number(self, key: str) -> str:
        """Of the failure: another one for each time; empty where there is none."""
        return str(self._note(key).get("id", ""))

    def _note(self, key: str) -> dict[str, str]:
        try:
            note = json.loads((self.failures / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def fail(self, piece: Piece, error: str) -> None:
        """Write down what went wrong."""
        note = {"piece": piece.name, "error": error, "id": uuid.uuid4().hex, "host": socket.gethostname()}
        save_json(note, self.failures / f"{piece.key}.json")

    def forgive(self, key: str) -> None:
        """It is done after all."""
        (self.failures / f"{key}.json").unlink(missing_ok=True)


def _keys(folder: Path) -> list[str]:
    try:
        return [name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json")]
    except FileNotFoundError:
        return []


def share(
    pieces: Sequence[Piece],
    board: Board,
    leases: Leases,
    do: Callable[[Piece, Lease], None],
    watch: Callable[[Look, Piece | None], None] = lambda look, piece: None,
    can_begin: Callable[[Piece], bool] = lambda piece: True,
) -> None:
    """Do pieces that nobody does, until all are done or have failed, by this process or others.

    A failure of an earlier run is tried again, one of a process that runs beside this one is not. Pieces that need one
    that failed are left. What a process was at when it died is done by another, unless `DEATHS` died of it.

    Args:
        pieces: in the order in which one process alone does them.
        do: makes the piece's file, unless the lease is not held any more; an Exception is a failure, and noted.
        watch: told what is done, and which piece this process begins (None: it waits for others).
        can_begin: whether a piece can be begun now; one that cannot is looked at again.

    Raises:
        ValueError: for two pieces of one key, or a need that is no piece before its own.
    """
    known: set[str] = set()
    for piece in pieces:
        if piece.key in known:
            raise ValueError(f"two pieces of work are called {piece.key}")
        if missing := [need for need in piece.needs if need not in known]:
            raise ValueError(f"{piece.name} needs {missing[0]}, which is no piece of work before it")
        known.add(piece.key)
    earlier = board.look().failed
    mine: set[str] = set()  # that failed here
    choice, wait = _Choice(leases), SOONEST
    while True:
        begin = time.monotonic()
        look = board.look()
        choice.look()
        took = time.monotonic() - begin
        failed = {key for key, number in look.failed.items() if key in mine or earlier.get(key) != number}
        worked = False
        while True:
            left = _left(pieces, look.done, failed)
            if not left:
                watch(look, None)
                return
            ready = [piece for piece in left if all(need in look.done for need in piece.needs) and can_begin(piece)]
            if (claimed := choice.claim(ready)) is None:
                break
            piece, lease = claimed
            with lease:
                if board.is_done(piece.key):
                    look.done.add(piece.key)
                    choice.misses += 1
                elif (number := board.number(piece.key)) and (piece.key in mine or earlier.get(piece.key) != number):
                    failed.add(piece.key)
                elif lease.generation >= DEATHS:
                    board.fail(
                        piece, f"{lease.generation} processes ended while they were at it, without a word (killed?)"
                    )
                    failed.add(piece.key)
                    mine.add(piece.key)
                else:
                    if lease.generation:
                        log.info("%s: taken over from a process that gives no sign", piece.name)
                    watch(look, piece)
                    worked = True
                    try:
                        do(piece, lease)
                    except Exception as error:  # whatever it is, the others go on
                        log.warning("%s failed, the others go on: %s: %s", piece.name, type(error).__name__, error)
                        board.fail(piece, f"{type(error).__name__}: {error}")
                        failed.add(piece.key)
                        mine.add(piece.key)
                    else:
                        if not board.is_done(piece.key):  # it was overtaken, and another is at it
                            choice.misses = MISSES + 1
                        else:
                            board.forgive(piece.key)
                            look.done.add(piece.key)
                    watch(look, None)
            if choice.misses > MISSES or time.monotonic() - begin > max(SOONEST, took / SHARE):
                break
        if worked or choice.misses:
            wait = SOONEST
            continue
        watch(look, None)
        time.sleep(wait)
        wait = min(wait * 1.5, LATEST, leases.seconds / 4)


def _left(pieces: Sequence[Piece], done: Collection[str], failed: Collection[str]) -> list[Piece]:
    """Those to be done; without what needs one that failed."""
    lost, left = set(failed), []
    for piece in pieces:
        if piece.key in done or piece.key in lost:
            continue
        if any(need in lost for need in piece.needs):
            lost.add(piece.key)
        else:
            left.append(piece)
    return left


class _Choice:
    """Which piece a process takes next: one that is free, else one whose process has died."""

    def __init__(self, leases: Leases) -> None:
        self._leases, self._taken, self._watched = leases, set[str](), list[str]()
        self.misses = 0  # since the last look

    def look(self) -> None:
        """See what others have."""
        self._taken, self.misses = self._leases.claimed(), 0

    def claim(self, ready: Sequence[Piece]) -> tuple[Piece, Lease] | None:
        """A piece and its lease; None where others have all of them, or so many that it is time for another look.

        The first that is free; where others work, one of the first some, so that not all run for the same.
        """
        free = [piece for piece in ready if piece.key not in self._taken]
        window = 1 + 2 * len(self._taken)
        while free:
            piece = free.pop(random.randrange(min(window, len(free))))
            if (lease := self._leases.claim(piece.key, take_over=False)) is not None:
                return piece, lease
            self._taken.add(piece.key)
            self.misses += 1
            if self.misses > MISSES:
                return None
            window *= 4  # there are more of us than it seemed
        # a few, and the same until they are done: to see that a lease lapses takes its whole length
        others = {piece.key: piece for piece in ready}
        watched = [key for key in self._watched if key in others]
        more = [key for key in others if key not in watched]
        self._watched = watched + random.sample(more, min(len(more), WATCHED - len(watched)))
        for key in self._watched:
            if (lease := self._leases.claim(key)) is not None:
                return others[key], lease
        return None
