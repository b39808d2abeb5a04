"""What aligned samples start from: noise, and the classes to make."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mfm_lightning.data.base import NumberedSamples, share_of
from mfm_lightning.interpolant import sample_generators

log = logging.getLogger(__name__)


class NoiseDataModule(L.LightningDataModule):
    """Batches `(x0 (B, *shape), {label (B,), index (B,)})` of standard normal noise, for `mfm predict`.

    The noise of sample i depends on the seed and i alone, and is what `mfm sample` draws it from.

    Args:
        state_shape: of one state; the model's where left out.
        num_samples: how many samples in all.
        num_classes: number of labels; `num_classes` is the null label. The model's where left out.
        labels: the classes, repeated in turn until there are enough samples; all without a class where None.
        batch_size: samples aligned at once on each device.
        seed: of the noise.

    Raises:
        ValueError: if a label is outside 0..num_classes, or a number is not positive; in `setup`, if sizes are left out
            and there is no model that has them.
    """

    state_shape: tuple[int, ...] | None
    num_classes: int | None

    def __init__(
        self,
        state_shape: Sequence[int] | None = None,
        num_samples: int = 64,
        num_classes: int | None = None,
        labels: list[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"num_samples ({num_samples}) and batch_size ({batch_size}) must be at least 1")
        self.state_shape, self.num_classes = None if state_shape is None else tuple(state_shape), num_classes
        self.num_samples, self.labels, self.batch_size, self.seed = num_samples, labels, batch_size, seed
        self._check_labels()

    def setup(self, stage: str | None = None) -> None:
        """Take sizes that were left out from the model that the trainer runs."""
        model = None if self.trainer is None else self.trainer.lightning_module
        for name in ("state_shape", "num_classes"):
            if getattr(self, name) is None:
                if (found := getattr(model, name, None)) is None:
                    raise ValueError(f"noise of no {name}: give it, for there is no model that says it")
                setattr(self, name, found)
                log.info("noise: %s %s, of the model", name, found)
        self._check_labels()

    def _check_labels(self) -> None:
        labels, classes = self.labels, self.num_classes
        top = float("inf") if classes is None else classes
        if labels is not None and (not labels or min(labels) < 0 or max(labels) > top):
            where = "be 0 or more" if classes is None else f"lie in 0..{classes} ({classes} is the null label)"
            raise ValueError(f"labels {labels} must {where}")

    def predict_dataloader(self) -> DataLoader:
        samples = NumberedSamples(self.num_samples, self.sample)
        return DataLoader(samples, batch_size=self.batch_size, sampler=share_of(self, samples))

    @property
    def samples_identity(self) -> dict[str, Any]:
        """What tells the samples from others: their seed and classes. Their number may grow."""
        return {"seed": self.seed, "labels": self.labels, "state_shape": self.state_shape, "classes": self.num_classes}

    def sample(self, i: int) -> tuple[Tensor, int]:
        """Noise `(*shape)` and label of sample i.

        Raises:
            ValueError: if sizes were left out, and there was no `setup` yet.
        """
        if self.state_shape is None or self.num_classes is None:
            raise ValueError("the noise has no sizes yet: give state_shape and num_classes, or a trainer with a model")
        (generator,) = sample_generators(self.seed, [i])
        label = self.num_classes if self.labels is None else self.labels[i % len(self.labels)]
        return torch.randn(self.state_shape, generator=generator), label
