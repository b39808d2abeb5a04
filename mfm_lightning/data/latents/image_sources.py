"""Where images come from: an ImageFolder tree, or WebDataset shards; each in units of work that processes share out."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfm_lightning.data.latents.urls import check_url, expand, from_webdataset, local_path, open_url
from mfm_lightning.utils.images import center_crop
from mfm_lightning.utils.tar import SKIPPED, tar_files

_MOST_CLASSES = 1_000_000  # where they are not named: a label above is no class
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")


class InputError(ValueError):
    """Images that shards cannot be made of."""


@dataclass(frozen=True)
class RawImage:
    """An image before it is decoded; `data`: its bytes, or the file that has them."""

    key: str
    label: int
    data: bytes | Path

    def open(self, size: int) -> np.ndarray:
        """`(size, size, 3)` uint8, cropped as in ADM and DiT.

        Raises:
            InputError: naming it, if it cannot be decoded.
        """
        try:
            with Image.open(io.BytesIO(self.data) if isinstance(self.data, bytes) else self.data) as image:
                return center_crop(image.convert("RGB"), size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            where = self.data if isinstance(self.data, Path) else self.key
            raise InputError(f"image {where} cannot be decoded: {error}") from error


class ImageSource(ABC):
    """Images in `units` pieces, each read from its beginning and always in the same order.

    Attributes:
        units: how many there are.
        class_to_idx: labels by class name; None if they are only known when all is read.
        identity: what a preparation that goes on must find again, as JSON.
        whole_units: a unit is one shard; else a unit makes as many shards as it needs.
    """

    units: int
    class_to_idx: dict[str, int] | None
    identity: dict[str, object]
    whole_units: bool
    samples: int | None = None

    @abstractmethod
    def read(self, unit: int) -> Iterator[RawImage]:
        """The images of a unit."""


class FolderSource(ImageSource):
    """`ROOT/CLASS/*.jpg`, shuffled once for all, so that every shard has many classes; a unit is one shard.

    Args:
        root: of the tree.
        shard_size: images of a unit.
        seed: of the order.

    Raises:
        FileNotFoundError: if there is no such folder, no class in it, or a class without images.
        InputError: for file names that would be one key, or that `check_key` refuses.
    """

    whole_units = True

    def __init__(self, root: Path, shard_size: int, seed: int = 0) -> None:
        from torchvision.datasets import ImageFolder

        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {root}: expected one folder of images for each class in it")
        found = ImageFolder(str(self.root))
        self.class_to_idx = found.class_to_idx
        self._images = [(Path(path).relative_to(self.root).as_posix(), label) for path, label in found.samples]
        self._keys = [path.replace(".", "_") for path, _ in self._images]
        if len(set(self._keys)) < len(self._keys):
            seen: set[str] = set()
            twice = next(key for key in self._keys if key in seen or seen.add(key))
            raise InputError(f"two images in {root} have the key {twice!r}: rename one of them")
        for key in self._keys:
            check_key(key)
        self.samples, self.shard_size = len(self._images), shard_size
        self.units = -(-self.samples // shard_size)
        self._order = np.random.default_rng(seed).permutation(self.samples)
        listing = _sha256("\n".join(path for path, _ in self._images))
        self.identity = {"images": self.samples, "listing": listing, "seed": seed}

    def read(self, unit: int) -> Iterator[RawImage]:
        for i in self._order[unit * self.shard_size : (unit + 1) * self.shard_size].tolist():
            path, label = self._images[i]
            yield RawImage(self._keys[i], label, self.root / path)


class WebDatasetSource(ImageSource):
    """Shards with an image (jpg, png, ...) and `cls` (the label in ASCII) for each key; a unit is one of them.

    Args:
        urls: local paths or URLs, with braces.
        class_index: labels by name, if there are names.
        allow_pipe: run the commands of `pipe:` URLs.

    Raises:
        ValueError: for a URL that may not or cannot be opened.
        FileNotFoundError: for a local shard that is not there.
    """

    whole_units = False

    def __init__(
        self, urls: Sequence[str], class_index: dict[str, int] | None = None, allow_pipe: bool = False
    ) -> None:
        self.urls = [url for text in urls for url in expand(text)]
        self.class_to_idx, self.allow_pipe, self.units = class_index, allow_pipe, len(self.urls)
        for url in self.urls:
            check_url(url, allow_pipe)
            if (path := local_path(url)) is not None and not path.is_file():
                raise FileNotFoundError(f"no shard {path}")
        labels = None if class_index is None else _sha256(json.dumps(class_index, sort_keys=True))
        self.identity = {"urls": _sha256("\n".join(self.urls)), "shards": self.units, "class_index": labels}

    def read(self, unit: int) -> Iterator[RawImage]:
        """Raises InputError for a shard that cannot be read to its end, or a sample without image or label."""
        from_webdataset()
        from webdataset.tariterators import group_by_keys

        url, count = self.urls[unit], 0
        try:
            with open_url(url, self.allow_pipe) as stream:
                for sample in group_by_keys(tar_files(stream, url)):
                    yield self._raw(sample, unit, url)
                    count += 1
        except InputError:
            raise
        except Exception as error:  # tarfile and the download's program have errors of many kinds
            raise InputError(f"shard {url} cannot be read after {count} samples: {error}") from error

    def _raw(self, sample: dict[str, Any], unit: int, url: str) -> RawImage:
        where = f"sample {sample['__key__']!r} of {url}"
        data = next((sample[e] for e in EXTENSIONS if e in sample), None)
        if data is None or "cls" not in sample:
            has = ", ".join(k for k in sample if not k.startswith("__"))
            raise InputError(f"{where} has {has}: expected an image ({', '.join(EXTENSIONS)}) and cls")
        try:
            label = int(sample["cls"])
        except ValueError as error:
            raise InputError(f"{where}: cls is {sample['cls']!r}, not a label in ASCII") from error
        limit = _MOST_CLASSES if self.class_to_idx is None else len(self.class_to_idx)
        if not 0 <= label < limit:
            raise InputError(f"{where}: label {label} is outside 0..{limit - 1}")
        key = f"{unit:06d}/{str(sample['__key__']).replace('.', '_')}"  # input shards may number alike
        check_key(key)
        return RawImage(key, label, data)


def find_source(
    inputs: Sequence[str], shard_size: int, seed: int = 0, class_index: Path | None = None, allow_pipe: bool = False
) -> ImageSource:
    """A folder of class folders, a folder of tars, or URLs of shards.

    Raises:
        FileNotFoundError, ValueError: as the sources.
    """
    names = None if class_index is None else read_class_index(class_index)
    folders = [path for i in inputs if (path := local_path(i)) is not None and path.is_dir()]
    if not folders:
        if any(local_path(i) is not None and not i.endswith(".tar") and "{" not in i for i in inputs):
            missing = next(i for i in inputs if local_path(i) is not None and not i.endswith(".tar"))
            raise FileNotFoundError(f"no input at {missing}: expected a folder of class folders, or WebDataset tars")
        return WebDatasetSource(inputs, names, allow_pipe)
    if len(inputs) > 1:
        raise InputError(f"several inputs, and {folders[0]} is a folder: give one folder, or only tars")
    tars = sorted(str(p) for p in folders[0].glob("*.tar"))
    if tars:
        return WebDatasetSource(tars, names, allow_pipe)
    source = FolderSource(folders[0], shard_size, seed)
    if names is not None and names != source.class_to_idx:
        raise InputError(f"{class_index} is not the sorted order of the class folders in {folders[0]}: leave it out")
    return source


def read_class_index(path: Path) -> dict[str, int]:
    """A JSON of labels by class name.

    Raises:
        FileNotFoundError: if it is not there.
        InputError: unless its labels are 0..n-1, each once.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no class index at {path}")
    try:
        found = json.loads(Path(path).read_text())
        fits = sorted(found.values()) == list(range(len(found))) and found
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no JSON of labels by class name: {error}") from error
    if not fits:
        raise InputError(f"{path}: labels must be 0..{len(found) - 1}, each once")
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_key(key: str) -> None:
    """Raise InputError unless the key's names fit into one tar header each (USTAR) and webdataset reads them."""
    import tarfile

    try:
        if len(key.encode()) > 90:  # a shorter one always fits
            tarfile.TarInfo(f"{key}.npy").tobuf(tarfile.USTAR_FORMAT, "utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{key!r} is no UTF-8: rename it") from error
    except ValueError as error:
        raise InputError(
            f"{key!r} is too long for a name in a tar: shorten it to 96 bytes, or its folders to 155 and the rest to 96"
        ) from error
    if SKIPPED.match(f"{key}.npy"):
        raise InputError(f"{key!r} is skipped by webdataset, as are all folders with such a name: rename the folder")
