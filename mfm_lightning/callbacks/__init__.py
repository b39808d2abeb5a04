"""Lightning callbacks."""

from mfm_lightning.callbacks.checkpoint import LastCheckpoint
from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.callbacks.export import ExportModel

__all__ = ["EMA", "ExportModel", "LastCheckpoint"]
