"""A folder or `.zip` of `.npy` files with `dataset.json`, as NVIDIA's and REPA's tools write them."""

from __future__ import annotations

import io
import json
import logging
import os
import posixpath
import zipfile
import zlib
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.data.class_folders import LABELS, shortened
from mfm_lightning.data.latent_files.source import LatentFileError, StoredLatents
from mfm_lightning.data.latent_form import native
from mfm_lightning.utils.image_files import is_junk, walk

log = logging.getLogger(__name__)


class LatentFolder(StoredLatents):
    """`ROOT/dataset.json`, `{"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}`, and those `.npy` files.

    Written by `dataset_tool.py encode` of EDM2 (NVlabs/edm2) and `preprocessing/dataset_tools.py encode` of REPA
    (sihyun-yu/REPA), whose arrays are `(2C, H, W)`, mean and standard deviation (`holds: mean_std`); other scripts of
    that layout write latents, or mean and log-variance. With `{"labels": null}` all `.npy` in it that are not hidden
    are taken, in the order of their names, without labels. Else a `.npy` that is not listed is left out, and said.

    Args:
        root: folder, or `.zip` of it.

    Raises:
        FileNotFoundError: without a `dataset.json`, or a file that it lists, when it is first read.
        LatentFileError: if it is something else, lists a file twice, or files outside of the folder or hidden.
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
        return self.root.suffix.lower() == ".zip"

    @cached_property
    def _entries(self) -> tuple[list[str], np.ndarray | None]:
        try:
            content = self._read(LABELS)
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(f"no {LABELS} in {self.root}: expected names of .npy files with labels") from error
        try:
            found = json.loads(content)["labels"]
            if found is None:
                return sorted(self._names()), None
            names, labels = [str(name) for name, _ in found], np.array([label for _, label in found])
        except (KeyError, TypeError, ValueError) as error:
            raise LatentFileError(
                f'{self.root / LABELS} is not {{"labels": [["NAME.npy", LABEL], ...]}}: {type(error).__name__}: {error}'
            ) from error
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.suffix != ".npy" or _hidden(name):
                raise LatentFileError(
                    f"{self.root / LABELS} names {name!r}: expected a .npy inside of {self.root} that is not hidden"
                )
        self._check_listed(names, labels.tolist())
        return names, labels

    def _check_listed(self, names: list[str], labels: list[object]) -> None:
        """Raise unless each file is listed once and is there; say which are there and not listed."""
        listed: dict[str, object] = {}
        for name, label in zip(map(posixpath.normpath, names), labels, strict=True):
            if name in listed:
                raise LatentFileError(
                    f"{self.root / LABELS} lists {name} twice, with the labels {listed[name]} and {label}: expected "
                    "each file once"
                )
            listed[name] = label
        there = {posixpath.normpath(name) for name in self._names()}
        if missing := [name for name in listed if name not in there]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(listed)} files that {self.root / LABELS} lists are not there, the first "
                f"{self.root / missing[0]}"
            )
        if left_out := there - listed.keys():
            log.warning(
                "%s: %d of %d .npy are left out, for %s does not list them: %s",
                self.root, len(left_out), len(there), LABELS, ", ".join(shortened(sorted(left_out))),
            )  # fmt: skip

    def read_labels(self) -> tuple[int, np.ndarray | None]:
        return len(self._entries[0]), self._entries[1]

    def array(self, i: int, mirrored: bool = False) -> Tensor:
        try:
            return torch.from_numpy(native(np.load(io.BytesIO(self._read(self._entries[0][i])), allow_pickle=False)))
        except KeyError as error:
            raise FileNotFoundError(f"{self.place(i)} is named in {LABELS}, and not there") from error
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise LatentFileError(f"{self.place(i)} cannot be read as .npy: {error}") from error

    def place(self, i: int) -> str:
        return str(self.root / self._entries[0][i])

    def _names(self) -> list[str]:
        """Of all `.npy` that are not hidden."""
        begin = len(os.path.join(self.root, ""))
        names = self._zip().namelist() if self._zipped else [entry.path[begin:] for entry in walk(self.root)]
        return [name for name in names if name.endswith(".npy") and not _hidden(name)]

    def _read(self, name: str) -> bytes:
        return self._zip().read(name) if self._zipped else (self.root / name).read_bytes()

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.root)
            except zipfile.BadZipFile as error:
                raise LatentFileError(f"{self.root} is no zip, or damaged: {error}") from error
        return self._archive[1]


def _hidden(name: str) -> bool:
    return any(is_junk(part) for part in PurePosixPath(name).parts)
