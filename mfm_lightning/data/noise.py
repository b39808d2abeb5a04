"""What aligned samples start from: noise, and the classes to make."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mfm_lightning.data.base import NumberedSamples
from mfm_lightning.interpolant import sample_generators


class NoiseDataModule(L.LightningDataModule):
    """Batches `(x0 (B, *shape), {label (B,), index (B,)})` of standard normal noise, for `mfm predict`.

    The noise of sample i depends on the seed and i alone, and is what `mfm sample` draws it from.

    Args:
        state_shape: of one state.
        num_samples: how many samples in all.
        num_classes: number of labels; `num_classes` is the null label.
        labels: the classes, repeated in turn until there are enough samples; all without a class where None.
        batch_size: samples aligned at once on each device.
        seed: of the noise.

    Raises:
        ValueError: if a label is outside 0..num_classes, or a number is not positive.
    """

    def __init__(
        self,
        state_shape: Sequence[int],
        num_samples: int = 64,
        num_classes: int = 0,
        labels: list[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples ({num_samples}) and batch_size ({batch_size}) must be at least 1")
        labels = [num_classes] if labels is None else list(labels)
        if not labels or min(labels) < 0 or max(labels) > num_classes:
            raise ValueError(f"labels {labels} must lie in 0..{num_classes} ({num_classes} is the null label)")
        self.state_shape, self.num_classes = tuple(state_shape), num_classes
        self.num_samples, self.labels, self.batch_size, self.seed = num_samples, labels, batch_size, seed

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(NumberedSamples(self.num_samples, self.sample), batch_size=self.batch_size)

    def sample(self, i: int) -> tuple[Tensor, int]:
        """Noise `(*shape)` and label of sample i."""
        (generator,) = sample_generators(self.seed, [i])
        return torch.randn(self.state_shape, generator=generator), self.labels[i % len(self.labels)]
