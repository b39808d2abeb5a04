"""Throughput of LatentShards against a raw read of the same files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import BarChart
from mfm_benchmarks.parts.shard_readers import (
    READERS,
    can_drop,
    drop_from_cache,
    random_shards,
    read_epoch,
    steady_seconds,
)
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite
from mfm_benchmarks.timing import TIMED
from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.index import LatentIndex, Layout
from mfm_lightning.metrics.measured import Measured, of_runs, ratio_of_runs

RAW, GOAL = "raw read", 0.5
DISK, CACHED = "from disk", "from the cache"


class DataThroughputSuite(Suite):
    """Samples a second of LatentShards by number of workers, and of plainer ways to read the same tar files.

    Args:
        samples: random moments that are written.
        shard_size: samples of a shard.
        state_shape: of a latent.
        batch_size: of the batches.
        workers: numbers of worker processes.
        passes: times that all files are read from the cache, in a round.
        rounds: how often each is timed; all take turns.
    """

    name = "data-throughput"
    title = "Reading sharded latents"
    about = (
        "Samples per second of LatentShards (shuffled, flipped, drawn from the moments, in batches), by number of "
        "workers, against a raw sequential read of the same tar files in the same run."
    )
    intervals = TIMED

    def __init__(
        self,
        samples: int = 48_000,
        shard_size: int = 1000,
        state_shape: Sequence[int] = (4, 32, 32),
        batch_size: int = 256,
        workers: Sequence[int] = (0, 1, 2),
        passes: int = 2,
        rounds: int = 5,
    ) -> None:
        if rounds < 2:
            raise ValueError(f"rounds {rounds}: an interval needs at least 2")
        if not batch_size <= samples or min(shard_size, batch_size, passes) < 1 or min(workers) < 0:
            raise ValueError(
                f"samples {samples} must be at least a batch ({batch_size}), shard_size {shard_size} and passes "
                f"{passes} at least 1, workers {workers} not negative"
            )
        self.samples, self.shard_size, self.state_shape = samples, shard_size, list(state_shape)
        self.batch_size, self.workers, self.passes, self.rounds = batch_size, list(workers), passes, rounds

    def shrink(self) -> None:
        self.samples, self.passes, self.rounds = 6000, 1, 3

    def prepare(self) -> None:
        self._folder = self.output / f"shards_{self.samples}_{self.shard_size}_{'x'.join(map(str, self.state_shape))}"
        self._paths = random_shards(self._folder, self.samples, self.shard_size, self.state_shape)
        self._counts = {shard.name: shard.samples for shard in LatentIndex.load(self._folder).shards}

    def cells(self) -> Sequence[Cell]:
        identity = {
            "samples": self.samples, "shard_size": self.shard_size, "state_shape": self.state_shape,
            "batch_size": self.batch_size, "workers": self.workers, "passes": self.passes, "rounds": self.rounds,
            "torch": torch.__version__,
        }  # fmt: skip
        self._cells = {
            **({DISK: Cell(DISK, {**identity, "from": "disk"}, self._from_disk, alone=True)} if can_drop() else {}),
            CACHED: Cell(CACHED, identity, self._cached, alone=True),
        }
        return list(self._cells.values())

    @property
    def skipped(self) -> dict[str, str]:
        return {} if can_drop() else {DISK: "the operating system does not let files be dropped from its cache here"}

    def _cached(self) -> Outcome:
        data = LatentShards(str(self._folder), self.batch_size, val_shards=0)
        found: dict[str, list[float]] = {}
        for round_ in range(-1, self.rounds):  # the first round, untimed, brings the files into the cache
            speeds = {}
            for name, read in READERS.items():
                paths = self._paths * self.passes if name == RAW else self._paths[: -(-len(self._paths) // 4)]
                speeds[name] = sum(self._counts[path.name] for path in paths) / _seconds(read, paths)
            for workers in self.workers:
                drawn = self.passes * (self.samples // self.batch_size) * self.batch_size
                speeds[_ours(workers)] = drawn / steady_seconds(data, workers, self.passes)
            _note(found, speeds, round_)
        return Outcome({"samples_per_second": found})

    def _from_disk(self) -> Outcome:
        data = LatentShards(str(self._folder), self.batch_size, val_shards=0)
        drawn = self.samples // self.batch_size * self.batch_size
        found: dict[str, list[float]] = {}
        for round_ in range(-1, self.rounds):
            drop_from_cache(self._paths)
            speeds = {RAW: self.samples / _seconds(READERS[RAW], self._paths)}
            for workers in self.workers:
                drop_from_cache(self._paths)
                speeds[_ours(workers)] = drawn / _seconds(read_epoch, data, workers)
            _note(found, speeds, round_)
        return Outcome({"samples_per_second": found})

    def report(self, results: Results) -> Sequence[Block]:
        found = {
            where: results[cell].numbers["samples_per_second"] for where, cell in self._cells.items() if cell in results
        }
        if not found:
            return []
        shares = {w: {name: ratio_of_runs(f[name], f[RAW]) for name in f} for w, f in found.items()}
        headline, lines, said = [], [], []
        for where, share in shares.items():
            best = max((_ours(w) for w in self.workers), key=lambda name, share=share: share[name].value)
            headline.append((f"{share[best].value:.0%}", f"of the speed of a raw read, {where}: {best}"))
            said.append(f"{share[best].value:.0%} {where} ({best})")
            lines += [_claim(f"{where}: {name}", s) for name, s in share.items() if name != RAW]
        if CACHED in found:
            lines += [
                _against(found[CACHED], _ours(w), other) for w in self.workers for other in READERS if other != RAW
            ]
        sentences = [
            f"The data loader reaches these shares of the speed of a raw sequential read: {'; '.join(said)}.",
            f"The goal is at least {GOAL:.0%}.",
            f"All readers take turns on the same files, {self.rounds} rounds.",
        ]
        return [
            Summary(sentences),
            Headline(headline),
            Picture("throughput", "Samples per second", _picture(found), CAPTION),
            Claims("Differences to a raw sequential read", lines),
            Table("throughput", "All readers", self._rows(found, shares), keys=["files", "reader"]),
        ]

    def _rows(self, found: dict[str, Any], shares: dict[str, dict[str, Measured]]) -> list[dict[str, Any]]:
        stride = Layout(tuple(self.state_shape)).stride
        rows = []
        for where, speeds in found.items():
            for name, values in speeds.items():
                speed, share = of_runs(values), shares[where][name]
                rows.append(
                    {
                        "files": where,
                        "reader": name,
                        "samples/s": speed,
                        "MB/s of tar": speed * (stride / 1e6),
                        "share of a raw read": share,
                    }
                )
        return rows


CAPTION = (
    "'raw read': the bytes of the tar files, one after the other, in pieces of 1 MiB by Python's unbuffered readinto, "
    "in one process; 'tarfile': their members by Python's tarfile; 'webdataset, decoded': webdataset with its "
    "decoding of arrays, in one process. 'LatentShards': batches of drawn latents as they reach the training process, "
    "which does nothing with them; 0 workers: read by that process itself. 'from disk': the files are dropped from "
    "the operating system's cache before each reading, and the start of the workers is counted. 'from the cache': the "
    "files are in memory, so that a raw read is only a copy, and workers are timed after their start. Means over "
    "rounds in which all take turns, with Student's 95 % interval; shares are geometric means of the rounds' ratios. "
    "MB of tar: bytes of the files that were read for those samples. The dashed line is half of the raw read."
)


def _seconds(read: Callable[..., None], *arguments: Any) -> float:
    begin = time.monotonic()
    read(*arguments)
    return time.monotonic() - begin


def _note(found: dict[str, list[float]], speeds: dict[str, float], round_: int) -> None:
    if round_ >= 0:
        for name, speed in speeds.items():
            found.setdefault(name, []).append(speed)


def _against(found: dict[str, list[float]], name: str, other: str) -> str:
    times = ratio_of_runs(found[name], found[other])
    return f"From the cache: {name} gives {times.text(2)} times as many samples per second as {other}."


def _ours(workers: int) -> str:
    return f"LatentShards, {workers} worker{'' if workers == 1 else 's'}"


def _claim(name: str, share: Measured) -> str:
    goal = "at least" if share.low >= GOAL else "less than" if share.high < GOAL else "not significantly different from"
    return f"{name}: {share.text(2)} of the samples per second of a raw read, {goal} {GOAL:.0%}."


def _picture(found: dict[str, dict[str, list[float]]]) -> BarChart:
    speeds = {where: {name: of_runs(v) for name, v in readers.items()} for where, readers in found.items()}
    half = {where: GOAL * readers[RAW].value for where, readers in speeds.items()}

    ours = [name for readers in found.values() for name in readers if name.startswith("LatentShards")]
    return plots.bars(speeds, half, "samples per second", ours)
