"""What the terminal shows: progress bars, and tables that are also written to files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import get_console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

Job = TypeVar("Job")


def progress_bar() -> Progress:
    """A bar that is gone when it is done."""
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn())
    # the console of Lightning's own bar, so that the two do not write over each other
    return Progress(*columns, console=get_console(), transient=True)


def track(jobs: Sequence[Job], describe: Callable[[Job], str]) -> Iterator[Job]:
    """The jobs one after the other, with a progress bar that says which one is under way."""
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
        get_console().print(table)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(list(rows), indent=1))
