"""Writes shards so that a kill at any moment leaves each either whole or not there."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.data.latents.index import CLASSES, INDEX, LatentIndex, Layout, Shard
from mfm_lightning.data.latents.text_form import TextForm
from mfm_lightning.data.latents.urls import from_webdataset
from mfm_lightning.utils.atomic import clear_partials, whole_file

PARTS = "parts"  # folder of what is known of each finished shard, until all are in the index


class Text(NamedTuple):
    """A caption, and its embedding as rows of one."""

    caption: str
    embedding: Embedding


class LatentSample(NamedTuple):
    """Key, label and moments `(2, 2, C, H, W)` float16 of an image, and its caption."""

    key: str
    label: int
    moments: np.ndarray
    text: Text | None = None


def write_shard(
    folder: Path,
    name: str,
    samples: Iterable[tuple[Any, ...]],
    broken: list[str],
    form: TextForm | None = None,
    cut: list[str] | None = None,
) -> None:
    """Write a shard and what is known of it; the shard's own name appears last, and at once.

    Args:
        samples: what `LatentSample` has, of each; an error in it leaves no shard.
        broken: keys that were left out, as they are known when the samples are at their end.
        form: of the captions, where samples have some.
        cut: keys whose captions are longer than what is embedded, known as `broken`.

    Raises:
        ValueError: for a sample that is not laid out as the first one's shape says.
    """
    samples, labels = iter(samples), []
    first = next(samples, None)
    if first is None:
        _note(folder, Shard(name, 0, "", np.empty(0, dtype=np.int64)), broken, cut)
        return
    stride = Layout(first[2].shape[2:], form).stride
    with whole_file(folder / name, sync=True) as partial:
        with open(partial, "wb") as file, _tar_writer(file) as tar:
            for key, label, moments, text in (LatentSample(*sample) for sample in chain([first], samples)):
                files = {"cls": label, "npy": np.ascontiguousarray(moments, dtype="<f2")}
                if form is not None and text is not None:
                    files |= {"safetensors": form.file(text.embedding), "txt": form.caption_file(text.caption)}
                tar.write({"__key__": key, **files})
                labels.append(label)
                if (end := tar.tarstream.offset) != len(labels) * stride:
                    raise ValueError(f"{name}: sample {key!r} ends at byte {end}, not at {len(labels)} * {stride}")
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _note(folder, Shard(name, partial.stat().st_size, digest, np.array(labels, dtype=np.int64)), broken, cut)


def _tar_writer(file: BinaryIO) -> Any:
    """webdataset's, of one header for each name, whatever is in it; with a fixed time, for the same bytes each time."""
    from_webdataset()
    from webdataset.writer import TarWriter

    tar = TarWriter(file, mtime=0)
    tar.tarstream.format, tar.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"  # webdataset 1.0.2 takes no format
    return tar


def _note(folder: Path, shard: Shard, broken: list[str], cut: list[str] | None) -> None:
    more = {} if cut is None else {"cut": len(cut)}
    write_json(folder / PARTS / f"{shard.name}.json", {**shard.as_dict(), "broken": list(broken), **more})


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a shard that is whole; None if it must be written."""
    try:
        found = json.loads((folder / PARTS / f"{name}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    path = folder / name
    whole = not found["samples"] or (path.is_file() and path.stat().st_size == found["bytes"])
    return found if whole else None


def unit_path(folder: Path, unit: int) -> Path:
    """Says which shards a finished unit has."""
    return folder / PARTS / f"unit-{unit:06d}.json"


def shards_of(folder: Path, unit: int) -> list[dict[str, Any]] | None:
    """What is known of a unit's shards; None unless all of them are there."""
    path = unit_path(folder, unit)
    if not path.is_file():
        return None
    found = [finished(folder, name) for name in json.loads(path.read_text())]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(found) else None


def write_index_files(folder: Path, index: LatentIndex, classes: dict[str, int]) -> None:
    """The index and the classes of a folder whose shards are all there; several processes may write them, the same."""
    write_text(folder / CLASSES, json.dumps(classes, indent=1))
    write_text(folder / INDEX, index.text())
    clear_partials(folder, "latents-*")  # not of the index, which another process may be writing, too
    clear_partials(folder / PARTS)


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, in JSON."""
    write_text(path, json.dumps(content))


def write_text(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    for last in (False, False, True):
        try:
            with whole_file(path, sync=True) as partial:
                partial.write_text(text, encoding="utf-8")
            return
        except FileNotFoundError:  # a run beside this one took it for left over, and has cleared it: once more
            if last:
                raise
