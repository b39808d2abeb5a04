"""Batches as a function of the step, so that an interrupted run resumes with the batches that it would have seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.conditions import Batch


class StepLoader(ABC):
    """Batches of the steps start, ..., length-1; `len` is that of an uninterrupted run.

    Lightning warns at a resumed run unless its loader has a state. This one's is the step alone, from which the
    DataModule makes it (`StepDataModule.steps`): there is nothing to be kept or loaded.
    """

    start: int
    length: int

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches of those steps."""

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Nothing to be loaded."""


class BatchStream(StepLoader):
    """`batch(step)` for step = start, ..., length-1.

    Args:
        batch: makes the batch of a step from nothing but the step.
        length: number of steps in all.
        start: the first step, above 0 in a resumed run.
    """

    def __init__(self, batch: Callable[[int], Batch], length: int, start: int = 0) -> None:
        self.batch, self.length, self.start = batch, length, start

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(self.start, self.length))


def shuffled_batch(x: Tensor, label: Tensor, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Batch `step` of the data repeated without end, each pass in an order of its own."""
    first = step * batch_size
    index = torch.arange(first, first + batch_size)
    epochs = index // len(x)
    picked = torch.empty_like(index)
    for epoch in epochs.unique().tolist():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        here = epochs == epoch
        picked[here] = order[index[here] % len(x)]
    return x[picked], label[picked]
