"""Images with texts made from their classes, and several sets of images as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from mfm_lightning.data.images.opening import open_images
from mfm_lightning.data.images.source import LabelledImages


class CaptionedImages(LabelledImages):
    """Images of a source with captions by their classes.

    Args:
        source: a folder or file, or a source of `mfm_lightning.data.images`.
        captions: one text with {class} in it for the class's name, or a text for each class, in the order of labels.
        general: a text that fits all classes, which some images have in place of their own.
        every: which: each so many-th.

    Raises:
        ValueError: for another number of captions than of classes, or one that is empty.
    """

    has_captions = True

    def __init__(
        self,
        source: str | LabelledImages,
        captions: str | Sequence[str],
        general: str | None = None,
        every: int = 5,
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every} must be at least 1")
        self.source, self.given, self.general, self.every = open_images(source), captions, general, every

    @cached_property
    def captions(self) -> list[str]:
        """The text of each class."""
        names = self.source.class_names
        if isinstance(self.given, str):
            if "{class}" not in self.given:
                raise ValueError(f"captions {self.given!r}: expected {{class}} in it, or a text for each class")
            found = [self.given.replace("{class}", name) for name in names]
        else:
            found = list(self.given)
        if len(found) != len(names):
            raise ValueError(f"{len(found)} captions for {len(names)} classes ({', '.join(names)}): expected one each")
        if any(not text.strip() for text in (*found, self.general or "-")):
            raise ValueError(f"captions {found}, general {self.general!r}: expected texts that are not empty")
        return found

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        _ = self.captions  # wrong ones are refused before any image is read
        return self.source.labels, self.source.class_names

    @property
    def contents(self) -> object:
        return self.source.contents

    def image(self, i: int) -> Image.Image:
        return self.source.image(i)

    def caption(self, i: int) -> str:
        if self.general is not None and i % self.every == 0:
            return self.general
        return self.captions[int(self.labels[i])]

    def place(self, i: int) -> str:
        return self.source.place(i)


class JoinedImages(LabelledImages):
    """The images of several sources, one after the other; each source's classes follow those before it.

    Args:
        sources: folders, files or sources, at least one; with captions all or none.

    Raises:
        ValueError: for no sources, captions of some alone, or two classes of one name.
    """

    def __init__(self, sources: Sequence[str | LabelledImages]) -> None:
        self.sources = [open_images(source) for source in sources]
        if not self.sources:
            raise ValueError("sources [] has no images: give at least one")
        with_captions = {source.has_captions for source in self.sources}
        if len(with_captions) > 1:
            raise ValueError("some sources have captions and some have none: give all, or none (CaptionedImages)")
        self.has_captions = with_captions.pop()

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source.labels) for source in self.sources])

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        names = [name for source in self.sources for name in source.class_names]
        if twice := [name for name, number in Counter(names).items() if number > 1]:
            raise ValueError(f"two sources have a class {twice[0]!r}: names of classes must differ")
        firsts = np.cumsum([0, *(len(source.class_names) for source in self.sources[:-1])])
        labels = [source.labels + first for source, first in zip(self.sources, firsts, strict=True)]
        return np.concatenate(labels), names

    @property
    def contents(self) -> object:
        found = [source.contents for source in self.sources]
        return None if None in found else found

    def _find(self, i: int) -> tuple[LabelledImages, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.sources[k], i - (int(self._ends[k - 1]) if k else 0)

    def image(self, i: int) -> Image.Image:
        source, row = self._find(i)
        return source.image(row)

    def caption(self, i: int) -> str:
        source, row = self._find(i)
        return source.caption(row)

    def place(self, i: int) -> str:
        source, row = self._find(i)
        return source.place(row)
