"""Which folders are classes, in which order, and by which label: of a tree `ROOT/CLASS/*.jpg`, of a flat folder, and of
class indices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mfm_lightning.utils.image_files import LeftOut, find_files, is_image, is_junk, walk
from mfm_rewards.text_lists import TextListError, read_list

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
LABELS = "dataset.json"  # of folders whose own folders are no classes, as NVIDIA's and REPA's tools write them
MOST_CLASSES = 1_000_000  # where they are not named: a label above is no class
_SHOWN = 5


class InputError(ValueError):
    """A tree or shards of images that cannot be read as they are."""


@dataclass(frozen=True)
class FoundImage:
    """An image of a tree: its path from the root on, label, and what tells that it was replaced."""

    name: str
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ClassTree:
    """The images of a tree by class, in the order of names.

    Args:
        class_to_idx: labels by name of the folder; also of classes of an index that have no folder.
        images: all of them.
        order: how labels were given, in words; "" for the order of names.
        left_out: files that are no images.
    """

    class_to_idx: dict[str, int]
    images: list[FoundImage]
    order: str
    left_out: LeftOut

    def line(self) -> str:
        """What was found, such as "2 images of 2 classes: 0 cat, 1 dog"."""
        names = [f"{label} {name}" for name, label in sorted(self.class_to_idx.items(), key=lambda item: item[1])]
        shown = shortened(names)
        order = f" ({self.order})" if self.order else ""
        return f"{len(self.images)} images of {len(names)} classes{order}: {', '.join(shown)}"


def find_classes(root: Path, class_index: Path | None = None) -> ClassTree:
    """The images below a folder, whose folders are classes but for hidden ones.

    Labels follow the class index; without, a `dataset.json` of `{"labels": [["00000/img00000000.png", 3], ...]}` in
    the folder (the layout of EDM2's and REPA's tools, whose folders are no classes); else the names' order, which is
    numeric where all of them are whole numbers.

    Raises:
        FileNotFoundError: if there is no such folder, no class in it, a class without images, or no image that
            `dataset.json` lists.
        InputError: for labels in `dataset.json` that are none, or an image that is there twice.
        InputError: for a folder that the index does not have; where no image lies in a class folder itself, so that
            the folders above the classes were given.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected one folder of images for each class in it")
    if class_index is None and (listed := _listed(root)) is not None:
        return listed
    left_out, names = LeftOut(), []
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir() and not is_junk(entry.name):
                names.append(entry.name)
            elif is_junk(entry.name):
                continue
            elif not entry.is_file():
                left_out.add("not plain files", entry.name)
            elif is_image(entry.name):
                left_out.add("images beside the class folders", entry.name)
            else:
                left_out.add_file(entry.name)
    if not names:
        found = f"; {line}" if (line := left_out.line()) else ""
        raise FileNotFoundError(f"Couldn't find any class folder in {root}{found}: expected ROOT/CLASS/IMAGE")
    class_to_idx, order = _labels(names, root, class_index)
    images = {name: _images(root, name, class_to_idx[name], left_out) for name in names}
    if class_index is None:
        _check_level(root, images)
    if empty := [name for name in names if not images[name]]:
        found = f"; {line}" if (line := left_out.line()) else ""
        raise FileNotFoundError(
            f"Found no valid file for the classes {', '.join(empty[:_SHOWN])} in {root}: remove their folders, or give "
            f"images{found}"
        )
    if absent := len(class_to_idx) - len(names):
        order += f", which has {absent} more, without images"
    return ClassTree(class_to_idx, [image for name in names for image in images[name]], order, left_out)


def shortened(names: Sequence[str]) -> list[str]:
    """The first names and the last, where there are many."""
    return list(names) if len(names) <= 2 * _SHOWN else [*names[:_SHOWN], "...", names[-1]]


def find_images(root: Path, class_index: Path | None = None) -> ClassTree:
    """As `find_classes`; in a folder without folders, its images as one class, "all".

    Raises:
        FileNotFoundError, InputError: as `find_classes`; if there are no images.
        InputError: for a class index of a folder without classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected one of images, or of a folder for each class")
    if class_index is None and (listed := _listed(root)) is not None:
        return listed
    with os.scandir(root) as entries:
        if any(entry.is_dir() and not is_junk(entry.name) for entry in entries):
            return find_classes(root, class_index)
    if class_index is not None:
        raise InputError(f"{root} has no class folders, to which {class_index} could give labels: leave it out")
    files, tars, left_out = find_files(root, deep=False)
    for path in tars:
        left_out.add_file(path.name)
    if not files:
        found = f"; {line}" if (line := left_out.line()) else ""
        raise FileNotFoundError(f"no images (.png, .jpg, ...) in {root}{found}")
    stats = [(path.name, path.stat()) for path in files]
    images = [FoundImage(name, 0, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return ClassTree({"all": 0}, images, "there are no class folders", left_out)


def _listed(root: Path) -> ClassTree | None:
    """The images of a folder by its `dataset.json`; None where there is none, or one that lists no image."""
    try:
        found = json.loads((root / LABELS).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{root / LABELS} is no JSON, so the labels are not known: {error}") from error
    if not isinstance(found, dict) or "labels" not in found:
        return None
    listed = found["labels"]
    if listed is None:
        tree = _images_of_tree(root, None)
        return tree if tree.images else None
    if not isinstance(listed, list):
        return None
    named = any(isinstance(row, list) and row and is_image(str(row[0])) for row in listed)
    return _images_of_tree(root, _listed_labels(root, listed)) if named else None


def _listed_labels(root: Path, listed: list[Any]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for row in listed:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int):
            raise InputError(f"{root / LABELS} has {row!r:.60}, expected a name and a label, a whole number from 0 on")
        path = PurePosixPath(row[0])
        if path.is_absolute() or ".." in path.parts or not 0 <= row[1] < MOST_CLASSES:
            raise InputError(f"{root / LABELS} has {row!r:.60}, expected a file in {root} and a label from 0 on")
        if str(path) in labels:
            raise InputError(f"{root / LABELS} lists {path} twice, with the labels {labels[str(path)]} and {row[1]}")
        labels[str(path)] = row[1]
    return labels


def _images_of_tree(root: Path, labels: dict[str, int] | None) -> ClassTree:
    """All images below a folder, with the labels that are given; of one class without."""
    images, left_out, begin = [], LeftOut(), len(os.path.join(root, ""))
    for entry in walk(root):
        name = entry.path[begin:]
        if is_image(name) and (labels is None or name in labels):
            stat = entry.stat()
            images.append(FoundImage(name, labels[name] if labels else 0, stat.st_size, stat.st_mtime_ns))
        elif is_image(name):
            left_out.add(f"images that {LABELS} does not list", name)
        elif name != LABELS:
            left_out.add_file(name)
    images.sort(key=lambda image: image.name)
    if labels is None:
        return ClassTree({"all": 0}, images, f"{LABELS} has no labels", left_out)
    if missing := labels.keys() - {image.name for image in images}:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(labels)} images that {root / LABELS} lists are not there, the first "
            f"{min(missing)}"
        )
    classes = {str(label): label for label in range(max(labels.values()) + 1)}
    return ClassTree(classes, images, f"labels of {LABELS}", left_out)


def read_class_index(path: Path) -> dict[str, int]:
    """Labels by name of the class folder: as `{"cat": 0}`, or of any form that `mfm_rewards.text_lists` reads, such as
    `imagenet_class_index.json`, of which the WordNet ids are the folders.

    Raises:
        FileNotFoundError: if it is not there.
        InputError: unless its labels are 0..n-1 and its names are there once each.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no class index at {path}")
    try:
        names = [entry.wordnet or entry.name for entry in read_list(path)]
    except TextListError as error:
        raise InputError(f"class index: {error}") from error
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(name for label, name in enumerate(names) if labels[name] != label)
        raise InputError(f"{path}: the class {twice!r} is there twice")
    return labels


def _labels(names: list[str], root: Path, class_index: Path | None) -> tuple[dict[str, int], str]:
    if class_index is not None:
        labels = read_class_index(class_index)
        if unknown := [name for name in names if name not in labels]:
            raise InputError(
                f"{class_index} has no class {unknown[0]!r}, which is a folder in {root} ({len(unknown)} such of "
                f"{len(names)}): add it, or move the folder"
            )
        return labels, f"by {class_index}"
    if all(name.isdecimal() and name.isascii() for name in names):
        numeric = sorted(names, key=lambda name: (int(name), name))
        if numeric != names:
            return {name: i for i, name in enumerate(numeric)}, "names are whole numbers, in numeric order"
    return {name: i for i, name in enumerate(names)}, ""


def _images(root: Path, name: str, label: int, left_out: LeftOut) -> list[FoundImage]:
    found, begin = [], len(str(root / name)) - len(name)  # of the root as the paths have it: none of "."
    for entry in walk(root / name):
        path = entry.path[begin:]  # of a million images: Path.relative_to takes longer than all else
        if not entry.is_file():
            left_out.add("not plain files", path)
        elif is_image(entry.name):
            stat = entry.stat()
            found.append(FoundImage(path, label, stat.st_size, stat.st_mtime_ns))
        else:
            left_out.add_file(path)
    return sorted(found, key=lambda image: image.name)


def _check_level(root: Path, images: dict[str, list[FoundImage]]) -> None:
    """Raise InputError where what was taken for classes are folders above them."""
    deep = [name for name, found in images.items() if found and not any(i.name.count("/") == 1 for i in found)]
    all_splits = all(name.lower() in _SPLITS for name in images)
    splits = [
        name
        for name, found in images.items()
        if name.lower() in _SPLITS and (all_splits or any(i.name.count("/") > 1 for i in found))
    ]
    if splits or (deep and not any(found for name, found in images.items() if name not in deep)):
        one = next((name for name in splits if name.lower().startswith("train")), (splits or deep)[0])
        what = "a part of a data set" if splits else "folders of folders, without images of their own"
        raise InputError(
            f"{root}: {', '.join((splits or deep)[:_SHOWN])} in it are {what}, not classes: give {root / one}, "
            "or a class index (--class-index) if they are the classes"
        )
