"""`mfm benchmark SUITE --status`: who does what, how fast, and what is left; from the folder alone, without a model."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mfm_benchmarks.cells import CLAIMS, PLAN
from mfm_lightning.utils.console import duration
from mfm_lightning.utils.leases import Holder, Leases
from mfm_lightning.utils.shared_work import Board

WINDOW = 3600.0  # seconds over which the rate is taken


@dataclass
class Status:
    """Where a run is.

    Attributes:
        suite, command: as the last process that began it was told.
        total, done: numbers of cells.
        failed: what went wrong, by the cell's name.
        at_work: who computes which cell.
        silent: the same of those that gave no sign for the length of a lease, or are gone.
        rate: cells an hour, of the last hour; 0 if none was finished then.
    """

    suite: str
    command: str
    total: int
    done: int
    failed: dict[str, str] = field(default_factory=dict)
    at_work: dict[str, Holder] = field(default_factory=dict)
    silent: dict[str, Holder] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """At that rate; None where nothing tells. Cells differ, so it is a rough one."""
        left = self.total - self.done - len(self.failed)
        return None if left and not self.rate else 0.0 if not left else left / self.rate * 3600

    def lines(self) -> list[str]:
        """As the terminal shows it."""
        now = time.time()
        words = [f"{self.suite}: {self.done} of {self.total} results, {len(self.failed)} failed"]
        for title, holders in (("computing", self.at_work), ("gave no sign for long", self.silent)):
            for cell, holder in holders.items():
                where = f"{holder.host}, process {holder.process}{holder.device and f', {holder.device}'}"
                since, sign = duration(max(0, now - holder.begun)), duration(max(0, now - holder.seen))
                words.append(f"  {title}: {cell}  [{where}; for {since}, last sign {sign} ago]")
        if self.rate:
            words.append(f"  {self.rate:.3g} results an hour, of late")
        if not self.at_work and self.done + len(self.failed) < self.total:
            words.append(f"  nobody is at work; to go on: {self.command}")
        elif self.seconds_left:
            words.append(f"  about {duration(self.seconds_left)} left at that rate (results differ in what they take)")
        return words + [f"  failed: {name}: {error}" for name, error in self.failed.items()]


def read_status(folder: Path, lease: float = 120.0) -> Status:
    """Of a folder of results.

    Raises:
        FileNotFoundError: if no run has begun there.
        ValueError: if the list of its cells cannot be read.
    """
    path = folder / CLAIMS / PLAN
    if not path.is_file():
        raise FileNotFoundError(
            f"no run has begun in {folder}: {path} is not there (mind --output, --config and --quick)"
        )
    try:
        plan = json.loads(path.read_text())
        cells, suite, command = dict(plan["cells"]), str(plan["suite"]), str(plan["command"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the next run in {folder} writes it anew") from error
    board = Board(folder)
    look, now, written = board.look(), time.time(), list[float]()
    for key in look.done & cells.keys():
        with suppress(FileNotFoundError):  # by --fresh, or damaged and made anew, just now
            written.append((folder / f"{key}.json").stat().st_mtime)
    late = [when for when in written if now - when < WINDOW]
    since = min(WINDOW, now - min(late)) if late else 0.0
    status = Status(suite, command, len(cells), len(written))
    # of the first we do not know how long it took
    status.rate = (len(late) - 1) / since * 3600 if len(late) > 1 and since > 0 else 0.0
    status.failed = {cells[key]: board.failure(key) for key in look.failed if key in cells and key not in look.done}
    for key, holder in Leases(folder / CLAIMS, lease).holders().items():
        silent = holder.is_gone or now - holder.seen > lease
        (status.silent if silent else status.at_work)[cells.get(key, key)] = holder
    return status
