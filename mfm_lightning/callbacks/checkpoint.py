"""The checkpoint that an interrupted run continues from."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from mfm_lightning.callbacks.stops import end_at_signals, listen, say_and_stop, unlisten
from mfm_lightning.training.logs import save_logs
from mfm_lightning.utils.atomic import clear_partials, mend, whole_file
from mfm_lightning.utils.distributed import gather_ranks
from mfm_lightning.utils.stopping import SIGNALS, Stopped

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place and then moves it there: whatever happens while it is written, a kill
    or a full disk, the one before it stays. (Lightning's own goes through the system's temporary folder, and is copied
    where that is on another file system.)"""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        clear_partials(Path(path).parent, Path(path).name)  # one process writes it, and may have been killed at that
        file = None
        try:
            with whole_file(path, sync=True) as place, _Watched(place) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's writer answers a full disk by "unexpected pos 64 vs 0"
            cause = error if file is None or file.error is None else file.error
            reason = (isinstance(cause, OSError) and cause.strerror) or cause
            raise OSError(f"checkpoint {path} could not be written, the one before it is intact: {reason}") from error


class _Watched(io.FileIO):
    """A file that remembers why it could not be written to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view):  # an operating system takes 2 GB at once
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
            raise
        return done


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` in the run's folder: every so many steps, at the end, and where the run is asked to stop: by Ctrl-C
    (SIGINT), SIGTERM, SIGHUP, or SIGUSR1 (which SLURM can send before the time is over; there the job is queued again).

    A run that is asked to stop ends its optimiser step, with all micro-batches and on all ranks, writes the checkpoint
    and leaves with status 128 + the signal's number. A validation is left at once (by several processes after its
    batch), and done again when the run goes on. A second Ctrl-C interrupts at once; then, and after an error, the
    checkpoint written before stays: what is there is half a step, or may be what is wrong.

    `--ckpt_path last` continues from it where there is one. It is written atomically (`AtomicCheckpointIO`, `FSDP`).

    Args:
        every_n_steps: optimiser steps between two.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_steps, enable_version_counter=False)
        self._stops: set[int] = set()  # while training: the signals that ask it to stop
        self._steps = 0  # optimiser steps seen
        self._asked = 0  # the signal that this process was asked to stop by
        self._leave: Callable[[int], None] | None = None  # what stops at once, where nothing is under way
        self._interrupt: Any = None  # what Ctrl-C did before
        self._requeued_by: int | None = None  # the signal
        self._is_finished = False  # whether the checkpoint of the end is written

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.default_root_dir
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, pl_module, stage)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:  # of `--ckpt_path last`, before `setup`
        self.dirpath = trainer.default_root_dir
        mend(self._path(trainer))
        return super()._find_last_checkpoints(trainer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        environment = trainer._accelerator_connector.cluster_environment
        self._requeued_by = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeued_by = environment.requeue_signal
        self._stops = {*SIGNALS, self._requeued_by or signal.SIGUSR1}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps, self._asked, self._leave, self._is_finished = trainer.global_step, 0, None, False
        self._interrupt = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
        # after Lightning's, which act at once, wherever each rank may be; it puts back all when the trainer is done
        listen(self._stops, self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # a batch within an optimiser step
        self._steps = trainer.global_step
        if self._steps != trainer.max_steps:  # else it ends by itself
            self._stop_if_asked(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # -- validation: nothing is under way that would be lost --

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING:
            end_at_signals(trainer, "mfm validate")
        if not self._trains(trainer) or trainer.world_size > 1:
            return
        self._leave = _leave_validation
        if self._asked:  # since the step
            self._leave(self._asked)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        end_at_signals(trainer, "mfm test")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        end_at_signals(trainer, "mfm predict")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._trains(trainer) and trainer.world_size > 1:
            self._stop_if_asked(trainer, after=_leave_validation)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave = None
        super().on_validation_end(trainer, pl_module)
        if self._trains(trainer) and trainer.global_step != trainer.max_steps:
            self._stop_if_asked(trainer)

    def _trains(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and bool(self._stops)

    # -- the end --

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.finish(trainer)

    def finish(self, trainer: L.Trainer) -> None:
        """Write the last checkpoint of a run that is not interrupted, once; what comes after it may be stopped."""
        if trainer.interrupted or self._is_finished:
            return
        self._is_finished = True
        trainer.save_checkpoint(self._path(trainer))
        self._leave = partial(
            say_and_stop, "mfm fit", more=f" at its end; --ckpt_path {self._path(trainer)} finishes it"
        )
        if self._asked:
            self._leave(self._asked)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stops = set()
        unlisten()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        in_validation = self._stops and trainer.validating
        self._stops, self._leave = set(), None
        unlisten()
        if isinstance(exception, Stopped) and in_validation and self._asked:
            self._asked = 0
            self._write_stopped(trainer, exception.signal, "in a validation, which is done again")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        save_logs(trainer)  # a run that is killed goes on from here

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "last.ckpt"

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._interrupt)
        first, self._asked = not self._asked, self._asked or number
        if self._leave is not None:
            leave, self._leave = self._leave, None
            leave(number)
        elif first:
            rank_zero_info(
                f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; Ctrl-C (again) stops at "
                "once, without"
            )

    def _stop_if_asked(self, trainer: L.Trainer, after: Callable[[int], NoReturn] | None = None) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked > 0, all=False):
            return
        asked = gather_ranks(self._asked)
        number = self._requeued_by if self._requeued_by in asked else None
        number = max(asked) if number is None else number
        self._asked = number
        if after is not None:
            after(number)
        self._asked = 0
        self._write_stopped(trainer, signal.Signals(number))
        raise Stopped(number)

    def _write_stopped(self, trainer: L.Trainer, number: signal.Signals, where: str = "") -> None:
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        at = " ".join(["stopped by", number.name, "after step", str(self._steps), *([where] if where else [])])
        rank_zero_info(f"{at}; --ckpt_path {path} continues")
        if number == self._requeued_by and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier()


def _leave_validation(number: int) -> NoReturn:
    """The checkpoint is written by `on_exception`, when all that the validation put aside is back in its place."""
    raise Stopped(number)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be queued again: %s", job, error)
