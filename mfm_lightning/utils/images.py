"""Images as bytes, and sets of them on disk: folders, `.npz` of the ADM evaluator's layout, WebDataset shards."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mfm_lightning.utils.decoding import ReadError, cropped, decode, read_image
from mfm_lightning.utils.image_files import LeftOut, find_files, is_image
from mfm_lightning.utils.loading import Computed, RaisingLoader
from mfm_lightning.utils.sample_folder import check_finished
from mfm_lightning.utils.tar import tar_files


def to_uint8(images: Tensor) -> Tensor:
    """Images `(B, 1|3, H, W)` in [0, 1] as RGB bytes `(B, 3, H, W)`, rounded to the nearest; bytes stay as they are.

    Raises:
        ValueError: for another number of channels or dimensions.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 1, H, W) or (B, 3, H, W)")
    if images.dtype != torch.uint8:
        images = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1)


class ImageSet:
    """Images on disk, read in batches of RGB bytes `(B, 3, H, W)`.

    Args:
        path: a folder (searched recursively) of image files, or of WebDataset shards, or with a `samples.npz`; or an
            `.npz` file with `arr_0` `(N, H, W, 3)` uint8. Files of other endings are left out, with a line that says
            so.
        crop: cut image files of different sizes to so many pixels, by `center_crop`.

    Raises:
        FileNotFoundError: if there is no such path, or no images in it.
        ValueError: if the file is not of that layout; for a folder with both images and shards, or one that
            `mfm sample` has not finished.
    """

    def __init__(self, path: str | Path, crop: int | None = None) -> None:
        self.path, self.crop = Path(path), crop
        if not self.path.exists():
            raise FileNotFoundError(f"no images at {path}: expected a folder of them or an .npz file")
        self.files: list[Path] = []
        if self.path.is_dir():
            self._find()
        elif not self.path.is_file():
            raise ValueError(f"{path} is no plain file: expected a folder of images or an .npz file")
        if not self.files:
            self.shape = npz_shape(self.path)

    def _find(self) -> None:
        check_finished(self.path)
        images, tars, left_out = find_files(self.path)
        array = self.path / "samples.npz"
        if images and (tars or array.is_file()):
            other = f"{len(tars)} tars" if tars else array.name
            raise ValueError(f"{self.path} has {len(images)} images and {other}: give a folder of one kind")
        self.files = images or tars
        if not self.files and array.is_file():
            self.path = array
        elif not self.files:
            others = f"; {line}" if (line := left_out.line()) else ""
            raise FileNotFoundError(f"no images (.png, .jpg, ...), shards or samples.npz in {self.path}{others}")
        else:
            left_out.report(self.path)

    def identity(self) -> dict[str, Any]:
        """What the images depend on: names, sizes and times of change of the files."""
        stats = [(str(p.relative_to(self.path)), p.stat()) for p in self.files] or [("", self.path.stat())]
        listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        crop = None if self.crop is None else f"center_crop {self.crop}"
        return {"path": str(self.path.resolve()), "files": listing, "crop": crop}

    def batches(self, batch_size: int = 64, workers: int = 0) -> Iterator[Tensor]:
        """The images in order. `workers` processes decode image files; shards and arrays are read here."""
        if not self.files:
            yield from _npz_batches(self.path, batch_size)
            return
        images: Iterator[Tensor]
        left_out = LeftOut()
        if self._shards:
            members = (member for path in self.files for member in _members(path, left_out))
            images = (self._pixels(decode(content, name), name) for name, content in members)
        else:
            files = Computed(self._image, len(self.files))
            images = iter(RaisingLoader(files, batch_size=None, num_workers=workers))
        batch: list[Tensor] = []
        for image in images:
            if batch and image.shape != batch[0].shape:
                raise ValueError(
                    f"{self.path}: an image of {tuple(image.shape[1:])} pixels after one of "
                    f"{tuple(batch[0].shape[1:])}: give images of one size (mfm fid and SampleFID crop a "
                    "reference's: --crop 256, crop: 256)"
                )
            batch.append(image)
            if len(batch) == batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)
        left_out.report(self.path)

    def count(self, limit: int) -> int:
        """How many images; of shards, which have to be read for it, counted no further than `limit`."""
        if self.number is not None:
            return self.number
        return sum(1 for _ in islice((name for path in self.files for name, _ in _members(path, LeftOut())), limit))

    @property
    def _shards(self) -> bool:
        return not is_image(self.files[0].name)

    @property
    def number(self) -> int | None:
        """How many images; None for shards, which only reading tells."""
        if not self.files:
            return self.shape[0]
        return None if self._shards else len(self.files)

    def _image(self, index: int) -> Tensor:
        return self._pixels(read_image(self.files[index]), str(self.files[index]))

    def _pixels(self, image: Image.Image, name: str) -> Tensor:
        pixels = np.array(image.convert("RGB")) if self.crop is None else cropped(image, self.crop, name)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def npz_shape(path: Path) -> tuple[int, int, int, int]:
    """Shape `(N, H, W, 3)` of `arr_0`, from the file's header.

    Raises:
        ValueError: if it is not an `.npz` of uint8 images.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, fortran, dtype = _npy_header(file)
    except (KeyError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path}: expected an .npz with arr_0 (N, H, W, 3) uint8: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
    return shape


def _npz_batches(path: Path, batch_size: int) -> Iterator[Tensor]:
    # in pieces: 50,000 images of 256 pixels are 10 GB
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        (N, H, W, _), _, _ = _npy_header(file)
        for start in range(0, N, batch_size):
            size = min(batch_size, N - start)
            try:
                content = file.read(size * H * W * 3)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{path} is damaged within images {start}..{start + size - 1}: {error}") from error
            if len(content) < size * H * W * 3:
                raise ValueError(f"{path} ends within image {start + len(content) // (H * W * 3)} of {N}")
            images = np.frombuffer(bytearray(content), np.uint8).reshape(size, H, W, 3)
            yield torch.from_numpy(images).permute(0, 3, 1, 2)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _members(path: Path, left_out: LeftOut) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as file:
            for member in tar_files(file, str(path)):
                name = member["fname"]
                if is_image(name):
                    yield f"{path}:{name}", member["data"]
                elif not name.endswith(".cls"):  # labels are no loss here
                    left_out.add_file(name, str(path))
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:  # also of what it is compressed by
        raise ValueError(f"shard {path} cannot be read: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise ReadError(f"shard {path} cannot be read ({error.strerror or error}): mend the storage") from error
