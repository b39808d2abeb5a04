"""What a trained model is measured on and what is drawn from it; a config names one."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table


class Evaluation:
    """Base class. Methods take the LightningModule (its `model`, `teacher` and trainer) and a folder to write to."""

    def draw(self, module: L.LightningModule, folder: Path) -> None:
        """Write pictures."""

    def measure(self, module: L.LightningModule, folder: Path) -> None:
        """Log metrics, print and write the tables."""

    def predict(self, module: L.LightningModule, batch: Any, batch_idx: int, folder: Path) -> None:
        """Write samples and posterior draws for a batch."""


def write_table(rows: Sequence[dict[str, Any]], title: str, folder: Path, name: str) -> None:
    """Print `rows` as a table and write `NAME.csv` and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()])
    Console().print(table)
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / f"{name}.json").write_text(json.dumps(list(rows), indent=1))
