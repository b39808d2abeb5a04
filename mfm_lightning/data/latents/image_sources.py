"""Where images come from: a tree of class folders, or WebDataset shards; each in units of work that processes share
out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfm_lightning.data.class_folders import MOST_CLASSES, InputError, find_classes, read_class_index
from mfm_lightning.data.images.captioned_folder import CAPTION_COLUMNS, CaptionedFolder
from mfm_lightning.data.images.captions import CaptionedImages
from mfm_lightning.data.images.folder import ImageFolder
from mfm_lightning.data.images.hugging_face import HuggingFaceImages
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.data.latents.urls import check_url, expand, from_webdataset, local_path, open_url
from mfm_lightning.data.web.fields import Fields, whole_number
from mfm_lightning.data.web.shards import say_shared
from mfm_lightning.utils.decoding import cropped, decode, read_image
from mfm_lightning.utils.image_files import TARS, LeftOut, check_tar, image_endings, is_image, is_junk, is_tar, walk
from mfm_lightning.utils.tar import SKIPPED, tar_files

log = logging.getLogger(__name__)
AUTO = "auto"  # captions from where such a source usually has them
DATASET = "dataset:"  # before an id of Hugging Face


@dataclass(frozen=True)
class RawImage:
    """An image before it is decoded; `data`: its bytes, the file that has them, or what gives it decoded; `place`:
    where bytes are from; `caption`: its text, of sources that have such."""

    key: str
    label: int
    data: bytes | Path | Callable[[], Image.Image]
    place: str = ""
    caption: str = ""

    def open(self, size: int) -> np.ndarray:
        """`(size, size, 3)` uint8, cropped as in ADM and DiT.

        Raises:
            ImageError: naming it, if it cannot be decoded.
            OSError: if it cannot be read.
        """
        image: Image.Image
        if isinstance(self.data, Path):
            image = read_image(self.data)
        else:
            image = decode(self.data, self.place) if isinstance(self.data, bytes) else self.data()
        return cropped(image, size, self.place or str(self.data))


class ImageSource(ABC):
    """Images in `units` pieces, each read from its beginning and always in the same order.

    Attributes:
        units: how many there are.
        class_to_idx: labels by class name; None if they are only known when all is read.
        identity: what a preparation that goes on must find again, as JSON.
        whole_units: a unit is one shard; else a unit makes as many shards as it needs.
        found: what it has, in a line; "" if that is only known when all is read.
        left_out: what was passed over so far.
    """

    units: int
    class_to_idx: dict[str, int] | None
    identity: dict[str, object]
    whole_units: bool
    samples: int | None = None
    found: str = ""

    def __init__(self) -> None:
        self.left_out = LeftOut()

    @abstractmethod
    def read(self, unit: int) -> Iterator[RawImage]:
        """The images of a unit."""


class FolderSource(ImageSource):
    """`ROOT/CLASS/*.jpg`, shuffled once for all, so that every shard has many classes; a unit is one shard.

    Args:
        root: of the tree.
        shard_size: images of a unit.
        seed: of the order.
        class_index: file of labels by class.

    Raises:
        FileNotFoundError, InputError: as `find_classes`.
        InputError: for file names that would be one key, or that `check_key` refuses.
    """

    whole_units = True

    def __init__(self, root: Path, shard_size: int, seed: int = 0, class_index: Path | None = None) -> None:
        super().__init__()
        self.root = Path(root)
        tree = find_classes(self.root, class_index)
        self.class_to_idx, self.left_out, self.found = tree.class_to_idx, tree.left_out, tree.line()
        self._images = [(image.name, image.label) for image in tree.images]
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
        contents = _sha256(json.dumps([(image.size, image.mtime_ns) for image in tree.images]))
        self.identity = {"images": self.samples, "listing": listing, "contents": contents, "seed": seed}
        if tree.order:
            self.identity["classes"] = _sha256(json.dumps(self.class_to_idx, sort_keys=True))

    def read(self, unit: int) -> Iterator[RawImage]:
        for i in self._order[unit * self.shard_size : (unit + 1) * self.shard_size].tolist():
            path, label = self._images[i]
            yield RawImage(self._keys[i], label, self.root / path)


class CaptionedSource(ImageSource):
    """Any images with captions that have numbers, dealt to shards as those of a `FolderSource`.

    Args:
        images: that have captions.
        shard_size: images of a unit.
        seed: of the order.

    Raises:
        FileNotFoundError, ValueError: as the images.
    """

    whole_units = True

    def __init__(self, images: LabelledImages, shard_size: int, seed: int = 0) -> None:
        super().__init__()
        self._images, self.shard_size = images, shard_size
        self.class_to_idx = {name: label for label, name in enumerate(images.class_names)}
        self.samples = len(images.labels)
        self.units = -(-self.samples // shard_size)
        self._order = np.random.default_rng(seed).permutation(self.samples)
        self._captions = [images.caption(i) for i in range(self.samples)]
        self.found = f"{images.line()}; {len(set(self._captions))} different captions"
        listing = _sha256("\n".join(images.place(i) for i in range(self.samples)))
        self.identity = {
            "images": self.samples, "listing": listing, "contents": _sha256(json.dumps(images.contents)), "seed": seed,
            "texts": _sha256(json.dumps(self._captions)),
        }  # fmt: skip

    def read(self, unit: int) -> Iterator[RawImage]:
        for i in self._order[unit * self.shard_size : (unit + 1) * self.shard_size].tolist():
            image = partial(self._images.image, i)
            label = int(self._images.labels[i])
            yield RawImage(f"{i:08d}", label, image, self._images.place(i), self._captions[i])


class WebDatasetSource(ImageSource):
    """Shards with an image (jpg, png, ...) and `cls` (the label in ASCII) for each key; a unit is one of them. With
    captions there need be no label: it is 0 then.

    Args:
        urls: local paths or URLs, with braces; tars may be compressed by gzip, bzip2 or xz.
        class_index: labels by name, if there are names.
        allow_pipe: run the commands of `pipe:` URLs.
        captions: ending of texts, such as txt, or json:caption for a key of a JSON file; None: no captions.

    Raises:
        ValueError: for a URL that may not or cannot be opened.
        FileNotFoundError: for a local shard that is not there.
    """

    whole_units = False

    def __init__(
        self,
        urls: Sequence[str],
        class_index: dict[str, int] | None = None,
        allow_pipe: bool = False,
        captions: str | None = None,
    ) -> None:
        super().__init__()
        self._texts = None if captions is None else Fields("", caption=captions)
        self.urls = [url for text in urls for url in expand(text)]
        self.class_to_idx, self.allow_pipe, self.units = class_index, allow_pipe, len(self.urls)
        for url in self.urls:
            check_url(url, allow_pipe)
            check_tar(url)
            if (path := local_path(url)) is not None and not path.is_file():
                raise FileNotFoundError(f"{path} is no plain file" if path.exists() else f"no shard {path}")
        say_shared(self.urls, [])
        labels = None if class_index is None else _sha256(json.dumps(class_index, sort_keys=True))
        local = [os.stat(path) for url in self.urls if (path := local_path(url)) is not None]
        self.found = f"{self.units} shards of images"
        self.identity = {
            "urls": _sha256("\n".join(self.urls)), "shards": self.units, "class_index": labels,
            "contents": _sha256(json.dumps([(stat.st_size, stat.st_mtime_ns) for stat in local])),
        }  # fmt: skip

    def read(self, unit: int) -> Iterator[RawImage]:
        """Raises InputError for a shard that cannot be read to its end, a sample without image or label, or a key that
        is there twice."""
        from_webdataset()
        from webdataset.tariterators import group_by_keys

        url, keys = self.urls[unit], set()
        try:
            with open_url(url, self.allow_pipe) as stream:
                for sample in group_by_keys(self._files(stream, url)):
                    raw = self._raw(sample, unit, url)
                    if raw.key in keys:
                        raise InputError(f"{url}: two samples have the key {sample['__key__']!r}: rename one of them")
                    keys.add(raw.key)
                    yield raw
        except InputError:
            raise
        except Exception as error:  # tarfile and the download's program have errors of many kinds
            reason = error.args[0] if isinstance(error, ValueError) and error.args else error  # webdataset adds more
            raise InputError(f"shard {url} cannot be read after {len(keys)} samples: {reason}") from error

    def _files(self, stream: Any, url: str) -> Iterator[dict[str, Any]]:
        for member in tar_files(stream, url):
            if "." not in os.path.basename(member["fname"]):  # which webdataset passes over
                self.left_out.add_file(member["fname"], url)
            yield member

    def _raw(self, sample: dict[str, Any], unit: int, url: str) -> RawImage:
        where = f"sample {sample['__key__']!r} of {url}"
        fields = [name for name in sample if not name.startswith("__")]
        images = [name for name in fields if f".{name}" in image_endings()]
        if len(images) != 1 or ("cls" not in sample and self._texts is None):
            hint = "; all that follows the first dot of a name is its ending" if any("." in f for f in fields) else ""
            raise InputError(
                f"{where} has {', '.join(fields)}: expected one image (jpg, png, ...) and cls, next to each other{hint}"
            )
        try:
            caption = "" if self._texts is None else self._texts.caption_of(sample)
        except ValueError as error:
            raise InputError(f"{error} (--captions)") from error
        endings = [] if self._texts is None else str(self._texts.caption).partition(":")[0].split(";")
        for name in fields:
            if name not in ("cls", images[0], *endings):
                self.left_out.add_file(f"{sample['__key__']}.{name}", url)
        try:
            label = whole_number(sample.get("cls", b"0").decode())
        except ValueError as error:
            raise InputError(f"{where}: cls is {sample['cls']!r}, not a label in ASCII") from error
        limit = MOST_CLASSES if self.class_to_idx is None else len(self.class_to_idx)
        if not 0 <= label < limit:
            raise InputError(f"{where}: label {label} is outside 0..{limit - 1}")
        key = f"{unit:06d}/{str(sample['__key__']).replace('.', '_')}"  # input shards may number alike
        check_key(key)
        place = f"{url}:{sample['__key__']}.{images[0]}"
        return RawImage(key, label, sample[images[0]], place, caption)


def find_source(
    inputs: Sequence[str],
    shard_size: int,
    seed: int = 0,
    class_index: Path | None = None,
    allow_pipe: bool = False,
    captions: str | None = None,
    allow_download: bool = False,
) -> ImageSource:
    """A folder of class folders, a folder of tars, or URLs of shards. With captions also a folder of images and their
    texts (`CaptionedFolder`), or a data set of Hugging Face: a folder of parquet files, or dataset:ID.

    Args:
        captions: "auto", or where they are, in the words of the source: an ending, json:KEY, a column, a list; for a
            folder of class folders a text with {class} in it.

    Raises:
        FileNotFoundError, ValueError: as the sources.
    """
    if captions is not None and (found := _captioned(inputs, captions, class_index, allow_download)) is not None:
        return CaptionedSource(found, shard_size, seed)
    paths = {i: path for i in inputs if (path := local_path(i)) is not None}
    folders = [path for path in paths.values() if path.is_dir()]
    if folders and len(inputs) > 1:
        raise InputError(f"several inputs, and {folders[0]} is a folder: give one folder, or only tars")
    tars, left_out = _tars_in(folders[0]) if folders else ([], LeftOut())
    if folders and not tars:
        return FolderSource(folders[0], shard_size, seed, class_index)
    names = None if class_index is None else read_class_index(class_index)
    for given, path in {} if folders else paths.items():
        check_tar(given)
        if not (is_tar(given) or "{" in given):
            what = "is no tar" if path.exists() else "is not there"
            raise FileNotFoundError(
                f"no input at {given}, which {what}: expected a folder of class folders, or WebDataset tars "
                f"({', '.join(TARS)})"
            )
    source = WebDatasetSource(tars or inputs, names, allow_pipe, "txt" if captions == AUTO else captions)
    source.left_out = left_out
    return source


def _captioned(
    inputs: Sequence[str], captions: str, class_index: Path | None, allow_download: bool
) -> LabelledImages | None:
    """Images with captions that are not in shards; None for those."""
    given = None if captions == AUTO else captions
    if len(inputs) != 1:
        return None
    if inputs[0].startswith(DATASET):
        name = inputs[0].removeprefix(DATASET)
        return HuggingFaceImages(name, label=None, caption=given or CAPTION_COLUMNS, download=allow_download)
    folder = local_path(inputs[0])
    if folder is None or not folder.is_dir() or _tars_in(folder)[0]:
        return None
    if "{class}" in captions:
        return CaptionedImages(ImageFolder(str(folder), None if class_index is None else str(class_index)), captions)
    if class_index is not None:
        raise InputError(
            f"--class-index {class_index} is of class folders: leave it out, or give captions with {{class}}"
        )
    if any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet")):
        return HuggingFaceImages(str(folder), label=None, caption=given or CAPTION_COLUMNS)
    return CaptionedFolder(str(folder), given)


def _tars_in(folder: Path) -> tuple[list[str], LeftOut]:
    """Tars that lie in a folder itself, and what else does, which is left out if there are any."""
    tars, folders, left_out = [], [], LeftOut()
    for path in sorted(folder.iterdir()):
        if is_junk(path.name):
            continue
        if is_tar(path.name):
            check_tar(str(path))
            tars.append(str(path))
        elif path.is_dir():
            folders.append(path)
        else:
            left_out.add_file(path.name)
    for path in folders if tars else []:
        if any(is_image(entry.name) for entry in walk(path)):
            raise InputError(f"{folder} has {len(tars)} tars, and images in {path.name}/: give a folder of one kind")
        left_out.add("folders", path.name)
    return tars, left_out


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
