"""What a trained model is measured on and what is drawn from it; a config names one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


class Evaluation:
    """Base class. Methods take the LightningModule (its `model`, `teacher` and trainer) and a folder to write to."""

    def check(self, module: L.LightningModule) -> None:
        """Raise ValueError, before any work, if the module's target or data cannot be evaluated so."""

    def draw(self, module: L.LightningModule, folder: Path) -> None:
        """Write pictures."""

    def measure(self, module: L.LightningModule, folder: Path) -> None:
        """Log metrics, print and write the tables."""

    def predict(self, module: L.LightningModule, batch: Any, batch_idx: int, folder: Path) -> None:
        """Write samples and posterior draws for a batch."""
