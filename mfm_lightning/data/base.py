"""What every DataModule here has."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mfm_lightning.data.stream import BatchStream


class StepDataModule(L.LightningDataModule):
    """Training is counted in steps; batches are `(x1 (B, *shape), label (B,))`.

    A subclass implements `train_batch(step)`, which must depend on the step, the seed and the rank alone.

    Args:
        batch_size: training batch on each device.
        seed: of order and draws.
    """

    state_shape: tuple[int, ...]
    num_classes: int

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.batch_size, self.seed = batch_size, seed

    def train_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The training batch of a step."""
        raise TypeError("use a DataModule for a data set, e.g. DigitsDataModule")

    def steps(self) -> tuple[int, int]:
        """The first batch of this run, above 0 where it is resumed, and the number of batches in all."""
        accumulate, done = self.trainer.accumulate_grad_batches, self.trainer.global_step
        if self.trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must be set: training here is counted in steps, not epochs")
        return done * accumulate, self.trainer.max_steps * accumulate

    def train_dataloader(self) -> BatchStream:
        start, length = self.steps()
        return BatchStream(self.train_batch, length, start)

    def decode(self, x: Tensor) -> Tensor:
        """Model states to what one looks at (images in [0, 1])."""
        return x

    def rank_seed(self) -> int:
        """A seed of this rank's own."""
        return self.seed + 7919 * (self.trainer.global_rank if self.trainer is not None else 0)


class ArrayDataModule(StepDataModule):
    """Data that fits in memory.

    A subclass sets `splits`, a dictionary of `(x, label)` by "train", "val" and "test", in `setup`.
    """

    splits: dict[str, tuple[Tensor, Tensor]]

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader:
        return DataLoader(TensorDataset(*self.splits[split]), batch_size=self.batch_size)


def generator(seed: int) -> torch.Generator:
    """A CPU generator with that seed."""
    return torch.Generator().manual_seed(seed)
