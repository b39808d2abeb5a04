"""The trained network as one safetensors file."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L

from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.checkpoints import save_network
from mfm_lightning.modules.base import TrainingModule

log = logging.getLogger(__name__)


class ExportModel(L.Callback):
    """Writes `model.safetensors` (averaged weights where EMA is on) to the run's folder when training ends.

    Args:
        filename: in the trainer's `default_root_dir`.

    Raises:
        ValueError: before training, if the LightningModule has no network to be written.
    """

    def __init__(self, filename: str = "model.safetensors") -> None:
        self.filename = filename

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            _exporting(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _exporting(pl_module)
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] # Lightning sets it elsewhere
        ema = next((c for c in callbacks if isinstance(c, EMA)), EMA())
        with ema.applied(module), module.whole_weights():
            if trainer.is_global_zero:
                path = Path(trainer.default_root_dir) / self.filename
                save_network(module.exported, path, {"kind": module.exported_kind})
                log.info("model written to %s", path)


def _exporting(module: L.LightningModule) -> TrainingModule:
    if not isinstance(module, TrainingModule):
        raise ValueError(f"{type(module).__name__} has no network to be written: leave ExportModel out")
    return module
