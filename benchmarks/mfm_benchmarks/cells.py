"""Computes a suite's cells, beside any number of other processes that compute the same, and collects their outcomes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.store import Store
from mfm_benchmarks.suite import Cell, Results, Suite
from mfm_lightning.utils.atomic import whole_file
from mfm_lightning.utils.console import progress_bar
from mfm_lightning.utils.leases import Lease, Leases, alone
from mfm_lightning.utils.shared_work import Board, Look, Piece, share

log = logging.getLogger(__name__)
CLAIMS = "claims"  # in the folder of results: who does what
PLAN = "work.json"  # there: what there is to do


def leases_of(store: Store, seconds: float = 120.0) -> Leases:
    """The leases of a folder of results."""
    return Leases(store.folder / CLAIMS, seconds, store.shared.get("device", ""))


def compute(
    suite: Suite,
    store: Store,
    fresh: bool = False,
    leases: Leases | None = None,
    command: str = "",
    only: str | None = None,
) -> tuple[Results, float]:
    """Outcomes of all cells, and the seconds that they took when they were computed.

    Other processes may compute the same at the same time: each cell is computed by one, whose death another makes good.
    A cell that fails is noted, and so are those that need it; the others go on. What is done is kept when the run is
    interrupted.

    Args:
        fresh: forget what is stored, and the trainings of methods, first.
        command: what was typed, for `--status`.
        only: compute only cells whose names begin with this, `*` standing for anything, and what they need; all where
            None.

    Raises:
        ValueError: for two cells of one name, `fresh` while another process computes them, or an `only` that no name
            begins with.
    """
    cells = list(suite.cells())
    if len({cell.name for cell in cells}) < len(cells):
        names = [cell.name for cell in cells]
        raise ValueError(f"cells of one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    leases, board = leases or leases_of(store), Board(store.folder)
    chosen = cells if only is None else _beginning_with(only, cells)
    if fresh:
        _forget(chosen, store, leases)
    if not leases.claimed():
        _remove_damaged(cells, store)
    work = _Work(suite, chosen, store, leases)
    work.write_plan(command)
    while True:
        with work.progress():
            share(work.pieces, board, leases, work.do, work.watch, work.can_begin)
        results = collect(cells, store)
        if not results.missing or not _remove_damaged(cells, store):
            break
    results.stored = len(results) - len(work.computed)
    where = f"{results.stored} of {len(cells)} results were there already, in {store.folder}"
    log.info("%s%s", where, " (--fresh computes them again)" if results.stored else "")
    if results.failures:
        log.warning("%d results failed", len(results.failures))
    return results, results.seconds


def collect(cells: Sequence[Cell], store: Store) -> Results:
    """What is there of the cells' outcomes, what failed, and what is missing."""
    results, board = Results(), Board(store.folder)
    for cell in cells:
        if (outcome := store.load(cell)) is not None:
            results.add(cell, outcome)
            results.seconds += outcome.numbers.get("cell_seconds", 0.0)
        elif error := board.failure(store.key(cell)):
            results.failures[cell.name] = error
        elif lost := [need.name for need in cell.needs if need.name in results.failures]:
            results.failures[cell.name] = f"needs {', '.join(lost)}, which failed"
        else:
            results.missing.append(cell.name)
    results.stored = len(results)
    return results


class _Work:
    """The cells as pieces of work."""

    def __init__(self, suite: Suite, cells: Sequence[Cell], store: Store, leases: Leases) -> None:
        self.suite, self.store, self.leases = suite, store, leases
        self.by_name = {cell.name: cell for cell in cells}
        self._by_key = {store.key(cell): cell for cell in cells}
        self.pieces = [
            Piece(key, cell.name, tuple(store.key(need) for need in cell.needs)) for key, cell in self._by_key.items()
        ]
        self.computed: set[str] = set()
        self._fitted: set[str] = set()
        self._failed_fits: dict[str, str] = {}  # their words, by the training's lease
        self._looked, self._taken = 0.0, frozenset[str]()
        self._bar, self._task = progress_bar(), None

    def write_plan(self, command: str) -> None:
        """What there is to do, for `mfm benchmark --status`, which loads no model."""
        plan = {
            "suite": self.suite.name or type(self.suite).__name__,
            "command": command,
            "cells": {piece.key: piece.name for piece in self.pieces},
        }
        text = json.dumps(plan, indent=1)
        path = self.leases.folder / PLAN
        if not path.is_file() or path.read_text() != text:
            with whole_file(path) as partial:
                partial.write_text(text)

    @contextmanager
    def progress(self) -> Iterator[None]:
        self._bar = progress_bar()
        with self._bar:
            self._task = self._bar.add_task("", total=len(self.pieces))
            yield

    def watch(self, look: Look, piece: Piece | None) -> None:
        if self._task is None:
            return
        done = len(look.done & self._by_key.keys())
        self._bar.update(self._task, completed=done, description=piece.name if piece else "waiting for other processes")

    def can_begin(self, piece: Piece) -> bool:
        """Not while another process runs the training that the cell needs: there are other cells."""
        fit = self._by_key[piece.key].fit
        if fit is None or fit.file in self._fitted:
            return True
        if (now := time.monotonic()) - self._looked > 1.0:
            self._looked, self._taken = now, frozenset(self.leases.at_work())
        return key_of_fit(fit) not in self._taken or self._is_done(fit)

    def _is_done(self, fit: Fit) -> bool:
        if fit.file not in self._fitted and fit.is_done():
            self._fitted.add(fit.file)
        return fit.file in self._fitted

    def do(self, piece: Piece, lease: Lease) -> None:
        """Compute a cell and store its outcome."""
        cell, store = self._by_key[piece.key], self.store
        begin = time.monotonic()
        if cell.fit is not None:
            self._fit(cell.fit)
        needed = [store.load(need) for need in cell.needs]
        if lost := [need.name for need, outcome in zip(cell.needs, needed, strict=True) if outcome is None]:
            raise ValueError(f"the stored result of {lost[0]} cannot be read: run again, which makes it anew")
        with self._alone_on_the_machine(cell):
            # whatever a cell takes from the global generator is its own, whoever computes it and in which order
            torch.manual_seed(int(hashlib.sha256(piece.key.encode()).hexdigest()[:15], 16))
            try:
                outcome = cell.compute(*needed)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                raise
        outcome.commit = store.commit
        outcome.numbers["cell_seconds"] = time.monotonic() - begin
        outcome.tensors = {name: tensor.detach().cpu() for name, tensor in outcome.tensors.items()}
        if not lease.is_held:
            log.warning("%s: another process took it over, after no sign of this one; its result counts", cell.name)
            return
        store.save(cell, outcome)
        self.computed.add(cell.name)

    def _fit(self, fit: Fit) -> None:
        """Have it run, by this process or by another that has begun."""
        key = key_of_fit(fit)
        if key in self._failed_fits:  # not for each cell again: it would take as long, and fail as it did
            raise RuntimeError(f"its training failed before in this run ({fit.file}): {self._failed_fits[key]}")
        self._bar.stop()  # the training has a bar of its own
        try:
            for _ in alone(self.leases, key, lambda: self._is_done(fit)):
                fit.run(self.suite.device)
        except Exception as error:
            self._failed_fits[key] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._bar.start()

    @contextmanager
    def _alone_on_the_machine(self, cell: Cell) -> Iterator[None]:
        """Where a cell measures time: one of them at a time on a machine."""
        if not cell.alone:
            yield
            return
        for _ in alone(self.leases, f"timing-on-{os.uname().nodename}", lambda: False, wait=0.2):
            yield


def _beginning_with(only: str, cells: Sequence[Cell]) -> list[Cell]:
    """The cells whose names begin so, `*` standing for anything, and those that they need, in their order."""
    pattern = re.compile(".*".join(map(re.escape, only.split("*"))))
    wanted = {cell.name for cell in cells if pattern.match(cell.name)}
    if not wanted:
        names = ", ".join(cell.name for cell in cells[:3])
        raise ValueError(f"--only {only!r}: no result has a name that begins so; the names are {names}, ...")
    for cell in reversed(cells):  # what a cell needs comes before it
        if cell.name in wanted:
            wanted |= {need.name for need in cell.needs}
    return [cell for cell in cells if cell.name in wanted]


def key_of_fit(fit: Fit) -> str:
    """The name of a training's lease."""
    return f"fit-{Path(fit.file).stem[:40]}-{hashlib.sha256(str(fit.file).encode()).hexdigest()[:12]}"


def _forget(cells: Sequence[Cell], store: Store, leases: Leases) -> None:
    at_work = [f"{holder.process} on {holder.host}" for holder in leases.holders().values() if not holder.is_gone]
    if at_work:
        raise ValueError(
            f"--fresh would take the results in {store.folder} from process {at_work[0]}, which computes there: stop "
            f"it, or give another --output (of one that is dead: remove {leases.folder})"
        )
    for cell in cells:
        store.remove(cell)
        if cell.fit is not None:
            cell.fit.forget()


def _remove_damaged(cells: Sequence[Cell], store: Store) -> bool:
    """Remove results that are there and cannot be read, and say so; whether there were any."""
    damaged = [cell for cell in cells if store.path(cell).is_file() and store.load(cell) is None]
    for cell in damaged:
        log.warning("%s is damaged, and made anew", store.path(cell))
        store.remove(cell)
    return bool(damaged)
