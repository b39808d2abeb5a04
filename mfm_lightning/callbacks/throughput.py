"""Samples and batches a second, while a run trains."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage


class TrainingThroughput(ThroughputMonitor):
    """Lightning's `ThroughputMonitor` of training alone: `train/device/samples_per_sec` and what goes with it, over the
    steps since the values were logged before. What a validation takes is left out.

    A GPU is waited for only at steps whose values are logged: Lightning's own waits at each step. The first value comes
    with the second logged step.
    """

    def __init__(self) -> None:
        super().__init__(batch_size_fn=lambda batch: len(batch[0]), window_size=2)
        self._left = 0.0  # when training was left for a validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)
            # Lightning warns of a module that does not count its FLOPs
            self._module_has_flops = hasattr(pl_module, "flops_per_batch")

    def _update(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, iter_num: int) -> None:
        due = trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()
        if due:
            super()._update(trainer, pl_module, batch, iter_num)
            return
        self._samples[RunningStage.TRAINING] += self.batch_size_fn(batch)
        self._batches[RunningStage.TRAINING] += 1

    def _compute(self, trainer: L.Trainer, iter_num: int | None = None) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        found = self._throughputs[RunningStage.TRAINING].compute()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:  # not by the connector, which writes the row before the loss is in it
            logger.log_metrics({f"train/{name}": value for name, value in found.items()}, step)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._left = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if RunningStage.TRAINING in self._t0s:  # not of a sanity check, before training
            self._t0s[RunningStage.TRAINING] += time.perf_counter() - self._left

    # -- stages that have no training steps --

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Nothing is logged."""

    def on_test_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Nothing is logged."""

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Nothing is logged."""

    def on_predict_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Nothing is logged."""

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        """Nothing is logged."""
