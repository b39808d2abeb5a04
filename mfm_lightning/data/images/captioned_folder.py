"""Image files in a folder, with a caption each, in the layouts in which such sets are passed on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mfm_lightning.data.class_folders import shortened
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.sampling.prompts import read_rows
from mfm_lightning.utils.decoding import read_image
from mfm_lightning.utils.image_files import find_files
from mfm_rewards.text_lists import lines_of, read_text

log = logging.getLogger(__name__)
LISTS = tuple(f"{name}.{ending}" for name in ("metadata", "captions") for ending in ("jsonl", "csv", "tsv", "parquet"))
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
CAPTION_COLUMNS: str = "text;caption;prompt"
ENDINGS = ("txt", "caption")


class CaptionedFolder(LabelledImages):
    """Images of a folder and its folders, all of one class, with captions from, in this order,

    - a list: metadata.jsonl or .csv, as Hugging Face's image folders, or captions.jsonl, .csv, .tsv; a row names a file
      (column file_name, filename, file, image or path) and has its text;
    - COCO's JSON (`images` and `annotations`), given by its path;
    - a file of the image's name that ends with .txt or .caption.

    Of several captions of an image the first is taken; of several lists, or columns, the first of those above. Images
    without a caption, captions without an image, and files that are neither are left out; an empty caption is the empty
    prompt. Each of these is said in a warning, with their number.

    Args:
        root: of the images.
        captions: the list's path, a column of it (text, caption or prompt where None), PATH:COLUMN, or txt or caption:
            the ending of files beside the images; where there is no such file, a column of that name.

    Raises:
        FileNotFoundError: if there is no such folder, list or image with a caption, when it is first read.
        ValueError: for a list that cannot be read, without the columns, or with a text that is none.
    """

    has_captions = True

    def __init__(self, root: str, captions: str | None = None) -> None:
        self.root, self.given = Path(root), captions

    @cached_property
    def _found(self) -> list[tuple[str, str]]:
        """Names of files, from the root on, with their captions, in the order of names."""
        others: list[str] = []
        images, tars, left_out = find_files(self.root, others=others)
        names = [path.relative_to(self.root).as_posix() for path in images]
        ending = self.given if self.given in ENDINGS else None
        beside = _beside(names, others, [ending] if ending else ENDINGS)
        path, columns = (None, []) if ending and beside else self._list()
        used = set(beside.values()) if path is None else {Path(os.path.relpath(path, self.root)).as_posix()}
        stems = {os.path.splitext(name)[0] for name in names}
        for name in (*(tar.relative_to(self.root).as_posix() for tar in tars), *others):
            stem, end = os.path.splitext(name)
            if path is None and end[1:] in ENDINGS and stem not in stems:
                left_out.add("captions without an image", name)
            elif name not in used:
                left_out.add_file(name)
        left_out.report(self.root)
        captions: dict[str, str] = {}
        several: set[str] = set()
        joined: set[str] = set()  # of several lines
        if path is None:
            for name, text in beside.items():
                lines = _lines(self.root / text)
                captions[name] = " ".join(lines)
                if lines[1:]:
                    joined.add(name)
        else:
            for listed, text in _listed(path, columns):
                name = _below(self.root, listed)
                if name in captions:
                    several.add(name)
                captions.setdefault(name, text)
        found = [(name, captions[name]) for name in names if name in captions]
        if not found:
            if captions:
                raise FileNotFoundError(
                    f"{path} has captions of none of the {len(names)} images of {self.root}: it names "
                    f"{', '.join(shortened(list(captions)))}, the files are {', '.join(shortened(names))}"
                )
            looked = f"in {path}" if path else f"beside the images (.{' or .'.join([ending] if ending else ENDINGS)})"
            raise FileNotFoundError(
                f"no captions {looked} for the {len(names)} images of {self.root}: expected one of {', '.join(LISTS)} "
                "with the files' names and texts, or a text of each image's name"
            )
        for what, which in (
            ("images without a caption are left out", [name for name in names if name not in captions]),
            ("captions without an image are left out", sorted(captions.keys() - set(names))),
            ("images have several captions, of which the first is taken", [n for n, _ in found if n in several]),
            ("captions are of several lines, which are joined to one text", [n for n, _ in found if n in joined]),
            ("captions are empty: they become the empty prompt", [name for name, text in found if not text]),
        ):
            if which:
                log.warning("%s: %d %s: %s", self.root, len(which), what, ", ".join(shortened(which)))
        return found

    def _list(self) -> tuple[Path | None, Sequence[str]]:
        """The list of captions, if there is one, and the columns of which the first that is there has them."""
        given, columns = self.given, CAPTION_COLUMNS.split(";")
        if given is not None and ":" in given and not Path(given).is_file():
            given, _, column = given.rpartition(":")
            columns = [column]
        if given is not None and (Path(given).suffix or Path(given).is_file()):
            if not Path(given).is_file():
                raise FileNotFoundError(f"no list of captions at {given}")
            return Path(given), columns
        found = [self.root / name for name in LISTS if (self.root / name).is_file()]
        if not found and given is not None and given not in ENDINGS:
            raise FileNotFoundError(
                f"captions {self.given!r} is none of a file, {' and '.join(ENDINGS)}, and {self.root} has no list of "
                f"captions ({', '.join(LISTS)}) with such a column"
            )
        if found[1:]:
            unused = ", ".join(path.name for path in found[1:])
            log.warning("%s: captions are from %s, not %s: give the path of another", self.root, found[0].name, unused)
        return (found[0] if found else None), columns if given is None else [given]

    @property
    def contents(self) -> object:
        return [(stat.st_size, stat.st_mtime_ns) for stat in (Path(self.place(i)).stat() for i in range(len(self)))]

    def __len__(self) -> int:
        return len(self._found)

    def read_classes(self) -> tuple[np.ndarray, list[str]]:
        return np.zeros(len(self._found), dtype=np.int64), ["all"]

    def image(self, i: int) -> Image.Image:
        return read_image(Path(self.place(i)))

    def caption(self, i: int) -> str:
        return self._found[i][1]

    def place(self, i: int) -> str:
        return str(self.root / self._found[i][0])

    def line(self) -> str:
        return f"{len(self)} images with captions"


def _lines(path: Path) -> list[str]:
    """The lines that are not empty, without white space that says nothing."""
    return [found for line in lines_of(read_text(path)) if (found := " ".join(line.split()))]


def _below(root: Path, name: str) -> str:
    """A name of a list from the root on: as the file's path has it, also where the list has a whole path."""
    found = os.path.normpath(name)
    if os.path.isabs(name):
        found = os.path.relpath(name, root)
        if found.startswith(os.pardir):  # one of them is named by a link
            place, last = os.path.split(name)
            found = os.path.join(os.path.relpath(os.path.realpath(place), os.path.realpath(root)), last)
    return Path(os.path.normpath(found)).as_posix()


def _beside(names: Sequence[str], others: Sequence[str], endings: Sequence[str]) -> dict[str, str]:
    """The text of an image's name with one of the endings, the first that is there, by the image."""
    there = set(others)
    texts = {name: [f"{os.path.splitext(name)[0]}.{ending}" for ending in endings] for name in names}
    return {name: text for name in names if (text := next((t for t in texts[name] if t in there), None))}


def _listed(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of files with the captions of a list."""
    if path.suffix == ".json" and (coco := _coco(path, columns[0] if len(columns) == 1 else "caption")) is not None:
        yield from coco
        return
    said = set()
    for number, row in read_rows(path, columns[0]):
        where, named = f"{path}, row {number}", {str(key).lower(): key for key in row}
        files, texts = ([named[n.lower()] for n in wanted if n.lower() in named] for wanted in (FILE_COLUMNS, columns))
        if not files or not texts:
            missing = columns if files else FILE_COLUMNS
            beside = f"; and no .{missing[0]} is beside an image" if missing[0] in ENDINGS and len(missing) == 1 else ""
            raise ValueError(f"{where}: no column {' or '.join(missing)}, only {', '.join(map(str, row))}{beside}")
        for what, there in (("names of files", files), ("captions", texts)):
            if there[1:] and what not in said:
                said.add(what)
                log.warning("%s: %s are those of column %s, not %s", path, what, there[0], ", ".join(there[1:]))
        file, text = files[0], texts[0]
        if not isinstance(row[file], str) or not isinstance(row[text], str):
            raise ValueError(f"{where}: {file} is {row[file]!r} and {text} {row[text]!r}: expected two texts")
        yield Path(row[file]).as_posix(), row[text].strip()


def _coco(path: Path, key: str) -> list[tuple[str, str]] | None:
    """The captions of COCO's JSON with their images' names; None for another one."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict) or not {"images", "annotations"} <= found.keys():
            return None
        names = {
            image["id"]: str(image["file_name"]) for image in _having(("id", "file_name"), found["images"], "image")
        }
        of_images = _having(("image_id", key), found["annotations"], "annotation")
        if unknown := [each["image_id"] for each in of_images if each["image_id"] not in names]:
            raise ValueError(f"an annotation is of image {unknown[0]!r}, which is not among the images")
        texts = [(names[annotation["image_id"]], annotation[key]) for annotation in of_images]
        if wrong := [name for name, text in texts if not isinstance(text, str)]:
            raise TypeError(f"the {key} of {wrong[0]} is no text")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of captions as COCO's: {error}") from error
    return [(name, text.strip()) for name, text in texts]


def _having(keys: Sequence[str], rows: Any, what: str) -> list[dict[str, Any]]:
    """The rows, if each is an object with these keys; TypeError or ValueError, with what the first other one has."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise TypeError(f"{what} {i} is {row!r:.40}, no object")
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{what} {i} has no {missing[0]}, only {', '.join(map(str, row))}")
    return rows
