"""Throughput of LatentShards against a raw read of the same files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from mfm_benchmarks import bootstrap
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Table
from mfm_benchmarks.bootstrap import Measured
from mfm_benchmarks.parts.shard_readers import READERS, batches_per_second, random_shards
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite
from mfm_lightning.data import LatentShards
from mfm_lightning.data.latent_index import Layout

RAW, GOAL = "raw read", 0.5


class DataThroughputSuite(Suite):
    """Samples a second of LatentShards by number of workers, and of plainer ways to read the same tar files.

    Args:
        samples: random moments that are written; they stay in the files' cache, so that no disk is measured.
        shard_size: samples of a shard.
        state_shape: of a latent.
        batch_size: of the batches.
        workers: numbers of worker processes.
        passes: times that each reads all files, in a round.
        rounds: how often each is timed; all take turns.
    """

    name = "data-throughput"
    title = "Reading sharded latents"
    about = (
        "Samples a second of LatentShards (shuffled, flipped, drawn from the moments, in batches) by number of "
        "workers, against a raw sequential read of the same tar files in the same run."
    )

    def __init__(
        self,
        samples: int = 6000,
        shard_size: int = 1000,
        state_shape: list[int] = (4, 32, 32),
        batch_size: int = 256,
        workers: list[int] = (0, 1, 2),
        passes: int = 8,
        rounds: int = 7,
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
        self.samples, self.passes, self.rounds = 2000, 3, 3

    def prepare(self) -> None:
        self._folder = self.output / f"shards_{self.samples}_{self.shard_size}_{'x'.join(map(str, self.state_shape))}"
        self._paths = random_shards(self._folder, self.samples, self.shard_size, self.state_shape)

    def cells(self) -> Sequence[Cell]:
        identity = {
            "samples": self.samples, "shard_size": self.shard_size, "state_shape": self.state_shape,
            "batch_size": self.batch_size, "workers": self.workers, "passes": self.passes, "rounds": self.rounds,
            "torch": torch.__version__,
        }  # fmt: skip
        self._cell = Cell("reading", identity, self._compute)
        return [self._cell]

    def _compute(self) -> Outcome:
        data = LatentShards(str(self._folder), self.batch_size, val_shards=0)
        found: dict[str, list[float]] = {}
        for round_ in range(-1, self.rounds):  # the first round, untimed, brings the files into the cache
            for name, read in READERS.items():
                begin = time.monotonic()
                for _ in range(self.passes if name == RAW else 1):
                    read(self._paths)
                passes = self.passes if name == RAW else 1
                if round_ >= 0:
                    found.setdefault(name, []).append(passes * self.samples / (time.monotonic() - begin))
            for workers in self.workers:
                speed = self.batch_size * batches_per_second(data, workers, self.passes)
                if round_ >= 0:
                    found.setdefault(_ours(workers), []).append(speed)
        return Outcome({"samples_per_second": found})

    def report(self, results: Results) -> Sequence[Block]:
        if self._cell not in results:
            return []
        found = results[self._cell].numbers["samples_per_second"]
        shares = {name: bootstrap.of_runs(_ratios(found, name)) for name in found}
        lines = [_claim(name, share) for name, share in shares.items() if name != RAW]
        best = max((_ours(w) for w in self.workers), key=lambda name: shares[name].value)
        return [
            Headline([(f"{shares[best].value:.0%}", f"of a raw read's speed: {best}")]),
            Claims("Against a raw sequential read", lines),
            Picture("throughput", "Samples a second", _picture(found), CAPTION),
            Table("throughput", "Samples a second", self._rows(found, shares), CAPTION),
        ]

    def _rows(self, found: dict[str, list[float]], shares: dict[str, Measured]) -> list[dict[str, Any]]:
        stride = Layout(tuple(self.state_shape)).stride
        rows = []
        for name, speeds in found.items():
            speed = bootstrap.of_runs(speeds)
            megabytes = Measured(speed.value * stride / 1e6, speed.replicates * stride / 1e6)
            rows.append({"reader": name, "samples/s": speed, "MB/s of tar": megabytes, "of a raw read": shares[name]})
        return rows


CAPTION = (
    "'raw read': the bytes of the tar files, one after the other, in pieces of 1 MiB by Python's unbuffered readinto, "
    "in one process; 'tarfile': their members by Python's tarfile; 'webdataset, decoded': webdataset with its "
    "decoding of arrays, in one process. 'LatentShards': batches of drawn latents as they reach the training process, "
    "which does nothing with them; 0 workers: read by that process itself. The files are in the operating system's "
    "cache, so that the work is measured and no disk. Means over rounds in which all take turns, with Student's 95 % "
    "interval; shares are means of the rounds' ratios. MB of tar: what was read of the files for those samples."
)


def _ours(workers: int) -> str:
    return f"LatentShards, {workers} worker{'' if workers == 1 else 's'}"


def _ratios(found: dict[str, list[float]], name: str) -> list[float]:
    return [a / b for a, b in zip(found[name], found[RAW], strict=True)]


def _claim(name: str, share: Measured) -> str:
    goal = "at least" if share.low >= GOAL else "less than" if share.high < GOAL else "not told apart from"
    return f"{name}: {share.text(2)} of a raw read's samples in a second, {goal} {GOAL:.0%}."


def _picture(found: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(8.0, 0.5 * len(found) + 1.0), layout="constrained")
    axes = figure.subplots()
    speeds = [bootstrap.of_runs(values) for values in found.values()]
    values = [s.value for s in speeds]
    spread = [[s.value - s.low for s in speeds], [s.high - s.value for s in speeds]]
    colours = ["tab:blue" if name.startswith("LatentShards") else "tab:grey" for name in found]
    axes.barh(range(len(found)), values, xerr=spread, color=colours, height=0.7, capsize=2)
    axes.set_yticks(range(len(found)), found, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(GOAL * values[list(found).index(RAW)], color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("samples in a second (dashed: half of a raw read)")
    return figure
