"""Data sets of torchvision, by name."""

from __future__ import annotations

import contextlib
import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfm_lightning.data.images.source import LabelledImages, number_names
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.names import nearest


class TorchvisionImages(LabelledImages):
    """A data set of `torchvision.datasets` whose targets are class numbers: MNIST, FashionMNIST, CIFAR10, SVHN, ...

    Args:
        name: of the class in `torchvision.datasets`.
        root: folder that has the data set, or gets it.
        split: train, test, or another that the data set has.
        download: fetch what is not there.
        options: other arguments of the class, such as {split: letters} of EMNIST.

    Raises:
        ValueError: for a name or options that torchvision does not have, or targets that are no class numbers.
        FileNotFoundError: if it is not there and may not be fetched.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        split: str = "train",
        download: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.root, self.split, self.download, self.options = name, root, split, download, options or {}

    @cached_property
    def _dataset(self) -> Any:
        kind = _kind(self.name)
        parameters = inspect.signature(kind).parameters
        given: dict[str, Any] = {"root": self.root} if "root" in parameters else {}
        if "train" in parameters or self.name == "EMNIST":  # which passes it on
            if self.split not in ("train", "test"):
                raise ValueError(f"{self.name} has the splits train and test, got split: {self.split}")
            given["train"] = self.split == "train"
        elif "split" in parameters:
            given["split"] = self.split
        elif self.split != "train":
            raise ValueError(f"{self.name} has no splits, got split: {self.split}")
        if "download" in parameters or self.name == "EMNIST":
            given["download"] = self.download
        given |= self.options
        try:
            with _one_at_a_time(Path(self.root), self.download):
                return kind(**given)
        except RuntimeError as error:
            if "not found" not in str(error) and "corrupted" not in str(error):
                raise
            raise FileNotFoundError(
                f"torchvision's {self.name} ({self.split}) is not in {self.root}, or damaged: give its root, or "
                "download: true to fetch it"
            ) from error
        except TypeError as error:
            raise ValueError(f"options {self.options} do not fit torchvision's {self.name}: {error}") from error

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        dataset = self._dataset
        found = next((getattr(dataset, k) for k in ("targets", "labels", "_labels") if hasattr(dataset, k)), None)
        if found is None:  # it only has them beside its images, which are decoded for it
            found = [dataset[i][1] for i in range(len(dataset))]
        labels = np.asarray(found)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"torchvision's {self.name} has targets {labels.dtype} {labels.shape}, not a class each")
        numbers = number_names(labels, f"torchvision's {self.name}")
        names = list(map(_name, getattr(self._dataset, "classes", [])))
        return labels.astype(np.int64), names if len(names) >= len(numbers) else numbers

    def image(self, i: int) -> Image.Image:
        try:
            image = self._dataset[i][0]
        except (OSError, SyntaxError, ValueError) as error:  # of Pillow
            if isinstance(error, OSError) and error.errno is not None:  # of the storage
                raise
            raise ImageError(f"{self.place(i)} cannot be decoded: {error}") from error
        if not isinstance(image, Image.Image):
            raise ValueError(f"{self.place(i)} is a {type(image).__name__}, not an image")
        return image if image.mode in ("L", "RGB") else image.convert("RGB")

    def place(self, i: int) -> str:
        return f"image {i} of torchvision's {self.name} ({self.split})"


def _kind(name: str) -> Any:
    from torchvision import datasets

    named = {k: v for k, v in vars(datasets).items() if k in datasets.__all__ and isinstance(v, type)}
    known = [k for k, v in named.items() if issubclass(v, datasets.VisionDataset)]
    if name not in known:
        meant = nearest(name, known)
        raise ValueError(f"torchvision has no data set {name!r}" + (f": did you mean {meant}?" if meant else ""))
    return named[name]


def _name(found: Any) -> str:
    return found if isinstance(found, str) else ", ".join(map(str, found))  # ImageNet has tuples


def _one_at_a_time(root: Path, download: bool) -> contextlib.AbstractContextManager[Any]:
    """One process of a machine fetches, the others wait for it."""
    if not download:
        return contextlib.nullcontext()
    from filelock import FileLock

    root.mkdir(parents=True, exist_ok=True)
    return FileLock(root / ".download.lock")
