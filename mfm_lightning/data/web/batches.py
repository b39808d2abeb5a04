"""Samples to batches, for one rank and its worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from mfm_lightning.conditions import Batch
from mfm_lightning.data.stream import StepLoader
from mfm_lightning.data.web.samples import SampleReader
from mfm_lightning.data.web.shards import Faults, Rank, ShardOrder, named, of_worker, pipeline, share
from mfm_lightning.utils.loading import raised

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epochs:
    """How the batches of training come from shards.

    Args:
        urls: of the shards.
        read: of a sample.
        faults: what is done where something is wrong.
        batch_size: of one rank.
        batches: of one rank in an epoch.
        shuffle_buffer: samples of a worker that are shuffled with each other.
        rank: of this process.
        resampled: as of `ShardOrder`.
        seed: of the order.
    """

    urls: Sequence[str]
    read: SampleReader
    faults: Faults
    batch_size: int
    batches: int
    shuffle_buffer: int
    rank: Rank
    resampled: bool
    seed: int

    def stretches(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Epochs that the steps first..last-1 lie in, each with its first and its last step."""
        while first < last:
            end = min(last, (first // self.batches + 1) * self.batches)
            yield first // self.batches, first, end
            first = end

    def pass_over(self, epoch: int, start: int, number: int) -> Iterator[Batch]:
        """So many batches of an epoch, of one worker. What begins within an epoch has an order of its own: a run that
        is often stopped would train on the first shards alone.

        Raises:
            ValueError: if no shard has a sample that can be used.
        """
        from webdataset.filters import batched

        key, worker = (self.seed, epoch, start - epoch * self.batches), get_worker_info()
        random = np.random.default_rng([*key, self.rank.number, 0 if worker is None else worker.id])
        order = ShardOrder(self.rank, self.resampled, *key)
        samples = pipeline(
            self.urls,
            self.faults,
            order,
            partial(_shuffled, size=self.shuffle_buffer, seed=int(random.integers(2**63))),
            partial(_mapped, read=self.read, random=random, faults=self.faults),
        )
        batches = batched(self.batch_size, collation_fn=self.read.collate, partial=False)
        share = self.batches * self.batch_size // (1 if worker is None else worker.num_workers)
        said_once = (start, self.rank.number, 0 if worker is None else worker.id) == (0, 0, 0)
        drawn = self.resampled and self.batches == 1  # a batch of more samples than there are
        yield from islice(batches(self._passes(samples, order, share if said_once and not drawn else 0)), number)

    def _passes(self, samples: Any, order: ShardOrder, share: int) -> Iterator[Any]:
        """Samples of pass after pass. After one without any (its shards are damaged) all shards are gone through. A
        first one of less than half of `share`, the samples of an epoch, is said."""
        while True:
            found = 0
            for found, sample in enumerate(samples, 1):  # noqa: B007
                yield sample
            if not found and order.all_shards:
                raise ValueError(f"no sample that can be used in {named(self.urls)}")
            if 2 * found < share and found:
                log.warning(
                    "the shards of a data worker have %d samples, and its epoch %d: num_samples is too large, or "
                    "shards are very uneven; %s", found, share, named(self.urls),
                )  # fmt: skip
            order.all_shards, share = not found, 0


def _shuffled(samples: Iterator[Any], size: int, seed: int) -> Iterator[Any]:
    from webdataset.filters import shuffle

    return shuffle(size, seed=seed)(samples)


def _mapped(samples: Iterator[Any], read: SampleReader, random: np.random.Generator, faults: Faults) -> Iterator[Any]:
    from webdataset.filters import map as mapped

    return mapped(lambda sample: read(sample, random), handler=faults)(samples)


class WebBatches(IterableDataset):
    """Batches of the steps first..last-1 of a rank, dealt out to its workers in turn, in each epoch from the first
    worker on: a worker whose turn is left out at an epoch's end gives None. An error is what comes back.

    Args:
        epochs: where they come from.
        first: the first step.
        last: the step after the last one.
    """

    def __init__(self, epochs: Epochs, first: int, last: int) -> None:
        self.epochs, self.first, self.last = epochs, first, last

    def __iter__(self) -> Iterator[Batch | Exception | None]:
        worker = get_worker_info()
        k, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            for epoch, start, end in self.epochs.stretches(self.first, self.last):
                if number := len(range(start + k, end, of)):
                    yield from self.epochs.pass_over(epoch, start, number)
                if number < len(range(start, end, of)):
                    yield None
        except (OSError, ValueError) as error:
            yield error


class HeldOut(IterableDataset):
    """Batches of one pass over shards in their order: all ranks have the same number of them, of equal sizes.

    Args:
        epochs: urls, reading and so on; nothing of its order.
    """

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs

    def __iter__(self) -> Iterator[Batch | Exception]:
        from webdataset.filters import batched

        epochs, worker = self.epochs, get_worker_info()
        random = np.random.default_rng([0, epochs.rank.number, 0 if worker is None else worker.id])
        stages = [partial(_mapped, read=epochs.read, random=random, faults=epochs.faults)]
        shared = partial(share, rank=epochs.rank)
        # what one rank skips alone would leave it with fewer batches
        stages = [*stages, shared] if epochs.faults.corrupt == "skip" else [shared, *stages]
        try:
            samples = pipeline(epochs.urls, epochs.faults, of_worker, *stages)
            yield from batched(epochs.batch_size, collation_fn=epochs.read.collate)(iter(samples))
        except (OSError, ValueError) as error:
            yield error


def raising(batches: IterableDataset, workers: int) -> Iterator[Batch]:
    """The batches by way of webdataset's `WebLoader`, without None; raises the errors among them."""
    from webdataset.compat import WebLoader

    loader = WebLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else each start would take a number from training's noise
    )
    return (batch for batch in raised(loader) if batch is not None)


class WebStream(StepLoader):
    """Training batches, each pass by a loader of its own. One that begins within an epoch begins its shards anew, in
    another order: what was left of them may not be seen in that epoch. The first such pass is said.

    Args:
        epochs: where they come from.
        workers: processes.
        length: as of `StepLoader`.
        start: as of `StepLoader`.
        where: as of `StepLoader`.
    """

    def __init__(
        self, epochs: Epochs, workers: int, length: int, start: int = 0, where: Callable[[], int] | None = None
    ) -> None:
        super().__init__(length, start, where)
        self.epochs, self.workers, self._said = epochs, workers, False

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        epoch, step = divmod(first, self.epochs.batches)
        if step and not self._said:
            self._said = True
            log.warning(
                "training goes on at epoch %d of the shards, not at its step %d: they are begun anew in another order, "
                "here and wherever reading begins within an epoch (LatentShards and ImageDataModule go on at the step)",
                epoch, step,
            )  # fmt: skip
        return raising(WebBatches(self.epochs, first, last), self.workers)


class HeldOutLoader:
    """Validation batches, the same in each pass; how many there are shows when they are read.

    Args:
        epochs: as of `HeldOut`.
        workers: processes.
    """

    def __init__(self, epochs: Epochs, workers: int) -> None:
        self.epochs, self.workers = epochs, workers

    def __iter__(self) -> Iterator[Batch]:
        return raising(HeldOut(self.epochs), self.workers)
