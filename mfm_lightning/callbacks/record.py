"""What a run was: its hyperparameters, for the loggers; and the best validation loss, for its summary."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger

from mfm_lightning._version import __version__
from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.modules.predicting import data_settings
from mfm_lightning.utils.repository import commit, commit_of

log = logging.getLogger(__name__)
MONITORED = "val/loss"


class RunRecord(L.Callback):
    """Gives the loggers, when a run begins, its hyperparameters: the whole config; under `run` the command, the version
    of mfm-lightning and the git commits of its code and of the current folder, where they are in repositories; under
    `data_fingerprint` what tells the data from others. In training it keeps the lowest `val/loss` and its step, also
    over a resume.

    Args:
        config: of the run, as plain values.
        command: that was typed.
    """

    def __init__(self, config: Mapping[str, Any], command: str) -> None:
        self.config, self.command = config, command
        self.best: tuple[float, int] | None = None  # loss and step

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.log_hyperparameters(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.log_hyperparameters(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.log_hyperparameters(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.log_hyperparameters(trainer)

    def log_hyperparameters(self, trainer: L.Trainer) -> None:
        """Give them to every logger."""
        if not trainer.is_global_zero or not trainer.loggers:
            return
        found = self.hyperparameters(datamodule_of(trainer))
        for logger in trainer.loggers:
            logger.log_hyperparams(new_in_mlflow(logger, found) if isinstance(logger, MLFlowLogger) else found)

    def hyperparameters(self, data: Any) -> dict[str, Any]:
        """All of them.

        Args:
            data: the run's DataModule, after its `setup`. One that has no `fingerprint` is told by its class and its
                plain fields.
        """
        about = {"command": self.command, "version": __version__}
        commits = {"commit": commit(Path.cwd()), "mfm_lightning_commit": commit_of(__file__)}
        told = getattr(data, "fingerprint", None)
        told = data_settings(data) if told is None else {"class": type(data).__name__, **told}
        run = {**about, **{name: text for name, text in commits.items() if text}}
        return {**self.config, "run": run, "data_fingerprint": told}

    # -- the best validation -------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or MONITORED not in trainer.callback_metrics:
            return
        loss = float(trainer.callback_metrics[MONITORED])
        if self.best is None or loss < self.best[0]:
            self.best = loss, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": list(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "best" in state_dict:
            loss, step = state_dict["best"]
            self.best = float(loss), int(step)


def new_in_mlflow(logger: MLFlowLogger, params: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters by names that MLflow takes, without those that the run has: MLflow keeps the first value of each,
    and refuses another one where a run goes on (`run_id`). What differs is said."""
    flat = {re.sub(r"[^\w\-. /]", "_", name): str(value)[:250] for name, value in _flatten_dict(dict(params)).items()}
    known = logger.experiment.get_run(logger.run_id or "").data.params
    if changed := sorted(name for name, value in flat.items() if known.get(name, value) != value):
        log.info("MLflow keeps the run's first values of %s", ", ".join(changed))
    return {name: value for name, value in flat.items() if name not in known}
