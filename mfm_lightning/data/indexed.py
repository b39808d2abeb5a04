"""Samples that are read by their number, in an order that resumes exactly on any number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import NumberedSamples, Share, StepDataModule, share_of
from mfm_lightning.data.order import batch_order
from mfm_lightning.data.stream import BatchStream, StepLoader, WorkerStream
from mfm_lightning.utils.digests import digest
from mfm_lightning.utils.loading import Computed, RaisingLoader, collated


@dataclass(frozen=True, eq=False)
class IndexedBatches(ABC):
    """The training batch of each step, for one rank, in the order of `batch_order`.

    Args:
        batch_size: B, of one rank.
        rank: this process, from 0.
        world_size: number of processes.
        seed: of order, and of what is drawn.
    """

    batch_size: int
    rank: int
    world_size: int
    seed: int

    @property
    @abstractmethod
    def rows(self) -> np.ndarray:
        """The numbers of the training samples in their source, `(N,)`."""

    @abstractmethod
    def __call__(self, step: int) -> Batch:
        """The batch of a step."""

    def index(self, step: int) -> np.ndarray:
        """Which of the training samples, `(B,)`."""
        return batch_order(len(self.rows), step, self.batch_size, self.rank, self.world_size, self.seed)

    def random(self, step: int) -> np.random.Generator:
        """What a batch is drawn with."""
        return np.random.default_rng([self.seed, step, self.rank])


@dataclass(frozen=True)
class Samples:
    """Held-out samples: `sample(i)` is the i-th of `number`."""

    number: int
    sample: Callable[[int], Any]


def part_fingerprint(labels: np.ndarray, sample: Callable[[int], Any]) -> dict[str, Any]:
    """What tells a split from others: its number of samples, the SHA-256 of its labels `(N,)` in order, and of its
    first and last sample. All of a large set would take too long to read."""
    first, last = (digest(torch.as_tensor(sample(i)[0])) for i in (0, len(labels) - 1))
    order = digest(torch.from_numpy(labels.astype(np.int64)))
    return {"samples": len(labels), "labels": order, "first": first, "last": last}


class IndexedDataModule(StepDataModule):
    """A subclass says its training batches by rank, and what is held out.

    Attributes:
        workers: processes that make batches, for each device; 0: the training process itself.
    """

    @property
    @abstractmethod
    def workers(self) -> int: ...

    @abstractmethod
    def batches(self, rank: int = 0, world_size: int = 1) -> IndexedBatches:
        """The training batches of a rank, by step."""

    @abstractmethod
    def held_out(self, name: str) -> Samples | None:
        """The samples of "val" or "test"; None where there are none."""

    @abstractmethod
    def place(self, row: int) -> str:
        """Where a training sample is, by its number in the source."""

    def train_batch(self, step: int) -> Batch:
        return self.batches(*self.rank())(step)

    def train_dataloader(self) -> StepLoader:
        start, length = self.steps()
        batches = self.batches(*self.rank())
        if not self.workers:
            return BatchStream(batches, length, start, self.position)
        return WorkerStream(batches, self.workers, length, start, self.position)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.held_out("val"))

    def test_dataloader(self) -> DataLoader | list:
        return self._loader(self.held_out("test"))

    def predict_dataloader(self) -> DataLoader | list:
        if (found := self.held_out("test")) is None:
            return []
        numbered = NumberedSamples(found.number, found.sample)
        return self._loader(Samples(found.number, numbered.__getitem__), share_of(self, numbered))

    @property
    def samples_identity(self) -> dict[str, Any]:
        """What tells the samples of `mfm predict` from others: their number, and the SHA-256 of first and last."""
        if (found := self.held_out("test")) is None:
            return {"number": 0}
        first, last = (digest(torch.as_tensor(found.sample(i)[0])) for i in (0, found.number - 1))
        return {"number": found.number, "first": first, "last": last}

    def _loader(self, samples: Samples | None, sampler: Share | None = None) -> DataLoader | list:
        if samples is None:
            return []
        data = Computed(samples.sample, samples.number)
        return RaisingLoader(
            data, batch_size=self.batch_size, num_workers=self.workers, collate_fn=collated, sampler=sampler
        )

    def origin(self, step: int) -> str:
        batches = self.batches(*self.rank())
        rows = batches.rows[batches.index(step)[:3]]
        return f"of {', '.join(self.place(int(row)) for row in rows)}, ..."
