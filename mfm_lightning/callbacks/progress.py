"""The progress of runs that are counted in steps: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from mfm_lightning.utils.console import duration

log = logging.getLogger(__name__)


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar without the epoch, of which runs here have one without end."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {
            k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"
        }  # of folders, not runs


class PlainProgress(ProgressBar):
    """A line now and then with the step, what is logged for the bar, and the time left: for logs of jobs, where a bar
    would be written anew and anew.

    Args:
        every: seconds between lines.
    """

    def __init__(self, every: float = 30.0) -> None:
        super().__init__()
        self.every = every
        self._enabled, self._begin, self._first, self._done, self._last = True, 0.0, 0, 0, 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, total = trainer.global_step, trainer.max_steps
        if done == self._first:  # a batch of several that make a step
            return
        if total < 0 and isinstance(self.total_train_batches, int):
            total = self.total_train_batches * (trainer.max_epochs or 1)
        if self._due(done == total):
            found = self.get_metrics(trainer, pl_module).items()
            metrics = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found]
            self._say("step", done, total, metrics)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and self._enabled and trainer.state.fn == "fit":
            log.info("validation at step %d", trainer.global_step)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(0)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(0)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batch(sum(trainer.num_test_batches))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batch(sum(trainer.num_predict_batches))

    def _batch(self, total: float) -> None:
        self._done += 1
        if self._due(self._done == total):
            self._say("batch", self._done, total, [])

    def _start(self, done: int) -> None:
        self._begin, self._first, self._done, self._last = time.monotonic(), done, done, time.monotonic()

    def _due(self, at_end: bool) -> bool:
        if not self._enabled or not (at_end or time.monotonic() - self._last >= self.every):
            return False
        self._last = time.monotonic()
        return True

    def _say(self, what: str, done: int, total: float, metrics: list[str]) -> None:
        seconds = (time.monotonic() - self._begin) / (done - self._first)
        known = 0 < total < float("inf")
        left = [f"{duration(seconds * (total - done))} left"] if known and done < total else []
        of = f" of {int(total)}" if known else ""
        log.info(", ".join([f"{what} {done}{of}", *metrics, f"{1 / seconds:.3g} a second", *left]))
