"""Reward against cost: steering, search and what they must beat, on one model, for any rewards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.measure import SHOWN, measure, noise
from mfm_benchmarks.methods import MethodSettings, Point, job, points
from mfm_benchmarks.models import ModelSettings, Subject
from mfm_benchmarks.parts.best_of_n import BestOfNPool
from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.reward_report import BEST, RewardReport
from mfm_benchmarks.quality import ClassifierQuality, Quality
from mfm_benchmarks.spec import Spec, plain
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, no_result
from mfm_lightning.alignment import BestOfN
from mfm_lightning.alignment.target import Target
from mfm_lightning.metrics.distances import frequency_distance, pairwise_distance
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import mean_of, resampled
from mfm_rewards import Reward, RewardError, build


@dataclass
class RewardSettings:
    """A reward of the comparison.

    Args:
        reward: a registered name, `{name: ..., options}` or `{class_path: ..., init_args: ...}`.
        scale: its multiplier at lambda = 1.
        shares: for a mixture of classes, how frequent each should be, in any unit; the report then has the distance to
            them, in which it shows whether a method finds all modes.
    """

    reward: Spec | str
    scale: float = 1.0
    shares: list[float] | None = None

    @property
    def plain(self) -> dict[str, Any] | str:
        """What `mfm_rewards.build` takes."""
        return plain(self.reward)


class AlignmentSuite(Suite):
    """Rewards of single aligned samples against evaluations, with the Fréchet distance beside them.

    Args:
        model: what all methods run on.
        rewards: by the names of the report.
        methods: by the names of the report.
        best_of_n: the baseline that the headline is about.
        scales: lambda, factors of the rewards' own multipliers.
        num_samples: samples of a run and seed, one for each noise.
        seeds: of the noise; all methods take the same.
        quality: features for the Fréchet distance; without, there is none.
        frechet_limit: the headline takes settings whose Fréchet distance is at most so many times Best-of-N's.
        batch_size: samples of a method at once.
        block: samples of a method's run in a cell: what a process that dies may lose; all of them where None.
        quick_samples: num_samples of --quick, which compares with a smaller pool and has few settings.
    """

    name = "alignment"
    title = "Reward against cost"
    about = (
        "The mean reward that each alignment method reaches at inference time, against its cost: evaluations of "
        "networks and rewards (NFE), and distance to the data."
    )

    def __init__(
        self,
        model: ModelSettings,
        rewards: dict[str, RewardSettings],
        methods: dict[str, MethodSettings],
        best_of_n: BestOfNPool | None = None,
        scales: Sequence[float] = (1.0, 2.5, 5.0),
        num_samples: int = 128,
        seeds: Sequence[int] = (0,),
        quality: Quality | None = None,
        frechet_limit: float = 1.5,
        batch_size: int | None = None,
        quick_samples: int = 128,
        block: int | None = None,
    ) -> None:
        self.model, self.rewards, self.methods = model, dict(rewards), dict(methods)
        self.best_of_n, self.scales = best_of_n or BestOfNPool(), list(scales)
        self.num_samples, self.seeds, self.quality = num_samples, list(seeds), quality
        self.frechet_limit, self.batch_size, self.quick_samples = frechet_limit, batch_size, quick_samples
        self.block = block
        self._skipped: dict[str, str] = {}
        if block is not None and block < 1:
            raise ValueError(f"block {block} must be at least 1")
        if not self.rewards or not self.scales or not self.seeds or min(num_samples, quick_samples) < 2:
            raise ValueError("a comparison needs at least one reward, one scale, one seed and two samples")
        if any(reward.scale <= 0 for reward in self.rewards.values()) or any(scale <= 0 for scale in self.scales):
            raise ValueError("scales must be above 0; the registered reward `negate` turns a reward round")
        if any(reward.shares for reward in self.rewards.values()) and not isinstance(quality, ClassifierQuality):
            raise ValueError("rewards with shares: give a ClassifierQuality as quality, which tells classes")
        if BEST in self.methods:
            raise ValueError(f"a method cannot be called {BEST}: that is the baseline's name")
        for name, method in self.methods.items():
            if unknown := set(method.rewards or ()) - set(self.rewards):
                raise ValueError(
                    f"method {name!r}: {', '.join(unknown)} is none of the rewards {', '.join(self.rewards)}"
                )
        self._points = [point for name, method in self.methods.items() for point in points(name, method)]

    # what is run

    @property
    def noise(self) -> str:
        return f"{self.num_samples} samples of seeds {self.seeds}"

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def shrink(self) -> None:
        # samples decide the Fréchet ratio, and with it the headline: they come before a larger pool and more settings
        self.num_samples, self.seeds, self.scales = self.quick_samples, self.seeds[:1], self.scales[:1]
        self.rewards = dict(itertools.islice(self.rewards.items(), 2))
        self.best_of_n.shrink()
        for name, method in self.methods.items():
            if method.fit:
                self._skipped[name] = "not in --quick: it needs training for each reward"
            elif not method.quick:
                self._skipped[name] = "not in --quick, to save time (quick: false)"
        kept = {}
        for point in self._points:
            if point.method in self._skipped:
                continue
            method = point.build()
            if isinstance(method, BestOfN) and method.num_candidates > self.best_of_n.numbers[-1]:
                self._skipped[point.name] = "not in --quick: it has more candidates than the Best-of-N there"
            else:
                kept.setdefault(point.method, []).append(point)
        # the cheapest of each method, and of the first one also that in the middle: fewer settings are decided by fewer
        # samples, and those with the most evaluations would take most of the time
        first, *others = kept.values() if kept else [[]]
        middle = [first[len(first) // 2]] if first[2:] else []
        self._points = [*first[:1], *middle, *(line[0] for line in others)]

    def missing(self) -> list[str]:
        self._methods = {point: point.build() for point in self._points if point.fit is None}
        self._rewards: dict[str, Reward] = {}
        found = [*self.model.missing(), *(self.quality.missing() if self.quality else ())]
        for name, settings in self.rewards.items():
            try:
                self._rewards[name] = build(settings.plain)
            except RewardError as error:
                found.append(f"rewards, {name}: {error}")
        return found

    def fits(self) -> list[Fit]:
        return self.model.jobs()

    def prepare(self) -> None:
        self._subject = Subject(self.model, self.device)
        self._loaded = {n: self._subject.load(self.rewards[n].plain, built) for n, built in self._rewards.items()}
        if self.quality is not None:
            self.quality.prepare(self.device)
        quality = self.quality and self.quality.identity
        self._identity = {**self._subject.identity, "samples": self.num_samples, "quality": quality}
        if self.batch_size is not None:  # each batch has random numbers of its own
            self._identity["batch_size"] = self.batch_size
        self._probes = {name: self._subject.probe(loaded) for name, loaded in self._loaded.items()}

    @property
    def subject(self) -> Subject:
        """The model, once it is prepared."""
        return self._subject

    def cells(self) -> Sequence[Cell]:
        self._runs: dict[tuple[Point, str, float | None], list[Cell]] = {}
        self._best: dict[str, list[Cell]] = {name: [] for name in self.rewards}
        found = []
        for seed in self.seeds:
            identity = {**self._identity, "quality": None}
            pool = tuple(self.best_of_n.cells(self._any_target, self.num_samples, seed, self.device, identity))
            self._best |= {
                reward: [*self._best[reward], self._best_cell(seed, reward, pool)] for reward in self.rewards
            }
            found += [*pool, *(cells[-1] for cells in self._best.values())]
        for reward, point in itertools.product(self.rewards, self._points):
            wanted = self.methods[point.method].rewards
            if (wanted is not None and reward not in wanted) or not self._suits(point, reward):
                continue
            method = self._methods.get(point)
            scales = self.scales if method is None or method.uses_reward_scale else [None]
            for scale in scales:
                cells = [
                    self._run_cell(seed, reward, scale, point, rows) for seed in self.seeds for rows in self._blocks()
                ]
                self._runs[point, reward, scale] = cells
                found += cells
        return found

    def _blocks(self) -> list[range | None]:
        """The samples of each cell of a run; None for all."""
        if self.block is None or self.block >= self.num_samples:
            return [None]
        return [
            range(begin, min(begin + self.block, self.num_samples)) for begin in range(0, self.num_samples, self.block)
        ]

    def _suits(self, point: Point, reward: str) -> bool:
        try:
            if point in self._methods:
                self._methods[point].check(self._loaded[reward].reward)
        except RewardError as error:
            self._skipped[f"{point.method}, {reward}"] = str(error)
            return False
        return True

    def _any_target(self) -> Target:
        """Samples of the base flow do not depend on the reward."""
        return self._subject.target(next(iter(self._loaded.values())), self.num_samples)

    def _best_cell(self, seed: int, reward: str, pool: tuple[Cell, ...]) -> Cell:
        identity = {**self._identity, "seed": seed, "numbers": self.best_of_n.numbers, "steps": self.best_of_n.steps}
        identity["reward"] = [self.rewards[reward].plain, self._probes[reward]]

        def compute(*blocks: Outcome) -> Outcome:
            target = self._subject.target(self._loaded[reward], self.num_samples)
            return self.best_of_n.choose(target, blocks, self.device, self.quality)

        return Cell(f"{BEST}, {reward}, seed {seed}", identity, compute, pool)

    def _run_cell(self, seed: int, reward: str, scale: float | None, point: Point, rows: range | None) -> Cell:
        words = "" if scale is None else f", λ = {scale:g}"
        factor = self.rewards[reward].scale * (1.0 if scale is None else scale)
        fit = self._job(point, reward, factor)
        identity = {
            **self._identity, "seed": seed, "scale": scale, "method": point.settings,
            "reward": [self.rewards[reward].plain, self.rewards[reward].scale, self._probes[reward]],
            "fit": fit and fit.identity(),
        }  # fmt: skip
        name = f"{point.name}, {reward}{words}, seed {seed}"
        if rows is not None:
            identity["rows"] = [rows.start, rows.stop]
            name = f"{name}, samples {rows.start + 1} to {rows.stop}"
        return Cell(name, identity, lambda: self._run(seed, reward, factor, point, fit, rows), fit=fit)

    def _run(self, seed: int, reward: str, factor: float, point: Point, fit: Fit | None, rows: range | None) -> Outcome:
        if fit is None:
            method = self._methods[point]
        else:
            method = point.build(fit.file)
            method.check(self._loaded[reward].reward)
        target = self._subject.target(self._loaded[reward], self.num_samples, factor)
        x0 = noise(self.num_samples, self._subject.state_shape, seed, self.device)
        return measure(method, target, x0, seed, self.batch_size, self.quality, rows=rows)

    def _job(self, point: Point, reward: str, factor: float) -> Fit | None:
        if point.fit is None:
            return None
        folder = self.output / "models" / f"{point.method}_{reward}_{factor:g}".replace(" ", "_").replace(",", "")
        return job(point.fit, folder, self.model, self.rewards[reward].plain, factor)

    # what is made of it

    def report(self, results: Results) -> Sequence[Block]:
        self._real = self.quality.gaussian if self.quality is not None else None
        entries = {reward: list(self._entries(reward, results)) for reward in self.rewards}
        entries = {reward: found for reward, found in entries.items() if found}
        if not entries:
            return [no_result(results)]
        samples = f"{self.num_samples} samples for each of {len(self.seeds)} seeds."
        if len(self.seeds) == 1:
            samples = f"{self.num_samples} samples of 1 seed, so that intervals are over samples alone."
        candidates, ours = f"candidates of {self.best_of_n.steps} Euler steps", next(iter(self.methods), "")
        return RewardReport(entries, self.scales, ours, samples, candidates, self.frechet_limit).blocks()

    def _entries(self, reward: str, results: Results) -> Iterator[Entry]:
        if (outcomes := results.all(self._best[reward])) is not None:
            for k, n in enumerate(outcomes[0].numbers["N"]):
                parts = [{key: value[k] for key, value in o.tensors.items()} for o in outcomes]
                nfe = sum(o.numbers["nfe"][k] for o in outcomes) / len(outcomes)
                entry = self._entry(reward, BEST, f"N {n}", None, nfe, parts)
                if all("wall_time" in o.numbers for o in outcomes):  # results of earlier code have no times
                    entry.wall_time = sum(o.numbers["wall_time"][k] for o in outcomes) / len(outcomes)
                yield entry
        for (point, name, scale), cells in self._runs.items():
            if name != reward or (outcomes := results.all(cells)) is None:
                continue
            sizes = [len(o.tensors["rewards"]) for o in outcomes]
            nfe = sum(size * o.numbers["nfe"] for size, o in zip(sizes, outcomes, strict=True)) / sum(sizes)
            entry = self._entry(reward, point.method, point.label, scale, nfe, [o.tensors for o in outcomes])
            entry.trained = point.fit is not None
            if all("cell_seconds" in o.numbers for o in outcomes):
                entry.wall_time = sum(o.numbers["cell_seconds"] for o in outcomes) / sum(sizes)
            yield entry

    def _entry(
        self,
        aim: str,
        method: str,
        label: str,
        scale: float | None,
        nfe: float,
        parts: list[dict[str, Tensor]],
    ) -> Entry:
        """Of all seeds' samples together: they are independent."""

        def together(key: str) -> Tensor:
            return torch.cat([part[key] for part in parts])

        reward, diversity = mean_of(together("rewards")), resampled(pairwise_distance, together("states"))
        frechet = None
        if self._real is not None:
            frechet = resampled(frechet_of_features, together("features"), self._real)
        entry = Entry(method, label, scale, nfe, reward, frechet, diversity, together("images")[:SHOWN])
        if all("best_rewards" in part for part in parts):
            entry.best = mean_of(together("best_rewards"))
        if (wanted := self.rewards[aim].shares) and isinstance(self.quality, ClassifierQuality):
            shares = torch.tensor(wanted, dtype=torch.float64)
            classes = self.quality.classes(together("features"))
            entry.shares = resampled(frequency_distance, classes, shares / shares.sum())
        return entry
