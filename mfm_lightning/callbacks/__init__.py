"""Lightning callbacks."""

from mfm_lightning.callbacks.checkpoint import LastCheckpoint
from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.callbacks.ema_snapshots import EMASnapshots
from mfm_lightning.callbacks.export import ExportModel
from mfm_lightning.callbacks.fid import SampleFID
from mfm_lightning.callbacks.progress import PlainProgress, StepProgressBar
from mfm_lightning.callbacks.record import RunRecord
from mfm_lightning.callbacks.throughput import TrainingThroughput

__all__ = [
    "EMA", "EMASnapshots", "ExportModel", "LastCheckpoint", "PlainProgress", "RunRecord", "SampleFID",
    "StepProgressBar", "TrainingThroughput",
]  # fmt: skip
