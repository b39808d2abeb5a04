"""The loop of `mfm fit`: a run that goes on does what is still to do, its last validation and its end included."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning as L
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from mfm_lightning.training.logs import begin_at_step


def use_fit_loop(trainer: L.Trainer) -> None:
    """Give a trainer this loop in place of Lightning's own."""
    old = trainer.fit_loop
    trainer.fit_loop = FitLoop(trainer, old.min_epochs, old.max_epochs)
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, old.epoch_loop.min_steps, old.epoch_loop.max_steps)


class FitLoop(_FitLoop):
    """Lightning's, but for how it resumes.

    - A run whose steps are all done is not left at once: its hooks run, so that it ends as it would have ended
      (Lightning returns before them, with nothing exported).
    - A validation that was due at the checkpoint's step and did not end is done before training goes on (Lightning
      leaves it out, or does the rest of its batches).
    - Logs go on at the checkpoint's step.
    """

    epoch_loop: EpochLoop

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0

    def on_run_start(self) -> None:
        ended_at, step = self.epoch_loop.val_loop.ended_at, self.epoch_loop.global_step
        begin_at_step(self.trainer, step, self._loaded_from_state_dict and ended_at not in (-1, step))
        super().on_run_start()
        if self._loaded_from_state_dict and self.epoch_loop.validation_is_lost(self._data_fetcher):
            self.epoch_loop.validate()

    def on_save_checkpoint(self) -> dict[str, Any]:
        return {**super().on_save_checkpoint(), "validated": self.epoch_loop.val_loop.ended_at}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        # an older checkpoint does not say; then no validation is taken for lost
        self.epoch_loop.val_loop.ended_at = state_dict.get("validated", -1)


class EpochLoop(_TrainingEpochLoop):
    """Lightning's, without its own ways to resume a validation."""

    val_loop: ValidationLoop

    def __init__(self, trainer: L.Trainer, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps, max_steps)
        self.val_loop = ValidationLoop(trainer)
        self._is_resuming = False

    def validation_is_lost(self, data_fetcher: _DataFetcher | None) -> bool:
        """Whether the checkpoint that was loaded is of a step whose validation did not end."""
        ended_at = self.val_loop.ended_at
        if data_fetcher is None or not self.global_step or ended_at in (-1, self.global_step):
            return False
        return self._should_check_val_fx(data_fetcher)

    def validate(self) -> None:
        """Validate, as after a step."""
        # saved within the validation, when it had already taken its share of random numbers
        within = self.restarted_on_last
        self.val_loop.restarting = False
        self.trainer.validating = True
        self._batches_that_stepped = self.global_step - 1  # as metrics of a step are logged
        with isolate_rng() if within else contextlib.nullcontext():
            self.val_loop.run()
        self.trainer.training = True
        self.trainer._logger_connector._first_loop_iter = None

    def reset(self) -> None:
        super().reset()
        self._is_resuming = self.restarting
        self._batches_that_stepped = self.global_step

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        if self._is_resuming:  # the question of `advance` before the first step: `FitLoop.on_run_start` has answered it
            self._is_resuming = False
            return False
        return super()._should_check_val_fx(data_fetcher)


class ValidationLoop(_EvaluationLoop):
    """Lightning's within `fit`, which remembers at which step it last came to its end.

    Args:
        trainer: of the loop.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__(trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=False)
        self.ended_at: int | None = None

    def on_run_end(self) -> list:
        if not self.trainer.sanity_checking:
            self.ended_at = self.trainer.global_step  # before the hooks at the end, which may write a checkpoint
        return super().on_run_end()
