"""Batches of latents from shards, each a function of its number alone; the part that runs in a DataLoader's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mfm_lightning.conditions import Batch
from mfm_lightning.data.latents.batch_ring import BatchRing, Place, Rows, as_it_is
from mfm_lightning.data.latents.epoch_plan import EpochPlan
from mfm_lightning.data.latents.index import LatentIndex
from mfm_lightning.data.latents.shard_reader import CorruptSampleError, ShardReader
from mfm_lightning.data.skipped import Corrupt, Skipped
from mfm_lightning.data.stream import StepLoader

PREFETCH = 3  # batches that a worker has ready
_ROWS = 8  # latents that are drawn together


class LostWorkerError(ValueError):
    """A process that reads was killed or crashed."""


@dataclass
class Reading:
    """How samples become batches.

    Args:
        flip: take the mirror image's moments for half of the samples.
        scale: factor of the latents z: states are (z - shift) scale.
        shuffle_buffer: samples in memory that are shuffled with each other, in each worker.
        corrupt: "raise", or "skip" a corrupt sample and count it; the next good one of the buffer takes its place.
        allow_pipe: run the command of a `pipe:` folder.
        shift: of the latents.
    """

    flip: bool = True
    scale: float = 0.18215
    shuffle_buffer: int = 2048
    corrupt: Corrupt = "raise"
    allow_pipe: bool = False
    shift: float = 0.0


@dataclass
class _Block:
    """Samples in memory: their bytes `(n, stride)`, moments `(n, 2, 2, D)` float16 among them, labels and places
    `(n,)`, and what is wrong with some."""

    which: tuple[int, int, int]
    order: np.ndarray
    samples: np.ndarray
    moments: np.ndarray
    labels: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    wrong: dict[int, str]


class LatentStream(IterableDataset):
    """Batches `start..length-1` as `(x1 float32 (B, C, H, W), label (B,) long)`, shared out to workers in turn; of
    shards with captions `(x1, {label, prompts, text, ...})`, the embeddings in the type they are kept in.

    `batch(step)` depends on nothing but the step (and what the constructor was given), so that it can begin anywhere.
    It keeps the block of samples that a batch came from, hence is fast for steps in a worker's order.

    Args:
        index: of the folder of shards.
        folder: where the shards are.
        rows: by shard, the kept samples, ascending.
        plan: the order.
        reading: how samples become batches.
        start: the first step; in training a step's epoch is `step // plan.batches`.
        length: number of steps.
        skipped: counts corrupt samples.
    """

    def __init__(
        self,
        index: LatentIndex,
        folder: str,
        rows: Sequence[np.ndarray],
        plan: EpochPlan,
        reading: Reading,
        start: int = 0,
        length: int | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        self.index, self.folder, self.rows, self.plan, self.reading = index, folder, rows, plan, reading
        self.start, self.length = start, plan.batches if length is None else length
        self.skipped = Skipped() if skipped is None else skipped
        self._reader: ShardReader | None = None
        self._block: _Block | None = None
        self.ring: BatchRing | None = None
        self._buffer = np.empty((0, index.layout.stride), dtype=np.uint8)

    def __iter__(self) -> Iterator[Batch | Place]:
        """Batches; in a worker, places of its ring, where the batches are."""
        worker = get_worker_info()
        if worker is None or self.ring is None:
            yield from map(self.batch, range(self.start, self.length))
            return
        for number, step in enumerate(range(self.start + worker.id, self.length, worker.num_workers)):
            place = worker.id, number, self.plan.batch_sizes[step % self.plan.batches]
            yield *place, self._fill(step, self.ring.slot(*place))

    def shards_of(self, step: int) -> list[str]:
        """Names of the shards that a step's batch is drawn from."""
        which, size = self._place(step)
        return [self.index.shards[shard].name for shard, _ in self._rows_of(which, size)]

    def _place(self, step: int) -> tuple[tuple[int, int, int], int]:
        """Epoch, lane and number of the block of a step's batch, and the samples of such a block."""
        epoch, p = divmod(step, self.plan.batches)
        per_block = max(1, self.reading.shuffle_buffer // self.plan.batch_size)
        return (epoch, p % self.plan.lanes, p // self.plan.lanes // per_block), per_block * self.plan.batch_size

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            CorruptSampleError: for a corrupt sample with "raise"; with "skip" if a whole block is corrupt.
        """
        size = self.plan.batch_sizes[step % self.plan.batches]
        rows = Rows.empty(size, self.index.state_shape, self.index.captions)
        return rows.batch(self._fill(step, rows))

    def _fill(self, step: int, out: Rows) -> list[str] | None:
        """Put the batch of a step where it belongs, and return its captions."""
        epoch, p = divmod(step, self.plan.batches)
        which, per_block = self._place(step)
        if self._block is None or self._block.which != which:
            self._block = self._load(which, per_block)
        at, size = p // self.plan.lanes * self.plan.batch_size % per_block, self.plan.batch_sizes[p]
        seed = np.random.SeedSequence([self.plan.seed, 1, epoch, self.plan.rank, p])
        picked = self._draw(self._block, self._block.order[at : at + size], seed, out.x1)
        out.label.copy_(torch.from_numpy(self._block.labels[picked]))
        layout = self.index.layout
        if (form := layout.text) is None:
            return None
        samples, at = self._block.samples, layout.embedding_at
        form.read(samples[picked, at : at + form.file_bytes], out.text)
        return form.captions(samples[picked, layout.caption_at : layout.caption_at + form.caption_bytes])

    # -- reading -------------------------------------------------------------------------------------------------------

    def _rows_of(self, which: tuple[int, int, int], size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Shards of a block, each with its rows."""
        epoch, lane, number = which
        last = min((number + 1) * size, self.plan.lane_length(lane))
        for stretch in self.plan.stretches(epoch, lane, number * size, last) if number * size < last else ():
            yield stretch.shard, self.rows[stretch.shard][stretch.first : stretch.last]

    def _load(self, which: tuple[int, int, int], size: int) -> _Block:
        epoch, lane, number = which
        first, last = number * size, min((number + 1) * size, self.plan.lane_length(lane))
        n, layout = last - first, self.index.layout
        if len(self._buffer) < n:  # kept, for fresh memory costs as much as reading into it
            self._buffer = np.empty((n, layout.stride), dtype=np.uint8)
        if self._reader is None:
            self._reader = ShardReader(self.index, self.folder, self.reading.allow_pipe)
        shards, rows, at, wrong = np.empty(n, np.int64), np.empty(n, np.int64), 0, {}
        for shard, chosen in self._rows_of(which, size):
            end = at + len(chosen)
            shards[at:end], rows[at:end] = shard, chosen
            found = self._reader.read(shard, chosen, self._buffer[at:end])
            wrong.update({at + i: why for i, why in found.items()})
            at = end
        for shard, chosen in self._rows_of((epoch, lane, number + 1), size):
            self._reader.announce(shard, chosen)
        samples = self._buffer[:n]
        bytes_ = samples[:, layout.moments_at : layout.moments_at + layout.moments_bytes]
        moments = bytes_.view("<f2").reshape(n, 2, 2, prod(layout.state_shape))
        labels = np.array([self.index.shards[s].labels[r] for s, r in zip(shards.tolist(), rows.tolist(), strict=True)])
        order = np.arange(n)
        if self.plan.train:
            np.random.default_rng([self.plan.seed, 2, epoch, self.plan.rank, lane, number]).shuffle(order)
        return _Block(which, order, samples, moments, labels, shards, rows, wrong)

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _draw(self, block: _Block, picked: np.ndarray, seed: np.random.SeedSequence, x1: Tensor) -> np.ndarray:
        """Fill x1, and return which samples of the block it is from: corrupt ones are replaced."""
        x1, (draw, mirror) = x1.flatten(1), seed.generate_state(2).tolist()
        flip = self.plan.train and self.reading.flip
        flips = np.random.default_rng(mirror).integers(2, size=len(x1)) if flip else np.zeros(len(x1), np.int64)
        bad = [i for i, at in enumerate(picked.tolist()) if at in block.wrong] if block.wrong else []
        for _ in range(len(block.order)):  # what takes a corrupt sample's place may be corrupt, too
            for i in bad:
                picked = self._replace(block, picked, i)
            x1.normal_(generator=torch.Generator().manual_seed(draw))
            self._sample(block, picked, flips, x1)
            if torch.isfinite(x1.sum()):
                return picked
            bad = (~torch.isfinite(x1).all(dim=1)).nonzero().flatten().tolist()
        raise CorruptSampleError(
            f"{self._name(block, int(picked[bad[0]]))}: all that were read with it are corrupt too"
        )

    def _sample(self, block: _Block, picked: np.ndarray, flips: np.ndarray, x1: Tensor) -> None:
        """Noise `(B, D)` to latents, mean + std * noise, shifted and scaled; a few rows at a time, which stay in the
        processor's cache."""
        for i in range(0, len(picked), _ROWS):
            rows = slice(i, i + _ROWS)
            mean, std = torch.from_numpy(block.moments[picked[rows], flips[rows]]).unbind(dim=1)
            latents = torch.addcmul(mean, std, x1[rows], out=x1[rows])
            if self.reading.shift:
                latents.sub_(self.reading.shift)
            latents.mul_(self.reading.scale)

    def _replace(self, block: _Block, picked: np.ndarray, i: int) -> np.ndarray:
        """`picked` with the next good sample in place of its i-th, which is corrupt: counted, or raised."""
        n, at = len(block.order), int(picked[i])
        name = self._name(block, at)
        message = f"{name}: {block.wrong.get(at, 'its moments are not finite')}"
        if self.reading.corrupt == "raise":
            raise CorruptSampleError(
                f"{message}; mfm prepare-latents --verify finds all such, corrupt: skip goes on without them"
            )
        good = next(((at + k) % n for k in range(1, n) if (at + k) % n not in block.wrong), None)
        if good is None:
            raise CorruptSampleError(f"{message}; all that were read with it are corrupt too")
        self.skipped.add(name, message)
        picked = picked.copy()
        picked[i] = good
        return picked

    def _name(self, block: _Block, at: int) -> str:
        return f"sample {block.rows[at]} of {self.index.shards[block.shards[at]].name} in {self.folder}"


class LatentLoader(StepLoader):
    """The stream by way of worker processes; in validation and test all passes are the same.

    Args:
        stream: its plan has as many lanes as there are workers.
        num_workers: processes that read; none: the caller itself.
        prefetch_factor: batches that each of them has ready.
        where: as of `StepLoader`.
    """

    def __init__(
        self,
        stream: LatentStream,
        num_workers: int,
        prefetch_factor: int = PREFETCH,
        where: Callable[[], int] | None = None,
    ) -> None:
        first = None if stream.plan.train else lambda: stream.start
        super().__init__(stream.length, stream.start, where or first)
        self.stream, self.num_workers, self.prefetch_factor = stream, num_workers, prefetch_factor

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        if not self.num_workers:
            yield from map(self.stream.batch, range(first, last))
            return
        stream, plan = copy(self.stream), self.stream.plan
        stream.start, stream.length = first, last
        stream.ring = BatchRing(
            self.num_workers, self.prefetch_factor, plan.batch_size, stream.index.state_shape, stream.index.captions
        )
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else each start would take a number from training's noise
        )
        try:
            yield from map(stream.ring.take, loader)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or isinstance(error, CorruptSampleError):
                raise
            raise LostWorkerError(
                f"{self.stream.folder}: a data worker has died ({str(error).strip().splitlines()[0]}). The system "
                "kills one that takes too much memory: lower data.num_workers or data.shuffle_buffer"
            ) from error
