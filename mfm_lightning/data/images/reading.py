"""Batches of images, decoded when they are asked for, here or in worker processes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.images.pixels import OtherForm, PixelForm, to_states
from mfm_lightning.data.images.splits import Split
from mfm_lightning.data.indexed import IndexedBatches
from mfm_lightning.data.skipped import Skipped
from mfm_lightning.utils.console import track
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.loading import Computed, RaisingLoader

log = logging.getLogger(__name__)
_CHUNK = 256  # images that a worker decodes at once
_TRIED = 32  # images of a class, and of all, in the place of one that cannot be decoded


def refused(error: ImageError) -> ImageError:
    """The error of an image that cannot be decoded, with what can be done."""
    return ImageError(f"{error}; corrupt: skip takes another image in its place")


class SplitReader:
    """The images of a split, from memory once `keep` has read them.

    Args:
        split: which images.
        form: what they are made to be.
        skipped: counts images that cannot be decoded, in whose place others of the split are taken (`_others`), with
            their labels; None to raise at them.
        name: of the split, for messages.
    """

    def __init__(self, split: Split, form: PixelForm, skipped: Skipped | None = None, name: str = "") -> None:
        self.split, self.form, self.skipped, self.name = split, form, skipped, name
        self.labels = torch.from_numpy(split.labels.astype(np.int64))
        self.kept: Tensor | None = None
        self.taken = np.arange(len(split))  # which image is kept for each
        self._damaged: set[int] = set()  # that this process has met: none is decoded twice

    def read(self, index: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """`(B, C, H, W)` uint8, and which images of the split these are, `(B,)`: `index`, but for skipped ones.

        Raises:
            ImageError: for one that cannot be decoded; where such are skipped, if none that is tried can.
            OSError: for one that cannot be read.
        """
        if self.kept is not None:
            return self.kept[torch.from_numpy(index)], self.taken[index]
        pairs = [self._read_in_place_of(int(i)) for i in index]
        return torch.from_numpy(np.stack([pixels for pixels, _ in pairs])), np.array([i for _, i in pairs], dtype=int)

    def _read_in_place_of(self, i: int) -> tuple[np.ndarray, int]:
        """The image i, or the first of `_others` that can be decoded; and its number in the split."""
        tried = 0
        for j in itertools.chain([i], self._others(i)):
            tried += 1
            if j in self._damaged:
                continue
            row = int(self.split.rows[j])
            try:
                return self.form.read(self.split.source, row), j
            except OtherForm:
                raise
            except ImageError as error:
                if self.skipped is None:
                    raise refused(error) from error
                self.skipped.add(self.split.source.place(row), str(error))
                self._damaged.add(j)
        raise ImageError(
            f"{self.split.source.place(int(self.split.rows[i]))} cannot be decoded, nor can {tried - 1} others of the "
            f"{len(self.split)} {self.name} images that were tried in its place"
        )

    def _others(self, i: int) -> Iterator[int]:
        """What is tried in the place of the image i, the same in every process: first of its class, then of any."""
        generator = np.random.default_rng(i)
        of_class = np.flatnonzero(self.split.labels == self.split.labels[i])
        yield from map(int, generator.choice(of_class, _TRIED))
        yield from map(int, generator.integers(len(self.split), size=_TRIED))

    def pixels(self, index: np.ndarray) -> Tensor:
        """`(B, C, H, W)` uint8; raises as `read`."""
        return self.read(index)[0]

    def states(self, index: np.ndarray) -> Batch:
        """States in [-1, 1], `(B, C, H, W)`, and labels `(B,)`; where images have captions, labels and prompts."""
        pixels, taken = self.read(index)
        return to_states(pixels), self.given(taken)

    def given(self, index: np.ndarray) -> Tensor | dict[str, Any]:
        """What is said of images: labels, or labels and prompts."""
        labels, source = self.labels[torch.from_numpy(index)], self.split.source
        if not source.has_captions:
            return labels
        return {"label": labels, "prompts": [source.caption(i) for i in self.split.rows[index].tolist()]}

    def all_states(self) -> Tensor:
        """The states of all images."""
        return to_states(self.pixels(np.arange(len(self.split))))

    @property
    def all_labels(self) -> Tensor:
        """Of `all_states`, `(N,)`; before `keep` has read them, those that are said of the images."""
        return self.labels[torch.from_numpy(self.taken)]

    @property
    def megabytes(self) -> float:
        """Of memory that `keep` takes."""
        return len(self.split) * self.form.channels * self.form.size**2 / 1e6

    def keep(self, workers: int) -> None:
        """Decode all images, once, and hold them in memory.

        Args:
            workers: processes that decode.
        """
        if self.kept is not None:
            return
        chunks = -(-len(self.split) // _CHUNK)
        loader = RaisingLoader(Computed(self._chunk, chunks), batch_size=None, num_workers=min(workers, chunks - 1))
        parts = iter(loader)
        read = [next(parts) for _ in track(range(chunks), lambda _: f"decoding {self.name} images")]
        self.kept, self.taken = torch.cat([pixels for pixels, _ in read]), np.concatenate([taken for _, taken in read])
        log.info("%s: %d images decoded into %.3g MB of memory", self.name, len(self.split), self.megabytes)

    def _chunk(self, k: int) -> tuple[Tensor, np.ndarray]:
        return self.read(np.arange(k * _CHUNK, min((k + 1) * _CHUNK, len(self.split))))

    def sample(self, i: int) -> tuple[Tensor, Any]:
        """State and label of an image, or its conditions."""
        x, given = self.states(np.array([i]))
        return x[0], given[0] if isinstance(given, Tensor) else {name: rows[0] for name, rows in given.items()}


@dataclass(frozen=True, eq=False)
class TrainBatches(IndexedBatches):
    """Of images.

    Args:
        reader: the training images.
        mirror: take half of them mirrored.
    """

    reader: SplitReader
    mirror: bool

    @property
    def rows(self) -> np.ndarray:
        return self.reader.split.rows

    def __call__(self, step: int) -> Batch:
        x, given = self.reader.states(self.index(step))
        if self.mirror:
            flipped = torch.from_numpy(self.random(step).random(len(x)) < 0.5)
            x[flipped] = x[flipped].flip(-1)
        return x, given
