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
        nfe: of a sample.
        reward: mean, without multipliers; frechet: of the samples' features to the data's.
        diversity: mean distance between two samples; None where it was not measured.
        shares: L2 of the samples' class frequencies to those that the reward asks for; None where it asks for none.
        best: mean reward of the samples' best look-aheads; None where the method has none.
        images: the first few, `(b, C, H, W)`.
        trained: whether a training for this reward came first.
        wall_time: seconds a sample, with judging, on the machine and beside the work of that time; None where it was
            not taken.
    """

    method: str
    label: str
    scale: float | None
    nfe: float
    reward: Measured
    frechet: Measured | None
    diversity: Measured | None
    images: Tensor
    shares: Measured | None = None
    trained: bool = False
    best: Measured | None = None
    wall_time: float | None = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method
