"""The progress bar of runs that are counted in steps."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar without the epoch, of which runs here have one without end."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
