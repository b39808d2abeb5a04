"""The trained network as one safetensors file."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning as L

from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.checkpoints import save_network

log = logging.getLogger(__name__)


class ExportModel(L.Callback):
    """Writes `model.safetensors` (averaged weights where EMA is on) to the run's folder when training ends.

    Args:
        filename: in the trainer's `default_root_dir`.
    """

    def __init__(self, filename: str = "model.safetensors") -> None:
        self.filename = filename

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), EMA())
        with ema.applied(module), module.whole_weights():
            if trainer.is_global_zero:
                path = Path(trainer.default_root_dir) / self.filename
                save_network(module.exported, path, {"kind": module.exported_kind})
                log.info("model written to %s", path)
