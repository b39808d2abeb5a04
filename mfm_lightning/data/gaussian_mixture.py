"""Endless draws from a Gaussian mixture; the paper's three components by default (F.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import ArrayDataModule, generator
from mfm_lightning.oracles import GaussianMixture


class GaussianMixtureDataModule(ArrayDataModule):
    """Vectors `(D,)` from a mixture, without labels (all are 0, the null label of a network with no classes).

    Args:
        means: of the components, K of D numbers.
        covariances: variance of every coordinate in every component.
        weights: of the components; equal where None.
        batch_size: training batch on each device.
        num_test: size of the validation and the test split.
        seed: of the draws.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] = ((-3.0, -3.0), (0.0, 0.0), (3.0, 3.0)),
        covariances: float = 0.5,
        weights: Sequence[float] | None = None,
        batch_size: int = 1024,
        num_test: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        self.oracle = GaussianMixture(means, covariances, weights)
        self.num_test = num_test

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.oracle.state_shape

    @property
    def num_classes(self) -> int:
        return 0

    def setup(self, stage: str | None = None) -> None:
        draw = {name: self.oracle.sample(self.num_test, generator(i)) for i, name in enumerate(("val", "test"))}
        self.splits = {name: (x, torch.zeros(len(x), dtype=torch.long)) for name, x in draw.items()}

    def train_batch(self, step: int) -> Batch:
        x = self.oracle.sample(self.batch_size, generator(self.rank_seed() * 1_000_003 + 17 + step))
        return x, torch.zeros(len(x), dtype=torch.long)
