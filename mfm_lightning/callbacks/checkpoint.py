"""The checkpoint that an interrupted run continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mfm_lightning.whole_files import clear_partials, whole_file


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
    """`last.ckpt` in the run's folder: every so many steps, at the end, and on Ctrl-C.

    After any other error the last one written before stays, since the weights may be what is wrong. It is written
    atomically (`AtomicCheckpointIO`).

    Args:
        every_n_steps: optimiser steps between two.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_steps, enable_version_counter=False)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.dirpath = trainer.default_root_dir
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        super().setup(trainer, module, stage)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.training:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.interrupted:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")
