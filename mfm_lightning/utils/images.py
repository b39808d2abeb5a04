"""Images as bytes, and sets of them on disk: folders, `.npz` of the ADM evaluator's layout, WebDataset shards."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mfm_lightning.utils.tar import tar_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """`(size, size, 3)` uint8 as in ADM and DiT: halved by boxes while twice too large, resized (bicubic), cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


class ImageSet(Dataset[Tensor]):
    """Images on disk, read in batches of RGB bytes `(B, 3, H, W)`.

    Args:
        path: a folder (searched recursively) of image files, or of WebDataset shards, or with a `samples.npz`; or an
            `.npz` file with `arr_0` `(N, H, W, 3)` uint8.
        crop: cut image files of different sizes to so many pixels, by `center_crop`.

    Raises:
        FileNotFoundError: if there is no such path, or no images in it.
        ValueError: if the file is not of that layout.
    """

    def __init__(self, path: str | Path, crop: int | None = None) -> None:
        self.path, self.crop = Path(path), crop
        if not self.path.exists():
            raise FileNotFoundError(f"no images at {path}: expected a folder of them or an .npz file")
        self.files: list[Path] = []
        if self.path.is_dir():
            inside = sorted(p for p in self.path.rglob("*") if p.is_file())
            self.files = [p for p in inside if p.suffix.lower() in SUFFIXES] or [
                p for p in inside if p.suffix == ".tar"
            ]
            if not self.files and (self.path / "samples.npz").is_file():
                self.path = self.path / "samples.npz"
            elif not self.files:
                raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}), shards or samples.npz in {path}")
        if not self.files:
            self.shape = npz_shape(self.path)

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
        if self.files[0].suffix == ".tar":
            images = (self._decode(content, name) for path in self.files for name, content in _members(path))
        else:
            images = iter(DataLoader(self, batch_size=None, num_workers=workers))
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

    def count(self, limit: int) -> int:
        """How many images; of shards, which have to be read for it, counted no further than `limit`."""
        if self.number is not None:
            return self.number
        return sum(1 for _ in islice((name for path in self.files for name, _ in _members(path)), limit))

    @property
    def number(self) -> int | None:
        """How many images; None for shards, which only reading tells."""
        if not self.files:
            return self.shape[0]
        return None if self.files[0].suffix == ".tar" else len(self.files)

    def __len__(self) -> int:
        """Number of files, for the loader."""
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self._decode(self.files[index].read_bytes(), str(self.files[index]))

    def _decode(self, content: bytes, name: str) -> Tensor:
        try:
            image = Image.open(io.BytesIO(content)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{name} is not an image that can be read: {error}") from error
        pixels = np.array(image) if self.crop is None else center_crop(image, self.crop)
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
            content = file.read(size * H * W * 3)
            if len(content) < size * H * W * 3:
                raise ValueError(f"{path} ends within image {start + len(content) // (H * W * 3)} of {N}")
            images = np.frombuffer(bytearray(content), np.uint8).reshape(size, H, W, 3)
            yield torch.from_numpy(images).permute(0, 3, 1, 2)


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as file:
            for member in tar_files(file, str(path)):
                if Path(member["fname"]).suffix.lower() in SUFFIXES:
                    yield f"{path}:{member['fname']}", member["data"]
    except tarfile.TarError as error:
        raise ValueError(f"shard {path} cannot be read: {error}") from error
