"""A folder or `.zip` of `.npy` files with `dataset.json`, as NVIDIA's and REPA's tools write them."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.data.latent_files.source import LatentFileError, StoredLatents
from mfm_lightning.data.latent_form import native

INDEX = "dataset.json"


class LatentFolder(StoredLatents):
    """`ROOT/dataset.json`, `{"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}`, and those `.npy` files.

    Written by `dataset_tool.py encode` of EDM2 (NVlabs/edm2) and `preprocessing/dataset_tools.py encode` of REPA
    (sihyun-yu/REPA), whose arrays are `(2C, H, W)`, mean and standard deviation (`holds: mean_std`); other scripts of
    that layout write latents, or mean and log-variance. With `{"labels": null}` all `.npy` in it are taken, in the
    order of their names, without labels.

    Args:
        root: folder, or `.zip` of it.

    Raises:
        FileNotFoundError: without a `dataset.json`, when it is first read.
        LatentFileError: if it is something else, or names files outside of the folder.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # of which process: they share a file's position

    def __str__(self) -> str:
        return str(self.root)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_archive": None}

    @property
    def _zipped(self) -> bool:
        return self.root.suffix == ".zip"

    @cached_property
    def _entries(self) -> tuple[list[str], np.ndarray | None]:
        try:
            content = self._read(INDEX)
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(f"no {INDEX} in {self.root}: expected names of .npy files with labels") from error
        try:
            found = json.loads(content)["labels"]
            if found is None:
                return sorted(name for name in self._names() if name.endswith(".npy")), None
            names, labels = [str(name) for name, _ in found], np.array([label for _, label in found])
        except (KeyError, TypeError, ValueError) as error:
            raise LatentFileError(
                f'{self.root / INDEX} is not {{"labels": [["NAME.npy", LABEL], ...]}}: {type(error).__name__}: {error}'
            ) from error
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.suffix != ".npy":
                raise LatentFileError(f"{self.root / INDEX} names {name!r}: expected a .npy inside of {self.root}")
        return names, labels

    def read_labels(self) -> tuple[int, np.ndarray | None]:
        return len(self._entries[0]), self._entries[1]

    def array(self, i: int, mirrored: bool = False) -> Tensor:
        try:
            return torch.from_numpy(native(np.load(io.BytesIO(self._read(self._entries[0][i])), allow_pickle=False)))
        except KeyError as error:
            raise FileNotFoundError(f"{self.place(i)} is named in {INDEX}, and not there") from error
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise LatentFileError(f"{self.place(i)} cannot be read as .npy: {error}") from error

    def place(self, i: int) -> str:
        return str(self.root / self._entries[0][i])

    def _names(self) -> list[str]:
        if self._zipped:
            return self._zip().namelist()
        return [path.relative_to(self.root).as_posix() for path in self.root.rglob("*.npy")]

    def _read(self, name: str) -> bytes:
        return self._zip().read(name) if self._zipped else (self.root / name).read_bytes()

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.root)
            except zipfile.BadZipFile as error:
                raise LatentFileError(f"{self.root} is no zip, or damaged: {error}") from error
        return self._archive[1]
