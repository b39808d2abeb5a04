"""Reads a folder of latent shards in full and compares it with its index, by webdataset's own reading of tars."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load

from mfm_lightning.data.latents.index import (
    CLASSES,
    LatentIndex,
    LatentIndexError,
    Layout,
    Shard,
    read_classes,
    read_null,
)
from mfm_lightning.data.latents.shard_reader import check_samples
from mfm_lightning.data.latents.text_form import TextForm
from mfm_lightning.data.latents.urls import from_webdataset, join, local_path, open_url
from mfm_lightning.utils.console import progress_bar

log = logging.getLogger(__name__)
_SHOWN = 10


def verify(folder: str, allow_pipe: bool = False) -> LatentIndex:
    """The folder's index, when all is as it says: files, sizes, sha256, counts, labels, shapes, finite moments, keys.

    Raises:
        FileNotFoundError: without an index.
        LatentIndexError: with what is wrong, the first few of all.
    """
    index = LatentIndex.load(folder, allow_pipe)
    problems: list[str] = []
    keys: dict[str, str] = {}
    with progress_bar() as progress:
        for shard in progress.track(index.shards, description="verifying"):
            problems += [f"{shard.name}: {p}" for p in _problems(folder, shard, index.layout, keys, allow_pipe)]
    listed = {shard.name for shard in index.shards}
    if (path := local_path(folder)) is not None:
        problems += [f"{p.name} is not in the index" for p in sorted(Path(path).glob("*.tar")) if p.name not in listed]
    classes = read_classes(folder, allow_pipe)
    if classes is not None and sorted(classes.values()) != list(range(index.num_classes)):
        problems.append(f"{CLASSES} has {len(classes)} classes, the index {index.num_classes}")
    if index.captions is not None:
        try:
            index.captions.file(read_null(folder, allow_pipe))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise LatentIndexError(f"{folder}: {len(problems)} problems: {'; '.join(problems[:_SHOWN])}{more}")
    log.info("%s: %d samples in %d shards, all as the index says", folder, index.samples, len(index.shards))
    return index


def _problems(folder: str, shard: Shard, layout: Layout, keys: dict[str, str], allow_pipe: bool) -> list[str]:
    try:
        with open_url(join(folder, shard.name), allow_pipe) as stream:
            data = stream.read()
    except OSError as error:
        return [f"cannot be read ({error})"]
    found = []
    if len(data) != shard.bytes:
        found.append(f"{len(data):,} bytes instead of {shard.bytes:,}")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        found.append("its sha256 is another one")
    try:
        samples = _samples(data)
    except Exception as error:  # whatever a damaged tar makes tarfile say
        return [*found, f"is no whole tar ({error})"]
    if len(samples) != shard.samples:
        found.append(f"{len(samples)} samples instead of {shard.samples}")
    for i, sample in enumerate(samples[: shard.samples]):
        key = sample["__key__"]
        if key in keys:
            found.append(f"key {key!r} is in {keys[key]}, too")
        keys[key] = shard.name
        found += [f"sample {i} ({key}): {why}" for why in _wrong(sample, int(shard.labels[i]), layout)]
    whole = len(data) // layout.stride
    rows = np.frombuffer(data, np.uint8)[: min(whole, shard.samples) * layout.stride].reshape(-1, layout.stride)
    found += [f"sample {i}: {why}" for i, why in check_samples(rows, shard.labels[: len(rows)], layout).items()]
    return found


def _samples(data: bytes) -> list[dict]:
    from_webdataset()
    from webdataset.tariterators import group_by_keys, tar_file_expander

    return list(group_by_keys(tar_file_expander([{"url": "shard", "stream": io.BytesIO(data)}])))


def _wrong(sample: dict, label: int, layout: Layout) -> list[str]:
    try:
        moments = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
        if int(sample["cls"]) != label:
            return [f"label {int(sample['cls'])} instead of {label}"]
    except Exception as error:  # a file that is not there, or whatever a damaged one makes numpy say
        return [f"cannot be read ({type(error).__name__}: {error})"]
    if moments.shape != layout.moments_shape or moments.dtype != np.float16:
        return [f"{moments.dtype} {moments.shape} instead of float16 {layout.moments_shape}"]
    if not np.isfinite(moments).all():
        return ["moments that are not finite"]
    if (moments[:, 1] < 0).any():
        return ["a standard deviation below 0"]
    return [] if layout.text is None else _wrong_text(sample, layout.text)


def _wrong_text(sample: dict, form: TextForm) -> list[str]:
    try:
        found = load(sample["safetensors"])
        sample["txt"].decode()
    except Exception as error:
        return [f"its caption cannot be read ({type(error).__name__}: {error})"]
    if {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} != form.shapes:
        return ["an embedding of another form than the index's"]
    finite = all(torch.isfinite(value.float()).all() for value in found.values())
    return [] if finite else ["an embedding that is not finite"]
