"""What the terminal shows: progress bars, and tables that are also written to files."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import get_console
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mfm_lightning.utils.atomic import save_json

log = logging.getLogger(__name__)
Job = TypeVar("Job")


def console() -> Console:
    """rich's console (Lightning's bar has the same, so that the two do not write over each other), which takes texts as
    they are: brackets in the names of rewards and files are no markup."""
    found = get_console()
    found._markup = found._emoji = False  # only a new console takes them as arguments, and Lightning makes new ones
    return found


def progress_bar() -> Progress:
    """A bar that is gone when it is done."""
    text = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (SpinnerColumn(), text, *Progress.get_default_columns()[1:3], TimeElapsedColumn())
    return Progress(*columns, console=console(), transient=True)


def duration(seconds: float) -> str:
    """As people say it: "45 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    for size, names in ((3600, ("h", "min", 60)), (60, ("min", "s", 1))):
        if whole >= size:
            rest = whole % size // names[2]
            return f"{whole // size} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def track(jobs: Sequence[Job], describe: Callable[[Job], str], every: float = 30.0) -> Iterator[Job]:
    """The jobs one after the other, with a progress bar that says which one is under way; where there is no terminal,
    a line with the time left at most `every` so many seconds."""
    if not console().is_terminal:
        begin = last = time.monotonic()
        for i, job in enumerate(jobs):
            if (now := time.monotonic()) - last >= every:
                last, left = now, (now - begin) / i * (len(jobs) - i)
                log.info("%s (%d of %d), %s left", describe(job), i + 1, len(jobs), duration(left))
            yield job
        return
    with progress_bar() as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=describe(job))
            yield job
            progress.advance(task)


def write_table(
    rows: Sequence[dict[str, Any]],
    title: str,
    folder: Path,
    name: str,
    show: bool = True,
    shown: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Print a table (with `show`) and write `NAME.csv` and `NAME.json`.

    Args:
        shown: what is printed instead of `rows`, where they are too wide for a terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if show:
        shown = rows if shown is None else shown
        table = Table(title=title)
        for column in shown[0]:
            table.add_column(column)
        for row in shown:
            table.add_row(*[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()])
        console().print(table)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    save_json(list(rows), folder / f"{name}.json")
