"""Curves of fine-tuning, reward by drift from the base flow, and what is read off them at equal drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mfm_lightning.metrics.frechet import Gaussian, frechet_of_features
from mfm_lightning.metrics.measured import Measured, mean, mean_of, of_runs, resampled

MIN_RUNS = 3  # of so many trainings on the interval is of trainings


@dataclass
class Run:
    """One training by its C checkpoints, the first of them before training.

    Attributes:
        costs: by name (evaluations, seconds), C numbers each.
        values: by name (drift, reward, its gain above the base flow's from the same noise, held-out rewards, Fréchet
            distance), C numbers each.
    """

    costs: dict[str, list[float]]
    values: dict[str, list[Measured]]

    @classmethod
    def of(cls, costs: dict[str, list[float]], tensors: dict[str, Tensor], real: Gaussian | None) -> Run:
        """From tensors `(C, n)`, and `features` `(C, n, F)` with a Gaussian of real ones."""
        values = {
            name: [mean_of(row) for row in tensor]
            for name, tensor in tensors.items()
            if name in ("drift", "rewards") or name.startswith("held_out/")
        }
        values["gain"] = [mean_of(row - tensors["rewards"][0]) for row in tensors["rewards"]]
        if real is not None and "features" in tensors:
            values["Fréchet"] = [resampled(frechet_of_features, row, real) for row in tensors["features"]]
        return cls(costs, values)

    def score(self, scale: float) -> float:
        """The largest scale x reward - drift after training began: the tilted distribution has the largest of all."""
        pairs = list(zip(self.values["rewards"], self.values["drift"], strict=True))
        return max(scale * reward.value - drift.value for reward, drift in pairs[1:])

    def crossing(self, level: float) -> int | None:
        """The first checkpoint whose mean drift reaches the level; None if none does."""
        return next((k for k, d in enumerate(self.values["drift"]) if k and d.value >= level), None)

    def at_drift(self, name: str, level: float) -> Measured | None:
        """A value where the drift reaches the level for the first time, linear in the square root of the drift between
        two checkpoints; None where it does not. (To first order in a small tilt the reward rises as that root.)

        Its interval is of resampled samples: each set has its own drifts and values.
        """
        if (k := self.crossing(level)) is None:
            return None
        (low, high), (before, after) = (self.values[which][k - 1 : k + 1] for which in ("drift", name))

        start, end = (drift.replicates.clamp_min(0).sqrt() for drift in (low, high))
        part = (math.sqrt(level) - start) / (end - start).clamp_min(1e-9)
        share = _share(low.value, high.value, level)
        value = before.value + share * (after.value - before.value)
        replicates = before.replicates + part.clamp(-1, 2) * (after.replicates - before.replicates)
        return Measured(value, replicates, samples=after.samples)

    def cost_at_drift(self, name: str, level: float) -> float | None:
        """A cost at the same place."""
        if (k := self.crossing(level)) is None:
            return None
        before, after = self.costs[name][k - 1 : k + 1]
        share = _share(self.values["drift"][k - 1].value, self.values["drift"][k].value, level)
        return before + share * (after - before)


def _share(low: float, high: float, level: float) -> float:
    """How far between two drifts a level is, in square roots."""
    start, end = math.sqrt(max(low, 0.0)), math.sqrt(high)
    return min(1.0, max(0.0, (math.sqrt(level) - start) / max(end - start, 1e-9)))


def together(values: Sequence[Measured]) -> Measured:
    """The mean over trainings: with an interval of trainings where there are three, else of their samples alone."""
    return of_runs([value.value for value in values]) if len(values) >= MIN_RUNS else mean(values)


@dataclass
class Curve:
    """A method at one value of its knob: its `runs`, one a seed, and the run that its learning rate was chosen on."""

    method: str
    label: str
    learning_rate: float
    runs: list[Run]
    tuned: Run
    images: Tensor

    @property
    def name(self) -> str:
        return f"{self.method}, {self.label}" if self.label else self.method

    @property
    def checkpoints(self) -> int:
        return min(len(run.values["drift"]) for run in self.runs)

    def points(self, name: str) -> list[Measured]:
        """A value at each checkpoint, over all runs."""
        return [together([run.values[name][k] for run in self.runs]) for k in range(self.checkpoints)]

    def costs(self, name: str) -> list[float]:
        """A cost at each checkpoint, the mean over runs."""
        return [sum(run.costs[name][k] for run in self.runs) / len(self.runs) for k in range(self.checkpoints)]

    def at_drift(self, name: str, level: float) -> Measured | None:
        """A value at a level of drift, over all runs; None unless all reach it."""
        found = [run.at_drift(name, level) for run in self.runs]
        reached = [value for value in found if value is not None]
        return together(reached) if len(reached) == len(found) else None

    def cost_at_drift(self, name: str, level: float) -> float | None:
        """A cost at a level of drift, the mean over runs; None unless all reach it."""
        found = [run.cost_at_drift(name, level) for run in self.runs]
        reached = [cost for cost in found if cost is not None]
        return sum(reached) / len(reached) if len(reached) == len(found) else None


def best_at_drift(curves: Sequence[Curve], level: float) -> Curve | None:
    """Of a method's curves the one with the highest reward at a level of drift, in the runs that learning rates were
    chosen on: those that are reported have no part in the choice."""
    reached = [(curve, found) for curve in curves if (found := curve.tuned.at_drift("rewards", level)) is not None]
    return max(reached, key=lambda pair: pair[1].value)[0] if reached else None
