"""A point of a report's curves, which its figures and tables take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mfm_lightning.metrics.measured import Measured


@dataclass
class Entry:
    """A point of a curve: one method and setting for one reward and lambda, over all seeds.

    Attributes:
        label: of the setting; scale: lambda, None where the method does not depend on it.
        nfe, seconds: of a sample.
        reward: mean, without multipliers; frechet: of the samples' features to the data's.
        diversity: mean distance between two samples.
        images: the first few, `(b, C, H, W)`.
        fit_seconds: of the training that it took.
    """

    method: str
    label: str
    scale: float | None
    nfe: float
    seconds: float
    reward: Measured
    frechet: Measured | None
    diversity: Measured
    images: Tensor
    fit_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method
