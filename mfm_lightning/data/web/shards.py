"""Shards to samples, by WebDataset's pipelines: which shards, in which order, and what is done with damaged ones."""

from __future__ import annotations

import itertools
import logging
import os
import tarfile as tars
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from torch.utils.data import get_worker_info

from mfm_lightning.data.images.pixels import OtherForm
from mfm_lightning.data.latents.urls import check_url, from_webdataset, local_path
from mfm_lightning.data.skipped import Corrupt, Skipped
from mfm_lightning.utils.distributed import is_first_rank
from mfm_lightning.utils.image_files import check_tar
from mfm_lightning.utils.tar import tar_files

log = logging.getLogger(__name__)
CUT = "__cut__"  # ending of a file that stands for all that a sample lacks because its shard is cut off within it


class ShardError(ValueError):
    """A shard that cannot be read to its end.

    Args:
        url: of the shard.
        why: what is wrong.
    """

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"shard {url} {why}")
        self.url = url


class CutSampleError(ValueError):
    """A sample that lacks files because its shard is cut off within it; the shard is counted."""


class Faults:
    """The `handler` of all stages: raises what is wrong, or counts it. An image that is whole, and of another size or
    colour than the others, is no damage: it is raised.

    Args:
        corrupt: "raise" or "skip".
        skipped: counts.
    """

    def __init__(self, corrupt: Corrupt, skipped: Skipped) -> None:
        self.corrupt: Corrupt = corrupt
        self.skipped = skipped

    def __call__(self, error: Exception) -> bool:
        """True where webdataset goes on with the next sample or shard."""
        if self.corrupt == "raise" or not isinstance(error, ValueError) or isinstance(error, OtherForm):
            raise _one_line(error)
        if not isinstance(error, CutSampleError):
            message = str(_one_line(error))  # of a sample the same each time; of a shard, as a connection may be
            self.skipped.add(error.url if isinstance(error, ShardError) else message, message)
        return True


@dataclass(frozen=True)
class Rank:
    """Which of how many processes that train."""

    number: int = 0
    count: int = 1


class ShardOrder:
    """A stage in place of webdataset's `split_by_node` and `shardshuffle`: all ranks shuffle all shards alike, and each
    takes every W-th, so that a rank's shards are others in each epoch; with `resampled` each draws its own, with
    replacement. The workers of a rank share its shards, as by `split_by_worker`. Each pass deals them out anew. With
    `all_shards` the next pass has all of them, in this worker.

    Args:
        rank: of this process.
        resampled: draw shards with replacement, as many a pass as there are.
        seed: numbers that the order depends on.
    """

    def __init__(self, rank: Rank, resampled: bool, *seed: int) -> None:
        self.rank, self.resampled, self.seed, self._passes = rank, resampled, seed, itertools.count()
        self.all_shards = False

    def __call__(self, shards: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
        found, key = list(shards), (*self.seed, next(self._passes))
        if self.resampled and not self.all_shards:
            worker = get_worker_info()
            random = Random(repr((*key, self.rank.number, 0 if worker is None else worker.id)))
            yield from (dict(random.choice(found)) for _ in range(len(found)))
            return
        Random(repr(key)).shuffle(found)
        yield from found if self.all_shards else of_worker(iter(found[self.rank.number :: self.rank.count]))


def of_worker(shards: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    """webdataset's `split_by_worker`, which would also ask torch.distributed for ranks."""
    worker = get_worker_info()
    return shards if worker is None else itertools.islice(shards, worker.id, None, worker.num_workers)


def share(samples: Iterator[Any], rank: Rank) -> Iterator[Any]:
    """Of each W samples one for each rank; the last ones, where they are fewer, come more than once."""
    while group := list(itertools.islice(samples, rank.count)):
        yield group[rank.number % len(group)]


def pipeline(urls: Sequence[str], faults: Faults, *stages: Callable[[Iterator[Any]], Iterator[Any]]) -> Any:
    """webdataset's `DataPipeline` of the samples of shards, one pass.

    Args:
        faults: what is done where something is wrong.
        stages: the first one picks shards; the others take samples.
    """
    from_webdataset()
    from webdataset.pipeline import DataPipeline
    from webdataset.shardlists import SimpleShardList
    from webdataset.tariterators import group_by_keys, url_opener

    first, *others = stages
    return DataPipeline(
        SimpleShardList(list(urls)),
        first,
        partial(url_opener, handler=partial(_not_opened, faults)),
        partial(_files, faults=faults),
        partial(group_by_keys, handler=faults),
        *others,
    )


def _files(shards: Iterator[dict[str, Any]], faults: Faults) -> Iterator[dict[str, Any]]:
    """In place of webdataset's `tar_file_expander`, which takes a damaged header for the end of a shard."""
    from webdataset.tariterators import base_plus_ext

    for shard in shards:
        url, files, name = shard["url"], 0, ""
        sample, there = None, set()  # its key, and the names of its files
        try:
            with closing(shard["stream"]) as stream:
                for file in tar_files(stream, url):
                    files, name = files + 1, file["fname"]
                    if (key := base_plus_ext(name)[0]) != sample:
                        sample, there = key, set()
                    if name in there:
                        faults(ValueError(f"{url}: {name} is there twice in a row, where each sample has its own key"))
                        continue
                    there.add(name)
                    yield file
        except (tars.TarError, OSError, EOFError, zlib.error) as error:
            faults(ShardError(url, f"cannot be read after {files} files: {error}"))
            prefix, _ = base_plus_ext(name)
            if prefix is not None:
                yield {"fname": f"{prefix}.{CUT}", "data": b"", "__url__": url}
        yield {}  # the end of a shard: samples of two are not joined


def _not_opened(faults: Faults, error: Exception) -> bool:
    *_, url = error.args  # which webdataset adds
    return faults(ShardError(url, f"cannot be opened: {getattr(error, 'strerror', None) or error}"))


def _one_line(error: Exception) -> Exception:
    """Without what webdataset adds to a ValueError's arguments."""
    if isinstance(error, ValueError) and len(error.args) > 1:
        error.args = (str(error.args[0]),)
    return error


def expand_urls(given: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """The URLs of shards as webdataset expands them.

    Raises:
        ValueError: for none, or one that may not or cannot be opened.
        FileNotFoundError: for a local shard that is not there.
    """
    from_webdataset()
    from webdataset.shardlists import expand_urls as expanded

    try:
        urls = [url for text in ([given] if isinstance(given, str) else given) for url in expanded(text)]
    except (AssertionError, ValueError) as error:  # an environment variable that is not there; unbalanced braces
        raise ValueError(f"{given}: {error}") from error
    if not any(urls):
        raise ValueError(f"urls {given!r} name no shard")
    for url in urls:
        check_url(url, allow_pipe)
        check_tar(url)
        if (path := local_path(url)) is not None and not path.is_file():
            raise FileNotFoundError(f"no shard {path}: expected a tar" + " (a folder is none)" * path.is_dir())
    return urls


def say_shared(urls: Sequence[str], val_urls: Sequence[str]) -> None:
    """Warn of shards that are given twice, or for training and for validation."""
    train, val = (
        [url if (path := local_path(url)) is None else os.path.realpath(path) for url in g] for g in (urls, val_urls)
    )
    for what, found in (
        ("urls have %d shards more than once", [url for url, number in Counter(train).items() if number > 1]),
        ("val_urls have %d shards more than once", [url for url, number in Counter(val).items() if number > 1]),
        ("val_urls have %d shards of urls: validation is on what is trained on", sorted({*train} & {*val})),
    ):
        if found and is_first_rank():
            log.warning(f"{what}: %s", len(found), named(found))


def named(urls: Sequence[str]) -> str:
    """The first ones, for a message."""
    return ", ".join(urls[:3]) + ", ..." * (len(urls) > 3)
