"""Images in one file of numbers: IDX (MNIST's format) and `.npz` (the ADM evaluator's layout)."""

from __future__ import annotations

import gzip
import logging
import zipfile
import zlib
from abc import abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mfm_lightning.data.images.source import LabelledImages, number_names

log = logging.getLogger(__name__)
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ArrayImages(LabelledImages):
    """Images of one array `(N, H, W)` or `(N, H, W, 3)` of bytes, which is read whole into memory.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._others: list[str] = []  # arrays beside the images, for messages

    @abstractmethod
    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The images, and their labels if there are any."""

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}: expected one of images")
        pixels, labels = self._read()
        if (
            pixels.dtype != np.uint8
            or pixels.ndim not in (3, 4)
            or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3))
        ):
            raise ValueError(
                f"{self.path} has images {pixels.dtype} {pixels.shape}: expected uint8 (N, H, W), (N, H, W, 1) or "
                "(N, H, W, 3)"
            )
        if labels is None:
            others = f" (its other arrays: {', '.join(self._others)})" if self._others else ""
            log.warning("%s has no labels: its images are one class%s", self.path, others)
            labels = np.zeros(len(pixels), dtype=np.int64)
        if labels.shape == (len(pixels), 1):  # as MedMNIST has them
            labels = labels[:, 0]
        if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{self.path} has {len(pixels)} images and labels {labels.dtype} {labels.shape}: expected integers "
                f"({len(pixels)},), from 0 on"
            )
        return pixels[..., 0] if pixels.shape[3:] == (1,) else pixels, labels.astype(np.int64)

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        labels = self._arrays[1]
        return labels, number_names(labels, str(self.path))

    @property
    def contents(self) -> object:
        return [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.files()]

    def files(self) -> list[Path]:
        """What is read."""
        return [self.path]

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self._arrays[0][i])

    def place(self, i: int) -> str:
        return f"image {i} of {self.path}"


class NpzImages(ArrayImages):
    """`arr_0` `(N, H, W, 3)` or `(N, H, W)` uint8 of an `.npz`, and the labels in `arr_1`, as in ADM.

    Args:
        path: of the file.
        images: name of the images' array.
        labels: name of the labels' array; left out, arr_1, and without it all images are one class.

    Raises:
        FileNotFoundError, ValueError: if it is not there, or not of that layout, when it is first read.
    """

    def __init__(self, path: str, images: str = "arr_0", labels: str | None = None) -> None:
        super().__init__(path)
        self.images_name, self.labels_name = images, labels

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} is no .npz, which is a zip of arrays as np.savez writes it, or it is cut off"
            )
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if self.images_name not in arrays:
                    raise ValueError(f"it has {', '.join(arrays.files) or 'no arrays'}, not {self.images_name!r}")
                if self.labels_name is not None and self.labels_name not in arrays:
                    raise ValueError(f"it has {', '.join(arrays.files)}, not {self.labels_name!r}")
                self._others = [name for name in arrays.files if name != self.images_name]
                return arrays[self.images_name], arrays.get(self.labels_name or "arr_1")
        except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{self.path} cannot be read as an .npz of images: {error}") from error


class IdxImages(ArrayImages):
    """Images `(N, H, W)` of bytes in IDX, plain or `.gz`, as of MNIST.

    Args:
        path: of the images, such as train-images-idx3-ubyte.gz.
        labels: file of the labels; left out, the one beside it whose name has "labels" for "images".

    Raises:
        FileNotFoundError, ValueError: if a file is not there, damaged, or not of that format, when it is first read.
    """

    def __init__(self, path: str, labels: str | None = None) -> None:
        super().__init__(path)
        self.labels_path = None if labels is None else Path(labels)

    def files(self) -> list[Path]:
        if self.labels_path is not None:
            return [self.path, self.labels_path]
        if "images" not in self.path.name:
            return [self.path]
        return [self.path, self.path.with_name(self.path.name.replace("images", "labels").replace("idx3", "idx1"))]

    def _read(self) -> tuple[np.ndarray, np.ndarray | None]:
        images, *labels = self.files()
        if labels and self.labels_path is None and not labels[0].is_file():
            raise FileNotFoundError(f"no labels at {labels[0]}, beside {images.name}: give their file as labels")
        return read_idx(images), read_idx(labels[0]) if labels else None


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file, plain or gzipped.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not of that format, or its content is shorter or longer than it says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected one in IDX")
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES or not content[3]:
        raise ValueError(f"{path} is no IDX file: it begins with {content[:4].hex() or 'nothing'}")
    begin = 4 + 4 * content[3]
    if len(content) < begin:
        raise ValueError(f"{path} ends within its header")
    shape = tuple(np.frombuffer(content[4:begin], ">u4").tolist())
    kind = np.dtype(_IDX_TYPES[content[2]])
    needed = begin + int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if len(content) != needed:
        raise ValueError(f"{path} has {len(content):,} bytes, its header says {needed:,} ({shape}): it is damaged")
    return np.frombuffer(content, kind, offset=begin).reshape(shape)
