"""Folders of samples that can be killed at any moment and gone on with: nothing lost, nothing doubled.

Every file appears whole, by a rename, and its name says which samples it holds. An output of one file (`.npz`) or few
(shards) is put together from parts when all are there, by whichever process finds that they are.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.sampling.plan import SamplePlan
from mfm_lightning.sampling.resumable import DELETE, compare_settings, write_json
from mfm_lightning.utils.atomic import check_is_folder, clear_partials, save_json, whole_file
from mfm_lightning.utils.sample_folder import PARTS, SETTINGS


class Output(ABC):
    """Base class: bytes `(B, 3, H, W)` of the plan's batches to files in a folder.

    Args:
        folder: is made where it is not there.
        plan: of the samples.
    """

    def __init__(self, folder: str | Path, plan: SamplePlan) -> None:
        self.folder, self.plan = Path(folder), plan

    def claim(self, settings: dict[str, object]) -> None:
        """Write what the samples depend on, or compare it with what is there; called by every process.

        Raises:
            NotADirectoryError: if it is a file.
            ValueError: if the folder has samples of other settings, with the first that differ, or images of others.
        """
        check_is_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # looked for before the note, which another process writes before its samples
        others = sorted(path.name for kind in ("png", "npz", "tar") for path in self.folder.glob(f"*.{kind}"))
        note = self.folder / SETTINGS
        if not note.is_file():
            if others:
                raise ValueError(
                    f"{self.folder} has files that mfm sample did not write ({len(others)}, such as {others[0]}): give "
                    "another folder"
                )
            write_json(note, settings)
        compare_settings(note, settings, "samples", DELETE)

    @abstractmethod
    def missing(self) -> list[range]:
        """The batches that are not there yet."""

    @abstractmethod
    def write(self, batch: range, images: Tensor) -> None:
        """Store the images of a batch, bytes `(B, 3, H, W)`."""

    @abstractmethod
    def finish(self) -> list[Path]:
        """What the output is made of, put together where it was not; only when nothing is missing."""

    def clear(self) -> None:
        """Remove what processes that were killed have left half written; only when nothing is missing."""
        clear_partials(self.folder)


class PNGFolder(Output):
    """`INDEX.png`; labels follow from the index and the labels in `samples.json`."""

    def missing(self) -> list[range]:
        there = {entry.name for entry in os.scandir(self.folder)}
        return [batch for batch in self.plan.batches if any(_png_name(i) not in there for i in batch)]

    def write(self, batch: range, images: Tensor) -> None:
        for i, image in zip(batch, images, strict=True):
            with whole_file(self.folder / _png_name(i)) as partial:
                partial.write_bytes(encode_png(image))

    def finish(self) -> list[Path]:
        return [self.folder]


class _Parts(Output):
    """`parts/FIRST_INDEX.npy` for each batch, until they are put together."""

    def __init__(self, folder: str | Path, plan: SamplePlan) -> None:
        super().__init__(folder, plan)
        self.parts = self.folder / PARTS

    @abstractmethod
    def results(self) -> list[Path]:
        """The files of the finished output, in the order in which they are written."""

    @abstractmethod
    def assemble(self) -> None:
        """Write them, from the parts."""

    def missing(self) -> list[range]:
        if all(path.is_file() for path in self.results()):
            return []
        there = {entry.name for entry in os.scandir(self.parts)} if self.parts.is_dir() else set()
        return [batch for batch in self.plan.batches if self._part(batch).name not in there]

    def write(self, batch: range, images: Tensor) -> None:
        with whole_file(self._part(batch)) as partial, open(partial, "wb") as file:
            np.save(file, images.permute(0, 2, 3, 1).contiguous().numpy())

    def finish(self) -> list[Path]:
        if not all(path.is_file() for path in self.results()):
            try:
                self.assemble()
            except FileNotFoundError:  # another process was quicker and has removed the parts
                if not all(path.is_file() for path in self.results()):
                    raise
        shutil.rmtree(self.parts, ignore_errors=True)
        return self.results()

    def part_arrays(self) -> Iterator[tuple[range, np.ndarray]]:
        """Each batch with its images `(B, H, W, 3)`, in order."""
        for batch in self.plan.batches:
            yield batch, np.load(self._part(batch))

    def _part(self, batch: range) -> Path:
        return self.parts / f"{batch.start:08d}.npy"


class NPZ(_Parts):
    """`samples.npz` as ADM's evaluator takes it: `arr_0` `(N, H, W, 3)` uint8, and labels `arr_1` `(N,)`."""

    def results(self) -> list[Path]:
        return [self.folder / "samples.npz"]

    def assemble(self) -> None:
        parts = self.part_arrays()
        _, first = next(parts)
        N = self.plan.num_samples
        with whole_file(self.results()[0]) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:  # piece by piece: 10 GB for 50,000 images
                header = {"descr": "|u1", "fortran_order": False, "shape": (N, *first.shape[1:])}
                np.lib.format.write_array_header_1_0(array, header)
                array.write(first.tobytes())
                for _, images in parts:
                    array.write(images.tobytes())
            with archive.open("arr_1.npy", "w") as array:
                np.save(array, self.plan.label(range(N)).numpy())


class WebDatasetShards(_Parts):
    """`samples-SHARD.tar` with `INDEX.png` and `INDEX.cls`, and an `index.json` of the shards, written last."""

    samples_per_shard = 1000

    def results(self) -> list[Path]:
        number = -(-self.plan.num_samples // self.samples_per_shard)
        return [*(self.folder / f"samples-{k:06d}.tar" for k in range(number)), self.folder / "index.json"]

    def assemble(self) -> None:
        try:
            from webdataset.writer import TarWriter
        except ImportError as error:
            raise ImportError("shards need webdataset: pip install 'mfm-lightning[imagenet]'") from error
        *shards, index = self.results()
        samples = ((i, image) for batch, images in self.part_arrays() for i, image in zip(batch, images, strict=True))
        sizes = {}
        for k, shard in enumerate(shards):
            size = min(self.samples_per_shard, self.plan.num_samples - k * self.samples_per_shard)
            with whole_file(shard) as partial, open(partial, "wb") as file, TarWriter(file, mtime=0) as tar:
                for _ in range(size):
                    i, image = next(samples)
                    png = encode_png(torch.from_numpy(image).permute(2, 0, 1))
                    tar.write({"__key__": f"{i:08d}", "png": png, "cls": int(self.plan.label([i]))})
            sizes[shard.name] = size
        save_json({"samples": self.plan.num_samples, "shards": sizes}, index)


OUTPUTS: dict[str, Callable[[Path, SamplePlan], Output]] = {
    "png": PNGFolder,
    "npz": NPZ,
    "webdataset": WebDatasetShards,
}


def encode_png(image: Tensor) -> bytes:
    """Bytes `(3, H, W)` as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="png")
    return buffer.getvalue()


def _png_name(index: int) -> str:
    return f"{index:08d}.png"
