"""The checkpoint that an interrupted run continues from."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` in the run's folder: every so many steps, at the end, and on Ctrl-C.

    After any other error the last one written before stays, since the weights may be what is wrong.

    Args:
        every_n_steps: optimiser steps between two.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_steps, enable_version_counter=False)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.default_root_dir
        super().setup(trainer, module, stage)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.training:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.interrupted:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
