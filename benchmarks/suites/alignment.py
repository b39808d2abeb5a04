"""Reward against cost: steering, search and what they must beat, on one model, for any rewards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import bootstrap, plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Table, Text
from mfm_benchmarks.bootstrap import Measured, RealFeatures, rounded
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.measure import clock, judge, measure, noise
from mfm_benchmarks.methods import MethodSettings, Point, job, points
from mfm_benchmarks.models import ModelSettings, Subject
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.spec import Spec, plain
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite
from mfm_lightning.nfe import Meter
from mfm_lightning.samplers import sample_ode
from mfm_lightning.target import LoadedTarget
from rewards import RewardError

BASE, BEST = "base flow", "Best-of-N"


@dataclass
class RewardSettings:
    """A reward of the comparison.

    Args:
        reward: a registered name, `{name: ..., options}` or `{class_path: ..., init_args: ...}`.
        scale: its multiplier at lambda = 1.
    """

    reward: Spec | str
    scale: float = 1.0

    @property
    def plain(self) -> dict[str, Any] | str:
        """What `rewards.build` takes."""
        return plain(self.reward)


@dataclass
class BestOfNSettings:
    """Best-of-N from one pool for all rewards, in as many groups as there are samples (paper, section 7).

    Args:
        numbers: N; the first candidate of a group is the base flow's sample.
        steps: Euler steps of a candidate.
        max_rows: candidates generated at once.
    """

    numbers: list[int] = field(default_factory=lambda: [1, 3, 10, 30, 100, 300, 1000])
    steps: int = 25
    max_rows: int = 4096


@dataclass
class Entry:
    """A point of a curve: one method, setting, reward and lambda, over all seeds."""

    method: str
    label: str
    scale: float | None  # None: does not depend on lambda
    nfe: float
    seconds: float  # a sample
    reward: Measured
    frechet: Measured | None
    diversity: Measured
    images: Tensor
    fit_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method


class AlignmentSuite(Suite):
    """Rewards of single aligned samples against evaluations and seconds, with the Fréchet distance beside them.

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
    """

    name = "alignment"
    title = "Reward against cost"
    about = (
        "Alignment at inference time: the mean reward that each method reaches, by what it costs in evaluations of "
        "networks and rewards (NFE; a backward counts as one more) and in seconds, and what it costs in distance to the data."
    )

    def __init__(
        self,
        model: ModelSettings,
        rewards: dict[str, RewardSettings],
        methods: dict[str, MethodSettings],
        best_of_n: BestOfNSettings | None = None,
        scales: list[float] = (1.0, 2.5, 5.0),
        num_samples: int = 128,
        seeds: list[int] = (0,),
        quality: Quality | None = None,
        frechet_limit: float = 1.5,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.rewards, self.methods = model, dict(rewards), dict(methods)
        self.best_of_n, self.scales = best_of_n or BestOfNSettings(), list(scales)
        self.num_samples, self.seeds, self.quality = num_samples, list(seeds), quality
        self.frechet_limit, self.batch_size = frechet_limit, batch_size
        self._skipped: dict[str, str] = {}
        if not self.rewards or not self.scales or not self.seeds or num_samples < 2:
            raise ValueError("a comparison needs at least one reward, one scale, one seed and two samples")
        if self.best_of_n.numbers != sorted(set(self.best_of_n.numbers)) or self.best_of_n.numbers[0] < 1:
            raise ValueError(f"best_of_n.numbers {self.best_of_n.numbers}: expected different numbers, smallest first")
        for name, method in self.methods.items():
            if unknown := set(method.rewards or ()) - set(self.rewards):
                raise ValueError(
                    f"method {name!r}: {', '.join(unknown)} is none of the rewards {', '.join(self.rewards)}"
                )
        self._points = [point for name, method in self.methods.items() for point in points(name, method)]

    # what is run

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def shrink(self) -> None:
        self.num_samples, self.seeds, self.scales = min(self.num_samples, 32), self.seeds[:1], self.scales[:1]
        self.rewards = dict(itertools.islice(self.rewards.items(), 2))
        self.best_of_n.numbers = [n for n in self.best_of_n.numbers if n <= 100] or self.best_of_n.numbers[:1]
        for name in [name for name, method in self.methods.items() if method.fit]:
            self._skipped[name] = "needs training for each reward, which --quick has no time for"
        kept = {}
        for point in self._points:
            if point.fit is None:
                kept.setdefault(point.method, []).append(point)
        self._points = [p for line in kept.values() for p in ([line[0], line[-1]] if len(line) > 2 else line)]

    def missing(self) -> list[str]:
        return [*self.model.missing(), *(self.quality.missing() if self.quality else ())]

    def fits(self) -> list[Fit]:
        return self.model.fits

    def prepare(self) -> None:
        self._subject = Subject(self.model, self.device)
        self._loaded: dict[str, LoadedTarget] = {n: self._subject.load(r.plain) for n, r in self.rewards.items()}
        if self.quality is not None:
            self.quality.prepare(self.device)
        self._methods = {point: point.build() for point in self._points if point.fit is None}
        shape = self._subject.state_shape
        probe = noise(4, shape, 12345, self.device)
        self._identity = {
            **self._subject.identity,
            "samples": self.num_samples,
            "quality": self.quality and self.quality.identity,
        }
        # a stored result of a reward whose code has changed since is not taken
        self._probes = {}
        for name, loaded in self._loaded.items():
            with torch.no_grad():
                values = self._subject.target(loaded, 4).plain_rewards(probe)
            self._probes[name] = [f"{value:.4g}" for value in values.tolist()]

    def cells(self) -> Sequence[Cell]:
        self._runs: dict[tuple[Point, str, float | None], list[Cell]] = {}
        self._best: dict[str, list[Cell]] = {name: [] for name in self.rewards}
        found = []
        for seed in self.seeds:
            pool = tuple(self._pool(seed))
            found += pool
            for reward in self.rewards:
                cell = self._best_cell(seed, reward, pool)
                self._best[reward].append(cell)
                found.append(cell)
        for reward, point in itertools.product(self.rewards, self._points):
            wanted = self.methods[point.method].rewards
            if (wanted is not None and reward not in wanted) or not self._suits(point, reward):
                continue
            method = self._methods.get(point)
            scales = self.scales if method is None or method.uses_reward_scale else [None]
            for scale in scales:
                cells = [self._run_cell(seed, reward, scale, point) for seed in self.seeds]
                self._runs[point, reward, scale] = cells
                found += cells
        return found

    def _suits(self, point: Point, reward: str) -> bool:
        try:
            if point in self._methods:
                self._methods[point].check(self._loaded[reward].reward)
        except RewardError as error:
            self._skipped[f"{point.method}, {reward}"] = str(error)
            return False
        return True

    def _pool(self, seed: int) -> Iterator[Cell]:
        """Samples of the base flow: blocks of `(B, n, *shape)`, cut where a number of Best-of-N ends."""
        settings, B = self.best_of_n, self.num_samples
        block, stops, begin = max(1, 65536 // B), settings.numbers, 0
        while begin < stops[-1]:
            n = min(block, min(stop for stop in stops if stop > begin) - begin)
            name = f"pool, candidates {begin + 1} to {begin + n} of each sample, seed {seed}"
            identity = {
                **self._identity,
                "quality": None,
                "seed": seed,
                "begin": begin,
                "n": n,
                "steps": settings.steps,
            }
            yield Cell(name, identity, lambda begin=begin, n=n: self._generate(seed, begin, n))
            begin += n

    @torch.no_grad()
    def _generate(self, seed: int, begin: int, n: int) -> Outcome:
        B, shape = self.num_samples, self._subject.state_shape
        x0 = noise(B * n, shape, 7_919 * (seed + 1) + begin, self.device).reshape(B, n, *shape)
        if begin == 0:
            x0[:, 0] = noise(B, shape, seed, self.device)
        target = self._subject.target(next(iter(self._loaded.values())), B)
        target.meter = Meter()
        start, parts = clock(self.device), []
        for rows in torch.arange(B).split(max(1, self.best_of_n.max_rows // n)):
            states = x0[rows].flatten(0, 1)
            parts.append(sample_ode(target.take(rows).drift, states, self.best_of_n.steps).reshape(-1, n, *shape))
        return Outcome(
            {"seconds": clock(self.device) - start, "network": target.meter.network}, {"states": torch.cat(parts)}
        )

    def _best_cell(self, seed: int, reward: str, pool: tuple[Cell, ...]) -> Cell:
        identity = {**self._identity, "seed": seed, "numbers": self.best_of_n.numbers, "steps": self.best_of_n.steps}
        identity["reward"] = [self.rewards[reward].plain, self._probes[reward]]
        return Cell(f"{BEST}, {reward}, seed {seed}", identity, lambda *blocks: self._choose(reward, blocks), pool)

    @torch.no_grad()
    def _choose(self, reward: str, blocks: Sequence[Outcome]) -> Outcome:
        """The best of the first N candidates of each sample, for all N."""
        B, target = self.num_samples, self._subject.target(self._loaded[reward], self.num_samples)
        target.meter, network, seconds, done = Meter(), 0, 0.0, 0
        numbers: dict[str, list[float]] = {"N": [], "nfe": [], "seconds": []}
        tensors: dict[str, list[Tensor]] = {}
        best, best_reward = None, torch.full((B,), -torch.inf)
        for block in blocks:
            states = block.tensors["states"].to(self.device)
            n, start, values = states.shape[1], clock(self.device), []
            for rows in torch.arange(B).split(max(1, self.best_of_n.max_rows // n)):
                part = target.take(rows)
                values.append(part.rewards(states[rows].flatten(0, 1)).reshape(-1, n))
            values = torch.cat(values)
            top, which = values.max(dim=1)
            seconds += clock(self.device) - start + block.numbers["seconds"]
            chosen = states[torch.arange(B), which.cpu()]
            best = (
                chosen
                if best is None
                else torch.where(
                    (top.cpu() > best_reward).reshape(-1, *[1] * (chosen.dim() - 1)).to(chosen.device), chosen, best
                )
            )
            best_reward, done = torch.maximum(best_reward, top.cpu()), done + n
            network += block.numbers["network"]
            if done in self.best_of_n.numbers:
                found = judge(target, best, self.quality)
                for key, value in found.tensors.items():
                    tensors.setdefault(key, []).append(value)
                numbers["N"].append(done)
                numbers["nfe"].append((network + target.meter.reward) / B)
                numbers["seconds"].append(seconds)
        return Outcome(numbers, {key: torch.stack(values) for key, values in tensors.items()})

    def _run_cell(self, seed: int, reward: str, scale: float | None, point: Point) -> Cell:
        words = "" if scale is None else f", λ = {scale:g}"
        factor = self.rewards[reward].scale * (1.0 if scale is None else scale)
        fit = self._job(point, reward, factor)
        identity = {
            **self._identity, "seed": seed, "scale": scale, "method": point.settings,
            "reward": [self.rewards[reward].plain, self.rewards[reward].scale, self._probes[reward]],
            "fit": fit and fit.identity(),
        }  # fmt: skip
        name = f"{point.name}, {reward}{words}, seed {seed}"
        return Cell(name, identity, lambda: self._run(seed, reward, factor, point, fit), fit=fit)

    def _run(self, seed: int, reward: str, factor: float, point: Point, fit: Fit | None) -> Outcome:
        method = self._methods.get(point)
        if fit is not None:
            method = point.build(fit.file)
            method.check(self._loaded[reward].reward)
        target = self._subject.target(self._loaded[reward], self.num_samples, factor)
        x0 = noise(self.num_samples, self._subject.state_shape, seed, self.device)
        outcome = measure(method, target, x0, seed, self.batch_size, self.quality)
        if fit is not None:
            outcome.numbers["fit_seconds"] = fit.seconds()
        return outcome

    def _job(self, point: Point, reward: str, factor: float) -> Fit | None:
        if point.fit is None:
            return None
        folder = self.output / "models" / f"{point.method}_{reward}_{factor:g}".replace(" ", "_").replace(",", "")
        return job(point.fit, folder, self.model.file, self.rewards[reward].plain, factor)

    # what is made of it

    def report(self, results: Results) -> Sequence[Block]:
        self._real = RealFeatures(self.quality.real) if self.quality is not None else None
        entries = {reward: list(self._entries(reward, results)) for reward in self.rewards}
        entries = {reward: found for reward, found in entries.items() if found}
        if not entries:
            return [Text("No result", ["Every run failed; the messages are above."])]
        headline, reached = self._headline(entries)
        pictures = [
            Picture("reward_nfe", "Reward against evaluations", plots.curves(entries, self.scales, "nfe"),
                    "Mean reward of single samples by network and reward evaluations a sample; 95 % intervals shaded. A line joins the settings of a method."),
            Picture("reward_seconds", "Reward against seconds", plots.curves(entries, self.scales, "seconds"),
                    "The same by wall time a sample on the machine below. Training of policies and value networks is not in it; the table has it."),
        ]  # fmt: skip
        if self.quality is not None:
            pictures.append(
                Picture("reward_frechet", "What the reward costs in distance to the data", plots.hacking(entries, self.scales),
                        "Fréchet distance to real images by mean reward: up is reward bought by leaving the data.")
            )  # fmt: skip
        pictures += [
            Picture(f"samples_{_slug(reward)}", f"Samples: {reward}", plots.gallery(self._gallery(found)),
                    f"The same noise in each column, λ = {self.scales[0]:g}; at the left the method, in its dearest setting, and its mean reward.")
            for reward, found in entries.items() if found[0].images.dim() == 4
        ]  # fmt: skip
        return [headline, reached, self._claims(entries), *pictures, self._table(entries)]

    def _entries(self, reward: str, results: Results) -> Iterator[Entry]:
        B = self.num_samples
        cells = self._best[reward]
        if all(cell in results for cell in cells):
            outcomes = [results[cell] for cell in cells]
            for k, n in enumerate(outcomes[0].numbers["N"]):
                parts = [{key: value[k] for key, value in o.tensors.items()} for o in outcomes]
                cost = [sum(o.numbers[key][k] for o in outcomes) / len(outcomes) for key in ("nfe", "seconds")]
                yield self._entry(BEST, f"N {n}", None, cost[0], cost[1] / B, parts)
        for (point, name, scale), cells in self._runs.items():
            if name != reward or not all(cell in results for cell in cells):
                continue
            outcomes = [results[cell] for cell in cells]
            nfe, seconds = (sum(o.numbers[key] for o in outcomes) / len(outcomes) for key in ("nfe", "seconds"))
            entry = self._entry(point.method, point.label, scale, nfe, seconds / B, [o.tensors for o in outcomes])
            entry.fit_seconds = outcomes[0].numbers.get("fit_seconds")
            yield entry

    def _entry(self, method, label, scale, nfe, seconds, parts: list[dict[str, Tensor]]) -> Entry:
        reward = bootstrap.mean([bootstrap.mean_of(part["rewards"]) for part in parts])
        diversity = bootstrap.mean([bootstrap.pairwise_distance(part["states"]) for part in parts])
        frechet = None
        if self._real is not None:
            frechet = bootstrap.mean([bootstrap.frechet(part["features"], self._real) for part in parts])
        return Entry(method, label, scale, nfe, seconds, reward, frechet, diversity, parts[0]["images"])

    def _headline(self, entries: dict[str, list[Entry]]) -> tuple[Headline, Table]:
        """For each method, the least cost at which its reward is above that of Best-of-N with the largest N."""
        items, rows = [], []
        largest = self.best_of_n.numbers[-1]
        for reward, found in entries.items():
            best = next((e for e in reversed(found) if e.method == BEST), None)
            if best is None:
                continue
            candidates = []
            for method, scale in dict.fromkeys((e.method, e.scale) for e in found if e.method != BEST):
                above = [
                    e for e in found if (e.method, e.scale) == (method, scale) and (e.reward - best.reward).sign > 0
                ]
                cheapest = min(above, key=lambda e: e.nfe, default=None)
                row = {"reward": reward, "method": method, "λ": "any" if scale is None else f"{scale:g}"}
                if cheapest is None:
                    rows.append({**row, "setting": "not reached"})
                    continue
                ratio, leave = best.nfe / cheapest.nfe, None
                if cheapest.frechet is not None:
                    leave = cheapest.frechet.value / best.frechet.value
                rows.append({
                    **row, "setting": cheapest.label, "NFE": round(cheapest.nfe), "times fewer NFE": ratio,
                    "times fewer seconds": best.seconds / cheapest.seconds,
                    "above by": cheapest.reward - best.reward, "Fréchet over Best-of-N's": leave,
                })  # fmt: skip
                if leave is None or leave <= self.frechet_limit:
                    candidates.append((ratio, method))
            if candidates:
                ratio, method = max(candidates)
                items.append(
                    (
                        f"{rounded(ratio)}×",
                        f"fewer evaluations than Best-of-{largest} for a higher {reward} reward: {method}",
                    )
                )
            else:
                items.append(
                    (
                        "none",
                        f"of the methods is above Best-of-{largest} in {reward}"
                        + (" near the data" if self.quality else ""),
                    )
                )
        caption = (
            f"For each method the cheapest setting whose mean reward is above that of Best-of-{largest}: the interval of the "
            "paired difference is above zero. "
        )
        if self.quality is not None:
            caption += f"The figures at the top take settings of at most {self.frechet_limit:g} times Best-of-N's Fréchet distance."
        return Headline(items), Table("reaching_best_of_n", f"Cost of reaching Best-of-{largest}", rows, caption)

    def _claims(self, entries: dict[str, list[Entry]]) -> Claims:
        """The first method of the config against each of the others, both in their dearest settings."""
        ours, lines = next(iter(self.methods), None), []
        for (reward, found), scale in itertools.product(entries.items(), self.scales):
            last = {e.method: e for e in found if e.scale in (None, scale)}
            if ours not in last or len(last) < 2:
                continue
            mine = last.pop(ours)
            verdicts: dict[int, list[str]] = {1: [], -1: [], 0: []}
            for other in last.values():
                gap = mine.reward - other.reward
                verdicts[gap.sign].append(
                    f"{other.name}, {round(other.nfe):,} NFE, by {gap.text()}" if gap.sign else other.name
                )
            said = [
                f"{words} {'; '.join(verdicts[sign])}"
                for sign, words in ((1, "higher than"), (-1, "lower than"), (0, "not told apart from")) if verdicts[sign]
            ]  # fmt: skip
            lines.append(
                f"{reward}, λ = {scale:g}: the mean reward of {mine.name}, {round(mine.nfe):,} NFE, is {'; '.join(said)}."
            )
        return Claims(f"{ours} against the others, each in its dearest setting", lines)

    def _gallery(self, found: list[Entry]) -> list[tuple[str, Tensor]]:
        base = next((e for e in found if e.method == BEST and e.label == "N 1"), None)
        last = {e.method: e for e in found if e.scale in (None, self.scales[0])}
        rows = [] if base is None else [(f"{BASE}\n{base.reward.value:.3g}", base.images)]
        for entry in last.values():
            name = f"Best-of-{entry.label[2:]}" if entry.method == BEST else entry.method
            rows.append((f"{name}\n{entry.reward.value:.3g}", entry.images))
        return rows

    def _table(self, entries: dict[str, list[Entry]]) -> Table:
        rows = []
        for reward, found in entries.items():
            for e in found:
                row = {
                    "reward": reward, "λ": "any" if e.scale is None else f"{e.scale:g}", "method": e.method,
                    "setting": e.label, "NFE": round(e.nfe), "seconds a sample": e.seconds, "mean reward": e.reward,
                    "Fréchet": e.frechet, "diversity": e.diversity, "training seconds": e.fit_seconds,
                }  # fmt: skip
                rows.append({key: value for key, value in row.items() if key != "Fréchet" or value is not None})
        caption = (
            "Mean reward of the images without multipliers; diversity is the mean distance between two samples' states. "
            f"{self.num_samples} samples of each of {len(self.seeds)} seed(s)."
        )
        return Table("results", "All results", rows, caption, folded=True)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in text)
