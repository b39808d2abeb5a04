"""What the DataModule asks of stored latents, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
from torch import Tensor

from mfm_lightning.data.class_folders import MOST_CLASSES


class LatentFileError(ValueError):
    """A file of latents that cannot be read, or does not hold what is asked for."""


class StoredLatents(ABC):
    """Arrays of latents or their moments, with a label each or none, in a fixed order. Making one reads nothing; the
    first question does."""

    has_mirrored = False  # whether there are latents of the mirror images, too

    @abstractmethod
    def read_labels(self) -> tuple[int, np.ndarray | None]:
        """How many arrays there are, and their labels `(N,)`, if they have any."""

    @cached_property
    def _labels(self) -> tuple[int, np.ndarray | None]:
        num, labels = self.read_labels()
        if not num:
            raise LatentFileError(f"no latents in {self}")
        if labels is not None:
            if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
                raise LatentFileError(
                    f"{self} has {num} latents and labels {labels.dtype} {labels.shape}: expected whole numbers, "
                    f"({num},)"
                )
            if labels.min() < 0 or labels.max() >= MOST_CLASSES:
                raise LatentFileError(
                    f"{self} has labels {labels.min()}..{labels.max()}: expected numbers of classes from 0 on"
                )
            labels = labels.astype(np.int64)
        return num, labels

    def __len__(self) -> int:
        return self._labels[0]

    @property
    def labels(self) -> np.ndarray | None:
        """`(N,)` int64, from 0 on; None where there are none."""
        return self._labels[1]

    @abstractmethod
    def array(self, i: int, mirrored: bool = False) -> Tensor:
        """The array i as it is stored; with `mirrored` that of its mirror image.

        Raises:
            LatentFileError: naming it, if it cannot be read.
            OSError: if its file cannot be read.
        """

    @abstractmethod
    def place(self, i: int) -> str:
        """Where the array i is, for messages."""

    @abstractmethod
    def __str__(self) -> str:
        """Where all are, for messages."""
