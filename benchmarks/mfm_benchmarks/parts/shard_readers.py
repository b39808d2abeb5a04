"""Ways of reading the same tar files of latents, from bytes to training batches."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.index import INDEX, LatentIndex, Shard
from mfm_lightning.data.latents.shard_writer import PARTS, finished, write_shard, write_text
from mfm_lightning.data.latents.stream import PREFETCH

_CHUNK = 1 << 20


def random_shards(folder: Path, samples: int, shard_size: int, state_shape: Sequence[int], seed: int = 0) -> list[Path]:
    """Shards of random moments, those that are there kept; their paths."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    moments = np.random.default_rng(seed).standard_normal((shard_size, 2, 2, *state_shape), dtype=np.float32)
    moments[:, :, 1] = np.abs(moments[:, :, 1])
    moments = moments.astype(np.float16)  # the same in all shards: nobody looks at them
    shards = []
    for k, first in enumerate(range(0, samples, shard_size)):
        name, count = f"latents-{k:06d}.tar", min(shard_size, samples - first)
        if finished(folder, name) is None:
            content = ((f"{first + i:08d}", i % 1000, moments[i]) for i in range(count))
            write_shard(folder, name, content, [])
        if (found := finished(folder, name)) is None:
            raise OSError(f"{folder / name}: the shard was not written whole")
        shards.append(Shard.from_dict(found))
    write_text(folder / INDEX, LatentIndex(tuple(state_shape), 1000, 0.18215, shards).text())
    return [folder / shard.name for shard in shards]


def read_bytes(paths: Sequence[Path]) -> None:
    """The files from beginning to end, in pieces of 1 MiB into the same memory."""
    buffer = bytearray(_CHUNK)
    for path in paths:
        with FileIO(path) as file:
            while file.readinto(buffer):
                pass


def read_tar(paths: Sequence[Path]) -> None:
    """All members, by Python's tarfile."""
    for path in paths:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if (file := tar.extractfile(member)) is not None:
                    file.read()


def read_webdataset(paths: Sequence[Path]) -> None:
    """All samples, by webdataset with its decoding of arrays and labels; nothing is drawn, no batches are made."""
    from webdataset.compat import WebDataset

    samples = WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False).decode()
    for _ in samples:  # pyright: ignore[reportGeneralTypeIssues]  (webdataset declares a mixin, and returns a pipeline)
        pass


def read_epoch(data: LatentShards, workers: int) -> None:
    """All batches of an epoch, with the start of the workers."""
    for _ in data.loader(num_workers=workers):
        pass


def steady_seconds(data: LatentShards, workers: int, passes: int) -> float:
    """Of so many epochs, one after the other, when the workers are at work and have no batches in store."""
    epoch = data.loader(num_workers=workers).stream.plan.batches
    before = 2 + 2 * workers * PREFETCH
    batches = iter(data.loader(length=before + passes * epoch, num_workers=workers))
    for _ in range(before):
        next(batches)
    begin = time.monotonic()
    for _ in batches:
        pass
    return time.monotonic() - begin


def can_drop() -> bool:
    """Whether files can be dropped from the operating system's cache."""
    return hasattr(os, "posix_fadvise")


def drop_from_cache(paths: Sequence[Path]) -> None:
    """The next to read these files reads them from disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


READERS: dict[str, Callable[[Sequence[Path]], None]] = {
    "raw read": read_bytes,
    "tarfile": read_tar,
    "webdataset, decoded": read_webdataset,
}
