"""Image files in a folder."""

from __future__ import annotations

import os
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from mfm_lightning.data.class_folders import ClassTree, find_images
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.utils.decoding import read_image
from mfm_lightning.utils.image_files import is_image, walk

_LOOKED_AT = 10_000  # files, to tell what a folder without images is


class ImageFolder(LabelledImages):
    """`ROOT/CLASS/*.jpg`, or images of one class side by side in a folder.

    Args:
        root: of the tree.
        class_index: file of labels by class; without, the names' order (numeric where all are whole numbers).

    Raises:
        FileNotFoundError, InputError: as `find_images`, when it is first read.
    """

    def __init__(self, root: str, class_index: str | None = None) -> None:
        self.root, self.class_index = Path(root), None if class_index is None else Path(class_index)

    @cached_property
    def _tree(self) -> ClassTree:
        try:
            tree = find_images(self.root, self.class_index)
        except FileNotFoundError as error:
            if (reader := _reader_of(self.root)) is None:
                raise
            raise FileNotFoundError(f"{error}: such a folder is read by {reader}") from error
        tree.left_out.report(self.root)
        return tree

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        names = self._tree.class_to_idx
        labels = np.array([image.label for image in self._tree.images], dtype=np.int64)
        return labels, sorted(names, key=names.__getitem__)

    @property
    def contents(self) -> object:
        return [(image.size, image.mtime_ns) for image in self._tree.images]

    def image(self, i: int) -> Image.Image:
        return read_image(Path(self.place(i)))

    def place(self, i: int) -> str:
        return str(self.root / self._tree.images[i].name)

    def line(self) -> str:
        return self._tree.line()


def _reader_of(root: Path) -> str | None:
    """What reads a folder without images, by the first files that say so; None where there is an image, or none says
    so."""
    readers = {
        ".parquet": "mfm_lightning.data.images.HuggingFaceImages (its path)",
        ".arrow": "mfm_lightning.data.images.HuggingFaceImages (its path)",
        ".tar": "mfm_lightning.data.WebDatasetDataModule (its urls)",
        "-ubyte": "mfm_lightning.data.images.IdxImages (the path of its images, such as train-images-idx3-ubyte)",
        ".npz": "mfm_lightning.data.images.NpzImages (the path of a file)",
        ".npy": "mfm_lightning.data.LatentDataModule (its source)",
        ".safetensors": "mfm_lightning.data.LatentDataModule (its source)",
    }
    found = None
    for entry in islice(walk(root), _LOOKED_AT) if root.is_dir() else ():
        if is_image(entry.name):
            return None
        ending = "-ubyte" if entry.name.endswith("-ubyte") else os.path.splitext(entry.name)[1].lower()
        found = found or readers.get(ending)
    return found
