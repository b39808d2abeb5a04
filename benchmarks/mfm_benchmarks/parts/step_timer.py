"""How long steps of a training take, by the clock, without what comes before and between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from mfm_benchmarks.measure import clock
from mfm_lightning.utils.atomic import save_json


class StepTimer(L.Callback):
    """Writes seconds a step of the run, from the end of step `first` to the end of the last.

    Args:
        file: JSON with `seconds` a step and the `samples` of a step.
        first: steps before the measurement.

    Raises:
        ValueError: at the end, for a run of no more steps than `first`.
    """

    def __init__(self, file: str, first: int = 20) -> None:
        self.file, self.first = Path(file), first
        self._begin, self._samples = 0.0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples = len(batch[0])
        if trainer.global_step == self.first:
            self._begin = clock(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = trainer.global_step - self.first
        if steps < 1:
            raise ValueError(f"a run of {trainer.global_step} steps: StepTimer measures those after {self.first}")
        seconds = (clock(pl_module.device) - self._begin) / steps
        save_json({"seconds": seconds, "samples": self._samples}, self.file)
