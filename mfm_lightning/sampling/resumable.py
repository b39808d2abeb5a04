"""Folders of samples that can be stopped at any moment and gone on with: of one set of settings, sample by sample."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_lightning.utils.atomic import check_is_folder, save_json

DELETE = "give another folder, or delete it"
OVERWRITE = "take another folder by --trainer.default_root_dir, or write over it by --overwrite"


class ResumableFolder(ABC):
    """Base class: samples by their index, from 0 on. A sample's files are there whole or not at all.

    Args:
        path: is made where it is not there.

    Attributes:
        note: the name of the file that says what the samples depend on.
        what: they are, in messages.
    """

    note: str = "settings.json"
    what: str = "samples"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @abstractmethod
    def there(self) -> set[int]:
        """The samples that are there."""

    def begun(self) -> bool:
        """Whether a sample was written, whole or not."""
        return bool(self.there())

    def left(self, number: int) -> list[int]:
        """Which of the first `number` samples are not there."""
        there = self.there()
        return [index for index in range(number) if index not in there]

    def claim(self, settings: Mapping[str, Any], remedy: str = DELETE) -> None:
        """Write what the samples depend on, or compare it with what is there; called by every process.

        Args:
            remedy: what to do where it is something else.

        Raises:
            NotADirectoryError: if the folder is a file.
            ValueError: if it has samples of other settings, with those that differ, or of settings that nobody knows.
        """
        check_is_folder(self.path)
        note, begun = self.path / self.note, self.begun()
        if begun and not note.is_file():
            raise ValueError(f"{self.path} has {self.what}, and no {self.note} that says of what: {remedy}")
        if not begun:  # what was asked for before made nothing
            write_json(note, settings)
        compare_settings(note, settings, self.what, remedy)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole; several processes may do so at once with the same content."""
    save_json(content, path, ensure_ascii=False, default=plain)


def compare_settings(note: Path, settings: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise ValueError if a folder's note says other settings than these, with the first that differs."""
    mine = json.loads(json.dumps(settings, default=plain))
    try:
        there = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{note} is no JSON ({error}): {remedy}") from error
    if not isinstance(there, dict):
        raise ValueError(f"{note} is no JSON object of settings ({there!r:.40}): {remedy}")
    different = [key for key in sorted(mine.keys() | there.keys()) if mine.get(key) != there.get(key)]
    if different:
        key = different[0]
        was, now = _from_where_they_differ(str(there.get(key)), str(mine.get(key)))
        raise ValueError(
            f"{note.parent} has {what} of other settings, which differ in {', '.join(different)} "
            f"({key}: {was} there, {now} now): {remedy}"
        )


def dealt(missing: Sequence[int], rank: int, world_size: int, together: int = 1, even: bool = False) -> list[int]:
    """A rank's share of the samples that are missing, in order.

    Args:
        together: so many samples next to each other are made together: of those of which one is missing, all are.
        even: all ranks get as many, as ranks need that compute each step together; some samples are made twice.
    """
    groups = sorted({index // together for index in missing})[rank::world_size]
    share = [group * together + k for group in groups for k in range(together)]
    if even and missing and len(share) < -(-len(missing) // world_size):
        share.append(missing[rank % len(missing)])
    return share


def plain(value: Any) -> Any:
    """What JSON does not know: numbers of numpy as plain ones, all else by its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _from_where_they_differ(a: str, b: str) -> tuple[str, str]:
    """Both texts, shortened: what is the same in front is left out where it is long."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    begin = max(0, same - 40)
    dots = "..." if begin else ""
    return f"{dots}{a[begin : same + 80]}", f"{dots}{b[begin : same + 80]}"
