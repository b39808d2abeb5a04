"""Latents in `.safetensors` or `.npz` files of many, read where they lie: a row is fetched when it is asked for."""

from __future__ import annotations

import logging
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_lightning.data.latent_files.source import LatentFileError, StoredLatents
from mfm_lightning.data.latent_form import native
from mfm_lightning.utils.image_files import is_junk

log = logging.getLogger(__name__)
ENDINGS = (".safetensors", ".npz")


class LatentArrays(StoredLatents):
    """Files with an array `(N, ...)` of latents or moments, and one of labels `(N,)`.

    The names are those of LightningDiT's `extract_features.py` (hustvl/LightningDiT), which writes
    `latents_rank00_shard000.safetensors` with `latents`, `latents_flip` and `labels`. Its `latents_stats.pt` has the
    mean and the deviation of each channel: `shift` is the mean, `scale` one over the deviation.

    Args:
        path: a file, or a folder of files of one ending, taken in the order of their names.
        latents: name of the latents' array.
        labels: name of the labels' array; null: no labels.
        mirrored: name of the array of the mirror images' latents; null: there is none.

    Raises:
        FileNotFoundError: if there is no such file, when it is first read.
        LatentFileError: for an array that is not there, is damaged, or of another length or shape than the others.
    """

    def __init__(
        self, path: str, latents: str = "latents", labels: str | None = "labels", mirrored: str | None = None
    ) -> None:
        self.path, self.names = Path(path), {"latents": latents, "labels": labels, "mirrored": mirrored}
        self.has_mirrored = mirrored is not None
        self._open: dict[tuple[int, Path], _File] = {}

    def __str__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    @cached_property
    def files(self) -> list[Path]:
        """In the order in which they are read."""
        if self.path.is_file():
            return [self.path]
        found = {end: sorted(p for p in self.path.glob(f"*{end}") if not is_junk(p.name)) for end in ENDINGS}
        kinds = [end for end in ENDINGS if found[end]]
        if not kinds:
            raise FileNotFoundError(f"no latents at {self.path}: expected a file or a folder of {' or '.join(ENDINGS)}")
        if len(kinds) > 1:
            raise LatentFileError(f"{self.path} has both {' and '.join(kinds)}: give a folder of one kind")
        return found[kinds[0]]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each file's rows end among all, `(files,)`."""
        lengths, shape = [], None
        for path in self.files:
            file = self._file(path)
            stored = file.shape(str(self.names["latents"]))
            if not stored or (shape is not None and stored[1:] != shape):
                wanted = ", ".join(["N", *map(str, shape or ["..."])])
                raise LatentFileError(f"{path} has {self.names['latents']} {stored}, {self.files[0]} ({wanted})")
            shape = stored[1:]
            for name in (self.names["labels"], self.names["mirrored"]):
                if name is not None and file.shape(name)[:1] != stored[:1]:
                    raise LatentFileError(f"{path} has {stored[0]} latents and {name} {file.shape(name)}")
            lengths.append(stored[0])
        return np.cumsum(lengths)

    def read_labels(self) -> tuple[int, np.ndarray | None]:
        num, name = int(self._ends[-1]), self.names["labels"]
        if name is None:
            return num, None
        return num, np.concatenate([self._file(path).whole(name).reshape(-1) for path in self.files])

    def array(self, i: int, mirrored: bool = False) -> Tensor:
        file, row = self._at(i)
        return self._file(file).row(str(self.names["mirrored" if mirrored else "latents"]), row)

    def place(self, i: int) -> str:
        file, row = self._at(i)
        return f"latent {row} of {file}"

    def _at(self, i: int) -> tuple[Path, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.files[k], i - (int(self._ends[k - 1]) if k else 0)

    def _file(self, path: Path) -> _File:
        key = os.getpid(), path  # of each process its own
        if key not in self._open:
            self._open[key] = _Safetensors(path) if path.suffix == ".safetensors" else _Npz(path)
        return self._open[key]


class _File(ABC):
    """Arrays by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def missing(self, name: str, there: list[str]) -> LatentFileError:
        return LatentFileError(f"{self.path} has no array {name!r}: it has {', '.join(there) or 'none'}")

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""

    @abstractmethod
    def whole(self, name: str) -> np.ndarray:
        """An array, in memory."""

    @abstractmethod
    def row(self, name: str, i: int) -> Tensor:
        """One row of an array."""


class _Safetensors(_File):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise LatentFileError(f"{path} is no safetensors file, or damaged: {error}") from error
        self.slices: dict[str, Any] = {}

    def _slice(self, name: str) -> Any:
        if name not in self.slices:
            if name not in self.file.keys():  # noqa: SIM118 # it is no dictionary
                raise self.missing(name, sorted(self.file.keys()))
            self.slices[name] = self.file.get_slice(name)
        return self.slices[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def whole(self, name: str) -> np.ndarray:
        found = self._slice(name)[:]
        try:
            return found.numpy()
        except TypeError as error:  # of bfloat16, which numpy does not have
            raise LatentFileError(f"{name} of {self.path} has {found.dtype}: expected whole numbers") from error

    def row(self, name: str, i: int) -> Tensor:
        return self._slice(name)[i]


class _Npz(_File):
    """Arrays that are stored as they are (`np.savez`) are mapped; compressed ones are read whole, once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.arrays: dict[str, np.ndarray] = {}

    def _array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            try:
                self.arrays[name] = self._mapped(name)
            except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
                if isinstance(error, LatentFileError):
                    raise
                raise LatentFileError(f"{self.path} cannot be read as .npz: {error}") from error
        return self.arrays[name]

    def _mapped(self, name: str) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            if f"{name}.npy" not in archive.namelist():
                raise self.missing(name, [n.removesuffix(".npy") for n in archive.namelist()])
            info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            log.info("%s is compressed: %s is read whole into memory, %.0f MB", self.path, name, info.file_size / 1e6)
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)  # the lengths of name and extra field, in this member's own header
            file.seek(info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = read(file)
            if kind.hasobject:
                raise LatentFileError(f"{self.path}: {name} holds objects, expected numbers")
            return np.memmap(self.path, kind, "r", file.tell(), shape, "F" if fortran else "C")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._array(name).shape

    def whole(self, name: str) -> np.ndarray:
        return np.array(self._array(name))

    def row(self, name: str, i: int) -> Tensor:
        return torch.from_numpy(native(np.array(self._array(name)[i])))
