"""Data sets of Hugging Face's `datasets`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfm_lightning.data.images.source import LabelledImages, number_names
from mfm_lightning.utils.decoding import ImageError, decode, read_image


class HuggingFaceImages(LabelledImages):
    """A data set that `datasets` opens: a folder of parquet files, of images or of `save_to_disk`, or an id of the hub.

    Args:
        path: of a folder, or an id such as ylecun/mnist.
        split: of the data set, such as train, test or validation.
        name: of its configuration, if it has several.
        image: column of images.
        label: column of class numbers; null: all images are one class.
        caption: column of texts, which become prompts; of several with `;` between them the first that is there; null:
            none are read.
        download: open an id, and fetch what is not in the cache.
        cache: folder for what `datasets` keeps; its own where left out.

    Raises:
        ImportError: without the package `datasets`.
        FileNotFoundError: for what is no folder, without download.
        ValueError: for a split or column that it does not have, or captions that are not all texts.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        name: str | None = None,
        image: str = "image",
        label: str | None = "label",
        caption: str | None = None,
        download: bool = False,
        cache: str | None = None,
    ) -> None:
        self.path, self.split, self.name = path, split, name
        self.image_column, self.label_column, self.caption_column = image, label, caption
        self.download, self.cache, self.has_captions = download, cache, caption is not None

    @cached_property
    def _dataset(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("HuggingFaceImages needs datasets: pip install 'mfm-lightning[datasets]'") from error
        if not Path(self.path).is_dir() and not self.download:
            raise FileNotFoundError(
                f"no folder {self.path}: give one of parquet files or images, or download: true to fetch the id"
            )
        try:
            found: Any = self._opened(datasets)
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"datasets cannot open {self.path} ({self.split}): {reason}") from error
        if self.caption_column is not None:
            columns = self.caption_column.split(";")
            self.caption_column = next((c for c in columns if c in found.column_names), self.caption_column)
        wanted = {"image": self.image_column, "label": self.label_column, "caption": self.caption_column}
        for what, column in wanted.items():
            if column is not None and column not in found.column_names:
                raise ValueError(
                    f"{self.path} has the columns {', '.join(found.column_names)}, not {column!r}: set {what}"
                )
        self._check_captions(found)
        try:
            return found.cast_column(self.image_column, datasets.Image(decode=False))  # decoded as all others here
        except (NotImplementedError, TypeError, ValueError) as error:  # what pyarrow's errors are
            kind = found.features[self.image_column]
            raise ValueError(
                f"{self.path}: {self.image_column} has {getattr(kind, 'dtype', kind)}, no images: set image to the "
                f"column that has them ({', '.join(found.column_names)})"
            ) from error

    def _opened(self, datasets: Any) -> Any:
        if not any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(self.path, self.name, split=self.split, cache_dir=self.cache)
        found = datasets.load_from_disk(self.path)  # what `save_to_disk` left: one split, or several by name
        if isinstance(found, dict):
            if self.split not in found:
                whole = " to one of them, whole" if "[" in self.split else ""
                raise ValueError(f"it has the splits {', '.join(found)}: set split{whole}")
            return found[self.split]
        if self.split != str(found.split or "train"):
            raise ValueError(
                f"it has one split, {found.split or 'without a name'}: set split: {found.split or 'train'}"
            )
        return found

    def _check_captions(self, dataset: Any) -> None:
        """Refuse a column of captions that are not all texts."""
        if (column := self.caption_column) is None:
            return
        kind = getattr(dataset.features[column], "dtype", None)
        if kind not in ("string", "large_string"):
            raise ValueError(
                f"{self.path}: {column} has {kind or dataset.features[column]}, not a text each: set caption to a "
                "column of texts, or leave it out"
            )
        texts = dataset.with_format("arrow")[column][:]
        if texts.null_count:
            first = texts.is_null().index(True).as_py()
            raise ValueError(
                f"{self.place(first)} has no {column} ({texts.null_count} of {len(texts)} have none): expected a text "
                "each, an empty one where there is none"
            )

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        if self.label_column is None:
            return np.zeros(len(self._dataset), dtype=np.int64), ["all"]
        labels = np.asarray(self._dataset[self.label_column][:])
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{self.path}: {self.label_column} has {_said(labels)}, not a whole number each: make texts classes by "
                f"class_encode_column({self.label_column!r}) of `datasets`, name another column, or leave it out"
            )
        numbers = number_names(labels, self.path)
        return labels.astype(np.int64), list(getattr(self._dataset.features[self.label_column], "names", numbers))

    @property
    def contents(self) -> object:
        return self._dataset._fingerprint

    def image(self, i: int) -> Image.Image:
        found = self._dataset[i][self.image_column]
        if not found or (found["bytes"] is None and found["path"] is None):
            raise ImageError(f"{self.place(i)} is empty")
        return read_image(Path(found["path"])) if found["bytes"] is None else decode(found["bytes"], self.place(i))

    @cached_property
    def _captions(self) -> list[str]:
        """All of them, read at once and without the images: one by one takes a minute for a million."""
        dataset = self._dataset  # which finds the column
        return list(dataset.select_columns([self.caption_column])[self.caption_column][:])

    def caption(self, i: int) -> str:
        return self._captions[i].strip()

    def place(self, i: int) -> str:
        return f"image {i} of {self.path} ({self.split})"


def _said(labels: np.ndarray) -> str:
    """What a column has in place of labels."""
    if labels.ndim == 1 and (missing := [i for i, label in enumerate(labels.tolist()) if label is None]):
        return f"nothing in {len(missing)} of {len(labels)} rows, first in row {missing[0]}"
    if labels.ndim == 1 and labels.dtype.kind in "OU" and all(isinstance(label, str) for label in labels.tolist()):
        return f"texts, such as {str(labels[0])!r}"
    return f"{labels.dtype} {labels.shape}"
