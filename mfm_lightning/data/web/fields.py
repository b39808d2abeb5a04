"""Which files of a sample are its image or latent, its label and its caption, and what they say."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from mfm_lightning.data.class_folders import MOST_CLASSES, shortened
from mfm_lightning.data.latent_form import native
from mfm_lightning.data.web.shards import CUT, CutSampleError
from mfm_lightning.utils.decoding import decode


@dataclass(frozen=True)
class Fields:
    """Endings of files (`jpg`), several with `;` between them (`jpg;png;webp`: the first that is there); of a JSON file
    with the key after a colon (`json:label`).

    Args:
        state: of the image, or the array of the latent.
        label: of the label, a whole number from 0 on; None: no labels.
        caption: of a text; None: no captions.
        num_classes: labels are below it, where it is given.
    """

    state: str
    label: str | None = None
    caption: str | None = None
    num_classes: int | None = None

    def check(self, sample: Mapping[str, Any]) -> int:
        """The label of a sample that has all that is asked for; the image or array is not read.

        Raises:
            ValueError: as `label_of` and `caption_of`, or if there is no image or array.
        """
        label = self.label_of(sample)
        if self.caption is not None:
            self.caption_of(sample)
        _first(sample, self.state)
        return label

    def image(self, sample: Mapping[str, Any]) -> tuple[Image.Image, str]:
        """The image as `decode` gives it, and where it is; raises as that."""
        name, content = _first(sample, self.state)
        place = f"{_place(sample)}.{name}"
        return decode(content, place), place

    def array(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, str]:
        """The `.npy`, and where it is.

        Raises:
            ValueError: if there is none, or it cannot be read.
        """
        name, content = _first(sample, self.state)
        place = f"{_place(sample)}.{name}"
        try:
            return native(np.load(io.BytesIO(content), allow_pickle=False)), place
        except (ValueError, EOFError, OSError, BadZipFile) as error:
            raise ValueError(f"{place} cannot be read as .npy: {error}") from error

    def label_of(self, sample: Mapping[str, Any]) -> int:
        """The label; `num_classes`, or 0, of samples that have none.

        Raises:
            ValueError: if it is not there, no whole number, or outside the classes.
        """
        if self.label is None:
            return self.num_classes or 0
        found, place = _value(sample, self.label, ", or give no label where samples have none (label: null)")
        try:
            label = whole_number(found)
        except ValueError as error:
            raise ValueError(f"{place} is {found!r}, expected a label, a whole number from 0 on") from error
        limit = MOST_CLASSES if self.num_classes is None else self.num_classes
        if not 0 <= label < limit:
            raise ValueError(f"{place}: label {label} is outside 0..{limit - 1}")
        return label

    def caption_of(self, sample: Mapping[str, Any]) -> str:
        """The caption, in one line and without spaces around it.

        Raises:
            ValueError: if it is not there, or no text.
        """
        found, place = _value(sample, self.caption or "")
        if not isinstance(found, str):
            raise ValueError(f"{place} is {found!r}, expected a text")
        return " ".join(found.split())


def whole_number(found: object) -> int:
    """A label: a whole number, or its digits in ASCII, with white space around them or not; not 1_0, as `int` has it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(found, str) and re.fullmatch(r"[+-]?[0-9]+", found.strip()):
        return int(found)
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    raise ValueError(f"{found!r} is no whole number")


def _value(sample: Mapping[str, Any], key: str, more: str = "") -> tuple[Any, str]:
    """The text of a file or the value of a JSON's key, and where it is."""
    endings, _, inner = key.partition(":")
    name, content = _first(sample, endings, more)
    place = f"{_place(sample)}.{name}"
    try:
        text = content.decode("utf-8-sig")
        if not inner:
            return text, place
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is no {'JSON' if inner else 'text in UTF-8'}: {error}") from error
    if not isinstance(found, dict) or inner not in found:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{place} has no key {inner!r}: it has {keys}")
    return found[inner], f"{place}:{inner}"


def _first(sample: Mapping[str, Any], endings: str, more: str = "") -> tuple[str, bytes]:
    wanted = endings.lower().split(";")  # webdataset has them in small letters
    for name in wanted:
        if name in sample:
            return name, sample[name]
    names = [name for name in sample if not name.startswith("__")]
    kind = CutSampleError if CUT in sample else ValueError
    if dotted := [name for name in names if "." in name and name.rpartition(".")[2] in wanted]:
        raise kind(
            f"{_place(sample)} has {', '.join(shortened(dotted))}: names of samples have a dot, and what follows the "
            "first one is the ending of a shard's file: pack them under names without dots"
        )
    raise kind(
        f"{_place(sample)} has {', '.join(shortened(names)) or 'nothing'}, expected {' or '.join(wanted)}: name the "
        f"file's ending in the config{more}"
    )


def _place(sample: Mapping[str, Any]) -> str:
    return f"{sample['__url__']}:{sample['__key__']}"
