"""Image files in a folder, with a caption each, in the layouts in which such sets are passed on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
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

log = logging.getLogger(__name__)
LISTS = tuple(f"{name}.{ending}" for name in ("metadata", "captions") for ending in ("jsonl", "csv", "tsv", "parquet"))
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
CAPTION_COLUMNS: str = "text;caption;prompt"
ENDINGS = ("txt", "caption")


class CaptionedFolder(LabelledImages):
    """Images of a folder and its folders, all of one class, with captions from, in this order,

    - a list: metadata.jsonl or .csv, as Hugging Face's image folders, or captions.jsonl, .csv, .tsv; a row names a file
      (column file_name, filename, file, image or path) and has its text;
    - COCO's JSON (`images` and `annotations`), given by its path; of several captions of an image the first;
    - a file of the image's name that ends with .txt or .caption.

    Images without a caption, and rows without an image, are left out, and counted in a warning.

    Args:
        root: of the images.
        captions: the list's path, a column of it (text, caption or prompt where None), or txt or caption: the ending of
            files beside the images.

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
        images, _, _ = find_files(self.root)
        names = [path.relative_to(self.root).as_posix() for path in images]
        ending = self.given if self.given in ENDINGS else None
        path = None if ending else self._list()
        captions = dict(self._beside(names, ending) if path is None else _listed(path, self._columns()))
        found = [(name, captions[name]) for name in names if name in captions]
        if not found:
            looked = f"in {path}" if path else f"beside the images (.{' or .'.join([ending] if ending else ENDINGS)})"
            raise FileNotFoundError(
                f"no captions {looked} for the {len(names)} images of {self.root}: expected one of {', '.join(LISTS)} "
                "with the files' names and texts, or a text of each image's name"
            )
        for what, left in (
            ("images without a caption", [name for name in names if name not in captions]),
            ("captions without an image", sorted(captions.keys() - set(names))),
        ):
            if left:
                log.warning("%s: %d %s are left out: %s", self.root, len(left), what, ", ".join(shortened(left)))
        return found

    def _list(self) -> Path | None:
        given = None if self.given is None else Path(self.given)
        if given is not None and (given.suffix or given.is_file()):
            if not given.is_file():
                raise FileNotFoundError(f"no list of captions at {given}")
            return given
        found = next((path for name in LISTS if (path := self.root / name).is_file()), None)
        if found is None and given is not None:
            raise FileNotFoundError(
                f"captions {self.given!r} is none of a file, {' and '.join(ENDINGS)}, and {self.root} has no list of "
                f"captions ({', '.join(LISTS)}) with such a column"
            )
        return found

    def _columns(self) -> list[str]:
        own = self.given is not None and not Path(self.given).suffix
        return [self.given] if own and self.given else CAPTION_COLUMNS.split(";")

    def _beside(self, names: list[str], ending: str | None) -> Iterator[tuple[str, str]]:
        for name in names:
            for each in [ending] if ending else ENDINGS:
                path = (self.root / name).with_suffix(f".{each}")
                if path.is_file():
                    yield name, _text(path)
                    break

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


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from error


def _listed(path: Path, columns: list[str]) -> Iterator[tuple[str, str]]:
    """Names of files with the captions of a list."""
    if path.suffix == ".json" and (coco := _coco(path)) is not None:
        yield from coco
        return
    for number, row in read_rows(path, columns[0]):
        where, named = f"{path}, row {number}", {str(key).lower(): key for key in row}
        file = next((named[name] for name in FILE_COLUMNS if name in named), None)
        text = next((named[name.lower()] for name in columns if name.lower() in named), None)
        if file is None or text is None:
            missing = FILE_COLUMNS if file is None else columns
            raise ValueError(f"{where}: no column {' or '.join(missing)}, only {', '.join(map(str, row))}")
        if not isinstance(row[file], str) or not isinstance(row[text], str):
            raise ValueError(f"{where}: {file} is {row[file]!r} and {text} {row[text]!r}: expected two texts")
        yield Path(row[file]).as_posix(), row[text].strip()


def _coco(path: Path) -> list[tuple[str, str]] | None:
    """The first caption of each image of COCO's JSON; None for another one."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict) or not {"images", "annotations"} <= found.keys():
            return None
        names = {image["id"]: str(image["file_name"]) for image in found["images"]}
        texts: dict[str, str] = {}
        for annotation in found["annotations"]:
            texts.setdefault(names[annotation["image_id"]], str(annotation["caption"]).strip())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of captions as COCO's: {type(error).__name__}: {error}") from error
    return list(texts.items())
