"""Writes shards so that a kill at any moment leaves each either whole or not there."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mfm_lightning.data.latents.index import Layout, Shard
from mfm_lightning.data.latents.urls import from_webdataset
from mfm_lightning.utils.atomic import whole_file

PARTS = "parts"  # folder of what is known of each finished shard, until all are in the index


def write_shard(folder: Path, name: str, samples: Iterable[tuple[str, int, np.ndarray]], broken: list[str]) -> None:
    """Write a shard and what is known of it; the shard's own name appears last, and at once.

    Args:
        samples: key, label and moments `(2, 2, C, H, W)` float16 of each; an error in it leaves no shard.
        broken: keys that were left out, as they are known when the samples are at their end.

    Raises:
        ValueError: for a sample that is not laid out as the first one's shape says.
    """
    samples, labels = iter(samples), []
    first = next(samples, None)
    if first is None:
        _note(folder, Shard(name, 0, "", np.empty(0, dtype=np.int64)), broken)
        return
    stride = Layout(first[2].shape[2:]).stride
    with whole_file(folder / name, sync=True) as partial:
        with open(partial, "wb") as file, _tar_writer(file) as tar:
            for key, label, moments in chain([first], samples):
                tar.write({"__key__": key, "cls": label, "npy": np.ascontiguousarray(moments, dtype="<f2")})
                labels.append(label)
                if (end := tar.tarstream.offset) != len(labels) * stride:
                    raise ValueError(f"{name}: sample {key!r} ends at byte {end}, not at {len(labels)} * {stride}")
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _note(folder, Shard(name, partial.stat().st_size, digest, np.array(labels, dtype=np.int64)), broken)


def _tar_writer(file: BinaryIO) -> Any:
    """webdataset's, of one header for each name, whatever is in it; with a fixed time, for the same bytes each time."""
    from_webdataset()
    from webdataset.writer import TarWriter

    tar = TarWriter(file, mtime=0)
    tar.tarstream.format, tar.tarstream.encoding = tarfile.USTAR_FORMAT, "utf-8"  # webdataset 1.0.2 takes no format
    return tar


def _note(folder: Path, shard: Shard, broken: list[str]) -> None:
    write_json(folder / PARTS / f"{shard.name}.json", {**shard.as_dict(), "broken": list(broken)})


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a shard that is whole; None if it must be written."""
    try:
        found = json.loads((folder / PARTS / f"{name}.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    path = folder / name
    whole = not found["samples"] or (path.is_file() and path.stat().st_size == found["bytes"])
    return found if whole else None


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
