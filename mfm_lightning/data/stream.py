"""Batches as a function of the step, so that an interrupted run resumes with the batches that it would have seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.utils.loading import Computed, RaisingLoader


class StepLoader(ABC):
    """Batches of the steps start, ..., length-1; `len` is that of an uninterrupted run.

    A pass goes on where the one before it ended, so that a run in epochs (`trainer.limit_train_batches`) sees all data:
    the first begins with batch `start`, each ends before the next multiple of `length`.

    Lightning warns at a resumed run unless its loader has a state. This one's is the step alone, from which the
    DataModule makes it (`StepDataModule.steps`): there is nothing to be kept or loaded.

    Args:
        length: number of steps in all.
        start: the first step, above 0 in a resumed run.
        where: says the first step of a pass, in place of counting the batches that were taken: of a trainer, which may
            leave some of them.
    """

    def __init__(self, length: int, start: int = 0, where: Callable[[], int] | None = None) -> None:
        self.length, self.start, self.where = length, start, where
        self._next = start

    @abstractmethod
    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of the steps first, ..., last-1."""

    def __iter__(self) -> Iterator[Batch]:
        first = self._next if self.where is None else self.where()
        return self._pass(first, (first // max(1, self.length) + 1) * self.length)

    def _pass(self, first: int, last: int) -> Iterator[Batch]:
        for step, batch in enumerate(self.batches(first, last), first):
            self._next = step + 1
            yield batch

    def __len__(self) -> int:
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Nothing to be loaded."""


class BatchStream(StepLoader):
    """`batch(step)` for the steps.

    Args:
        batch: makes the batch of a step from nothing but the step.
        length: as of `StepLoader`.
        start: as of `StepLoader`.
        where: as of `StepLoader`.
    """

    def __init__(
        self, batch: Callable[[int], Batch], length: int, start: int = 0, where: Callable[[], int] | None = None
    ) -> None:
        super().__init__(length, start, where)
        self.batch = batch

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        return (self.batch(step) for step in range(first, last))


class WorkerStream(StepLoader):
    """Batches that worker processes make.

    Args:
        batch: makes the batch of a step.
        workers: processes.
        length: as of `StepLoader`.
        start: as of `StepLoader`.
        where: as of `StepLoader`.
    """

    def __init__(
        self,
        batch: Callable[[int], Batch],
        workers: int,
        length: int,
        start: int = 0,
        where: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(length, start, where)
        self.batch, self.workers = batch, workers

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        data = Computed(self.batch, last)
        return iter(RaisingLoader(data, sampler=range(first, last), batch_size=None, num_workers=self.workers))


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
