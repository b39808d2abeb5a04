"""Ways of reading the same tar files of latents, from bytes to training batches."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from mfm_lightning.data import LatentShards
from mfm_lightning.data.latent_index import INDEX, LatentIndex, Shard
from mfm_lightning.data.latent_stream import PREFETCH
from mfm_lightning.data.shard_writer import PARTS, finished, write_shard, write_text

_CHUNK = 1 << 20


def random_shards(folder: Path, samples: int, shard_size: int, state_shape: Sequence[int], seed: int = 0) -> list[Path]:
    """Shards of random moments, those that are there kept; their paths."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shards = []
    for k, first in enumerate(range(0, samples, shard_size)):
        name, count = f"latents-{k:06d}.tar", min(shard_size, samples - first)
        if finished(folder, name) is None:
            moments = random.standard_normal((count, 2, 2, *state_shape), dtype=np.float32).astype(np.float16)
            moments[:, :, 1] = np.abs(moments[:, :, 1])
            write_shard(folder, name, [(f"{first + i:08d}", i % 1000, m) for i, m in enumerate(moments)], [])
        shards.append(Shard.from_dict(finished(folder, name)))
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
                tar.extractfile(member).read()


def read_webdataset(paths: Sequence[Path]) -> None:
    """All samples, by webdataset with its decoding of arrays and labels; nothing is drawn, no batches are made."""
    import webdataset

    for _ in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False).decode():
        pass


def batches_per_second(data: LatentShards, workers: int, passes: int) -> float:
    """Batches a second of an epoch after the other, when the workers are at work and have no batches in store."""
    plan = data.loader(num_workers=workers).stream.plan
    before = 1 if not workers else 2 * workers * PREFETCH
    batches = iter(data.loader(length=before + passes * plan.batches, num_workers=workers))
    for _ in range(before):
        next(batches)
    begin = time.monotonic()
    for _ in batches:
        pass
    return passes * plan.batches / (time.monotonic() - begin)


READERS: dict[str, Callable[[Sequence[Path]], None]] = {
    "raw read": read_bytes,
    "tarfile": read_tar,
    "webdataset, decoded": read_webdataset,
}
