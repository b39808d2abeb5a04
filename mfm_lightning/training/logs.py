"""Logs that no later part of a run deletes: resuming appends to them, and each stage has its own."""

from __future__ import annotations

import csv
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mfm_lightning.utils.atomic import whole_file

log = logging.getLogger(__name__)
TRAINING = ("train/", "lr-")  # beginnings of the names that are logged after a training step
BEFORE = "before"  # in the name of a log that a run which begins anew finds


def own_logs(trainer: L.Trainer, stage: str) -> None:
    """Before a stage runs: its loggers append, and those of a stage other than "fit" write beside training's."""
    for logger in trainer.loggers:
        if stage != "fit" and isinstance(logger, CSVLogger | TensorBoardLogger) and logger._version is not None:
            name = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            logger._version = f"{name}_{stage}"
        if isinstance(logger, CSVLogger) and trainer.is_global_zero and logger._experiment is None:
            logger._experiment = AppendingWriter(logger.log_dir)


def goes_on_in_its_folder(trainer: L.Trainer) -> bool:
    """Whether a run goes on from a checkpoint of its own folder, so that what is there is its own."""
    if trainer.ckpt_path is None:
        return False
    return Path(trainer.default_root_dir).resolve() in Path(trainer.ckpt_path).resolve().parents


def begin_at_step(trainer: L.Trainer, step: int, validates_again: bool = False) -> None:
    """When training begins: what the logs hold of this step and later ones is trained anew, and goes.

    Args:
        validates_again: the validation after the step before it, too, is done anew.
    """
    if not trainer.is_global_zero:
        return
    own = goes_on_in_its_folder(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and isinstance(logger.experiment, AppendingWriter):
            logger.experiment.begin(step if own else 0, validates_again)
        elif isinstance(logger, TensorBoardLogger) and step:
            _hide_events(logger, step)


def save_logs(trainer: L.Trainer) -> None:
    """Write what the loggers still hold in memory, as with a checkpoint."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            logger.save()


class AppendingWriter(ExperimentWriter):
    """Writes `metrics.csv` behind the rows that are there. (Lightning's own deletes them.)

    Args:
        log_dir: the folder.
    """

    def __init__(self, log_dir: str) -> None:
        self._header: list[str] = []
        super().__init__(log_dir)
        self.metrics_keys = list(self._header)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with open(path, newline="", errors="replace") as file:
                self._header = next(csv.reader(file), [])

    def begin(self, step: int, validates_again: bool = False) -> None:
        """Keep the rows of the steps before this one (and of the last of them only those of training, where it
        `validates_again`); with step 0 the whole file is put aside."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        if not step:
            names = (f"{path.stem}.{BEFORE}{k if k > 1 else ''}{path.suffix}" for k in itertools.count(1))
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            os.replace(path, aside)
            log.info("%s was of a run before this one, and is %s now", path, aside.name)
            self.metrics_keys = []
            return
        with open(path, newline="", errors="replace") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if _step(row) is not None and int(row["step"]) < step]
        kept = [row for row in whole if not (validates_again and _step(row) == step - 1 and not _of_training(row))]
        if len(kept) == len(rows):
            return
        broken = sum(_step(row) is None for row in rows)
        with whole_file(path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        if again := len(rows) - len(kept) - broken:
            log.info("%s: %d rows of step %d and later left out, which are trained anew", path, again, step)
        if broken:
            log.warning("%s: %d rows left out, which are not whole (the run was killed while it wrote)", path, broken)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """One row a step for all that training logs, such as the loss, the learning rate and the throughput."""
        before = self.metrics[-1] if self.metrics else {}
        super().log_metrics(metrics_dict, step)
        if before.get("step") == step is not None and _of_training(before) and _of_training(self.metrics[-1]):
            before.update(self.metrics.pop())

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{self.metrics_file_path} could not be written: {reason}") from error


def _of_training(row: dict[str, Any]) -> bool:
    return any(name.startswith(TRAINING) and value not in (None, "") for name, value in row.items())


def _step(row: dict[str, Any]) -> int | None:
    text = row.get("step")
    return int(text) if text and text.isdigit() and None not in row.values() and None not in row else None


def _hide_events(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard that events of this step and later ones, which are in its files already, are not of this run."""
    from torch.utils.tensorboard import SummaryWriter

    writer = logger.experiment
    if isinstance(writer, SummaryWriter):  # as its argument purge_step does, before the step is known
        from tensorboard.compat.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue] # made when it is imported
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )

        file = writer._get_file_writer()
        file.add_event(Event(step=step, file_version="brain.Event:2"))
        file.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
