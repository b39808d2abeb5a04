"""What the DataModule asks of a set of labelled images, wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from mfm_lightning.data.class_folders import MOST_CLASSES, shortened


class LabelledImages(ABC):
    """Images with a label each, in a fixed order. Making one reads nothing; the first question does.

    Attributes:
        has_captions: each has a text, too.
    """

    has_captions = False

    @abstractmethod
    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        """The label of each image, `(N,)` int64 from 0 on, and a name for each label."""

    @cached_property
    def _classes(self) -> tuple[np.ndarray, list[str]]:
        return self.read_classes()

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` int64, from 0 on."""
        return self._classes[0]

    @property
    def class_names(self) -> list[str]:
        """A name for each label."""
        return self._classes[1]

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """The image i, of mode "L" (grey) or "RGB".

        Raises:
            ImageError: naming it, if it cannot be decoded.
            OSError: if it cannot be read.
        """

    def caption(self, i: int) -> str:
        """The text of image i, of a source that `has_captions`."""
        raise ValueError(f"{self.place(i)} has no caption")

    @property
    def contents(self) -> object:
        """What tells that images were replaced, as JSON; None where that is not known."""
        return None

    @abstractmethod
    def place(self, i: int) -> str:
        """Where the image i is, for messages."""

    def line(self) -> str:
        """What was found, such as "2 images of 2 classes: 0 cat, 1 dog"."""
        return f"{len(self.labels)} images of {len(self.class_names)} classes: {names_line(self.class_names)}"


def names_line(names: Sequence[str], labels: Sequence[int] | None = None) -> str:
    """Labels with their names, the first ones and the last; of all of them, or of these labels."""
    kept = range(len(names)) if labels is None else labels
    return ", ".join(shortened([f"{i} {names[i]}" if names[i] != str(i) else names[i] for i in kept]))


def number_names(labels: np.ndarray, where: str) -> list[str]:
    """Names "0", "1", ... of classes that have none.

    Raises:
        ValueError: for no labels, or one outside 0..`MOST_CLASSES`-1.
    """
    if not len(labels):
        raise ValueError(f"no images in {where}")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise ValueError(f"{where} has labels {labels.min()}..{labels.max()}: expected numbers of classes from 0 on")
    return [str(label) for label in range(int(labels.max()) + 1)]
