"""Which samples a rank reads in an epoch, and in which order: arithmetic on the index alone, no file is opened.

The shards in the epoch's order are one line of N samples. Each rank has a stretch of it, of the same length for all,
and each worker ("lane") a stretch of its rank's, so that tars are read from front to back and no two read the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FewShards = Literal["split", "error", "resample"]


@dataclass(frozen=True)
class Stretch:
    """Positions `first..last-1` among the kept samples of a shard."""

    shard: int
    first: int
    last: int


class EpochPlan:
    """The order of a split for one rank.

    In training all ranks have `N // (W B)` batches of B; what is left over is another part of the data in each epoch.
    Otherwise all have `ceil(N / W)` samples, the last batch being what is left; where W does not divide N, neighbouring
    ranks share one sample (as with DistributedSampler).

    Args:
        counts: samples kept of each shard.
        batch_size: B, of one rank.
        rank: this process, from 0.
        world_size: W, the number of ranks.
        lanes: workers of a rank, each with every `lanes`-th batch.
        seed: of the order.
        train: shuffled, and without the last batch.
        few_shards: what to do in training with fewer shards than ranks, or fewer than W B samples: "split" lets ranks
            share shards (each its own part), "error" refuses, "resample" draws shards for each rank, with replacement.

    Raises:
        ValueError: if there are no samples; too few shards with "error", too few samples unless "resample".
    """

    def __init__(
        self,
        counts: Sequence[int],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        lanes: int = 1,
        seed: int = 0,
        train: bool = True,
        few_shards: FewShards = "split",
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.lanes, self.seed, self.train = max(1, lanes), seed, train
        N, shards, needed = int(self.counts.sum()), int((self.counts > 0).sum()), world_size * batch_size
        if not N:
            raise ValueError("no samples: the shards are empty, or the class filter leaves none")
        if train and few_shards == "error" and shards < world_size:
            raise ValueError(
                f"{shards} shards for {world_size} ranks: prepare smaller shards, or set few_shards: split"
            )
        if train and few_shards != "resample" and needed > N:
            raise ValueError(
                f"{N} samples are not one batch of {batch_size} for each of {world_size} ranks: lower batch_size, or "
                "set few_shards to resample"
            )
        self.resampled = train and few_shards == "resample" and (shards < world_size or needed > N)
        if train:
            self.batches = max(1, N // needed)
            self._length = self.batches * batch_size
            self._begin = rank * self._length
        else:
            self._length = -(-N // world_size)
            self.batches = -(-self._length // batch_size)
            self._begin = rank * N // world_size
        sizes = np.minimum(batch_size, self._length - batch_size * np.arange(self.batches))
        self.batch_sizes = sizes.tolist()
        self._lane_lengths = [int(sizes[lane :: self.lanes].sum()) for lane in range(self.lanes)]

    def lane_length(self, lane: int) -> int:
        """Samples of a lane in an epoch."""
        return self._lane_lengths[lane]

    def stretches(self, epoch: int, lane: int, first: int, last: int) -> list[Stretch]:
        """Where samples `first..last-1` of a lane's line lie."""
        if self.resampled:
            return self._drawn(epoch, lane, first, last)
        order, offset = self._order(epoch)
        begin = self._begin + sum(self._lane_lengths[:lane]) + offset
        return _cut(order, self.counts[order], begin + first, begin + last)

    def _order(self, epoch: int) -> tuple[np.ndarray, int]:
        """Shards in the epoch's order, and where the first rank begins: else the same samples were always left over."""
        if not self.train:
            return np.arange(len(self.counts)), 0
        random = np.random.default_rng([self.seed, epoch])
        return random.permutation(len(self.counts)), int(random.integers(self.counts.sum()))

    def _drawn(self, epoch: int, lane: int, first: int, last: int) -> list[Stretch]:
        """A line of shards drawn with replacement, each begun at any of its samples."""
        random = np.random.default_rng([self.seed, epoch, self.rank, lane])
        filled, line, at = np.flatnonzero(self.counts), [], 0
        while at < last:
            shard = int(random.choice(filled))
            begin, count = int(random.integers(self.counts[shard])), int(self.counts[shard])
            low, high = max(first - at, 0), min(last - at, count)
            if low < high:
                line += _cut(np.array([shard]), np.array([count]), begin + low, begin + high)
            at += count
        return line


def _cut(order: np.ndarray, counts: np.ndarray, first: int, last: int) -> list[Stretch]:
    """Samples `first..last-1` of the shards one after the other, in a circle."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    found = []
    while first < last:
        turn, at = divmod(first, total)
        k = int(np.searchsorted(ends, at, side="right"))
        start = int(ends[k] - counts[k])
        stop = min(last - turn * total, int(ends[k]))
        found.append(Stretch(int(order[k]), at - start, stop - start))
        first += stop - at
    return found
