"""The checkpoint that an interrupted run continues from."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from mfm_lightning.utils.atomic import clear_partials, mend, whole_file
from mfm_lightning.utils.distributed import gather_ranks

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
        try:
            with whole_file(path, sync=True) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise OSError(f"checkpoint {path} could not be written, the one before it is intact: {error}") from error


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` in the run's folder: every so many steps, at the end, and where the run is asked to stop: by Ctrl-C
    (SIGINT), SIGTERM, or SIGUSR1 (which SLURM can send before the time is over; there the job is queued again).

    A run that is asked to stop ends its optimiser step, with all micro-batches and on all ranks, writes the checkpoint
    and leaves with status 128 + the signal's number. A second Ctrl-C interrupts at once; then, and after an error, the
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
        self._interrupt: Any = None  # what Ctrl-C did before
        self._requeued_by: int | None = None  # the signal

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
        self._stops = {signal.SIGINT, signal.SIGTERM, self._requeued_by or signal.SIGUSR1}
        os.register_at_fork(after_in_child=self._leave_signals)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps, self._asked = trainer.global_step, 0
        # after Lightning's, which act at once, wherever each rank may be; it puts back all when the trainer is done
        if threading.current_thread() is threading.main_thread():
            self._interrupt = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
            if self._interrupt == signal.SIG_IGN:  # a shell's background job: Ctrl-C is not meant for it
                self._stops.discard(signal.SIGINT)
            for number in self._stops:
                signal.signal(number, self._ask)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:
            return  # a batch within an optimiser step
        self._steps = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self._asked > 0, all=False)
        if stop and self._steps != trainer.max_steps:  # else it ends by itself
            self._stop(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stops = set()
        if not trainer.interrupted:
            trainer.save_checkpoint(self._path(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stops = set()

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "last.ckpt"

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._interrupt)
        if not self._asked:
            rank_zero_info(
                f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; Ctrl-C (again) stops at "
                "once, without"
            )
        self._asked = self._asked or number

    def _stop(self, trainer: L.Trainer) -> None:
        asked = gather_ranks(self._asked)
        number = signal.Signals(self._requeued_by if self._requeued_by in asked else max(asked))
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        rank_zero_info(f"stopped by {number.name} after step {self._steps}; --ckpt_path {path} continues")
        if number == self._requeued_by and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier()
        raise SystemExit(128 + number)

    def _leave_signals(self) -> None:
        """In a process that training forked (a data worker): it goes on until the one that trains ends it."""
        for number in self._stops:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be queued again: %s", job, error)
