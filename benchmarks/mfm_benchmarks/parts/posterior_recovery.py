"""Posterior draws of the Meta Flow Map and of GLASS against rollouts of the base SDE, by number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Summary, Table
from mfm_benchmarks.charts import LineChart
from mfm_benchmarks.claims import counted, verdict
from mfm_benchmarks.measure import states_digest
from mfm_benchmarks.parts.pictured_states import draw_pictures, given_pictures, shown
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.posteriors import Posterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.evaluation.draws import DrawSettings, draw, draw_distance, noisy_states, posteriors
from mfm_lightning.metrics.measured import Measured, mean_of, rounded

REFERENCE, FLOOR = "reference", "SDE rollouts again (floor)"


@dataclass
class PosteriorRecovery(DrawSettings):
    """Sliced W2 between draws and reference draws of each noisy state (noised test samples), mean over states."""

    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5])
    num_states: int = 32
    glass_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])

    def shrink(self) -> None:
        self.num_states, self.num_draws, self.times = min(4, self.num_states), min(32, self.num_draws), self.times[:2]
        self.glass_steps = [k for k in self.glass_steps if k <= 16]
        self.rollout_steps = min(self.rollout_steps, 50)

    def cells(
        self, target: Target, x1: Tensor, identity: dict[str, Any], of_map: dict[str, Any] | None = None
    ) -> list[Cell]:
        """
        Args:
            target: with conditions for each state, or one row for all.
            x1: clean states to noise, at least `num_states`.
            of_map: what draws of the Meta Flow Map alone depend on besides, where its base drift is of other weights.
        """
        x1 = x1[: self.num_states]
        target = target.take(slice(0, len(x1)))
        settings = {**identity, "states": states_digest(x1), "draws": self.num_draws}
        self._cells: dict[tuple[float, str], Cell] = {}
        self._reference: dict[float, Cell] = {}
        found = []
        for t in self.times:
            x_t = noisy_states(x1, t, torch.Generator().manual_seed(1))
            rollouts, exact = settings | {"t": t, "rollouts": self.rollout_steps}, RolloutPosterior(self.rollout_steps)
            reference = Cell(
                f"posterior, t = {t:g}, {REFERENCE}",
                rollouts,
                partial(_with_states, self._draw(target, t, x_t, exact, 1, True), target, x1, x_t),
            )
            self._reference[t] = reference
            found.append(reference)
            sources = posteriors(self.model_steps, self.glass_steps)
            for name, source in {**sources, FLOOR: exact}.items():
                made = self._draw(target, t, x_t, source, 2, name in self._pictured)
                cell = Cell(
                    f"posterior, t = {t:g}, {name}",
                    rollouts | ((of_map or {}) if source.needs_meta_flow_map else {}),
                    lambda other, made=made: _compare(made(), other),
                    (reference,),
                )
                self._cells[t, name] = cell
                found.append(cell)
        return found

    @property
    def _pictured(self) -> list[str]:
        """Whose draws are shown: with the fewest and the most steps."""
        ours, glass = [f"MFM {k}" for k in self.model_steps], [f"GLASS {k}" for k in self.glass_steps]
        return [*ours[:1], *ours[1:][-1:], *glass[:1], *glass[1:][-1:]]

    def _draw(
        self, target: Target, t: float, x_t: Tensor, source: Posterior, seed: int, pictured: bool
    ) -> Callable[[], Outcome]:
        def compute() -> Outcome:
            noise = torch.randn(
                len(x_t), self.num_draws, *x_t.shape[1:], generator=torch.Generator().manual_seed(seed)
            ).to(x_t)
            target.meter = Meter()
            found = draw(source, target, t, x_t, noise, self.max_rows)
            evaluations = target.meter.network / len(found.flatten(0, 1))
            pictures = {"images": draw_pictures(target, found)} if pictured else {}
            return Outcome({"evaluations": evaluations}, {"draws": found, **pictures})

        return compute

    def blocks(self, results: Results) -> list[Block]:
        rows, found, cost = [], {}, {}
        for (t, name), cell in self._cells.items():
            if cell in results:
                found[t, name] = mean_of(results[cell].tensors["distance"])
                kind, _, steps = name.partition(" ")
                steps = int(steps) if kind in ("MFM", "GLASS") else self.rollout_steps
                # results of earlier code have no such number: one evaluation a step
                cost[t, name] = results[cell].numbers.get("evaluations", steps)
                rows.append({
                    "t": t, "draws": name, "evaluations": round(cost[t, name]), "sliced W2": found[t, name],
                })  # fmt: skip
        if not rows:
            return []
        caption = (
            f"Sliced W2 of {self.num_draws} posterior draws to {self.num_draws} SDE rollouts, mean over "
            f"{self.num_states} states. Lower is better; the dashed line is the distance between two sets of rollouts."
        )
        plot, title = self._plot(found, cost), "Posterior draws against SDE rollouts"
        return [
            *self._summary(found),
            Picture("posterior_recovery", title, plot, f"{caption} 95 % intervals are over states."),
            *self._pictures(found, results),
            self._claims(found),
            Table("posterior_recovery", "Posterior draws", rows, caption, folded=True, keys=["t", "draws"]),
        ]

    def _summary(self, found: dict[tuple[float, str], Measured]) -> list[Block]:
        """One-step draws against the floor, at the middle time."""
        times = [t for t in self.times if (t, f"MFM {self.model_steps[0]}") in found and (t, FLOOR) in found]
        if not times:
            return []
        t = times[len(times) // 2]
        mine, floor = found[t, f"MFM {self.model_steps[0]}"], found[t, FLOOR]
        return [
            Summary([
                f"Posterior draws in {counted(self.model_steps[0], 'step')} have a sliced W2 of "
                f"{rounded(mine.value)} to SDE rollouts at t = {t:g}; two sets of rollouts have {rounded(floor.value)}."
            ])
        ]  # fmt: skip

    def _plot(self, found: dict[tuple[float, str], Measured], cost: dict[tuple[float, str], float]) -> LineChart:
        kinds, words = {"MFM": self.model_steps, "GLASS": self.glass_steps}, "sliced W2 to SDE rollouts"
        return plots.by_steps(found, self.times, kinds, cost, words, lambda floor: floor, FLOOR, "log")

    def _pictures(self, found: dict[tuple[float, str], Measured], results: Results) -> list[Block]:
        """Draws of the first states at the middle time of those with pictures, which results of earlier code lack."""
        there = {t: results[cell].tensors for t, cell in self._reference.items() if cell in results}
        times = [t for t, tensors in there.items() if "given" in tensors]
        if not times:
            return []
        t = times[len(times) // 2]
        reference = there[t]
        rows = []
        for k, given in enumerate(reference["given"]):
            rows.append(("SDE rollouts\nreference", shown(torch.cat([given, reference["images"][k]]))))
            for name in self._pictured:
                if (t, name) in found and (images := results[self._cells[t, name]].tensors.get("images")) is not None:
                    rows.append((f"{name}\n{found[t, name].value:.3f}", shown(torch.cat([given, images[k]]))))
        caption = (
            f"Draws at t = {t:g} of {counted(len(reference['given']), 'state')}, each with a row for each way to draw: "
            "the test image, its noised state, then draws. Beside each row: the mean sliced W2 over all states. Rows "
            "but the reference's have the same inner noise."
        )
        return [
            Picture(
                "posterior_draws",
                f"Posterior draws at t = {t:g}",
                plots.gallery(rows, ours=[f"MFM {k}" for k in self.model_steps]),
                caption,
            )
        ]

    def _claims(self, found: dict[tuple[float, str], Measured]) -> Claims:
        lines = []
        for t in self.times:
            mine = found.get((t, f"MFM {self.model_steps[0]}"))
            others = {f"GLASS {k}": found[t, f"GLASS {k}"] for k in self.glass_steps if (t, f"GLASS {k}") in found}
            if mine is not None and others:
                words = verdict(mine, others, "further from the reference than", "closer to the reference than")
                lines.append(
                    f"t = {t:g}: draws of the Meta Flow Map in {counted(self.model_steps[0], 'step')} are {words}."
                )
        return Claims("Posterior draws in one step against GLASS", lines)


def _compare(draws: Outcome, reference: Outcome) -> Outcome:
    distance = draw_distance(draws.tensors["draws"], reference.tensors["draws"], 128, seed=0)
    pictures = {name: x for name, x in draws.tensors.items() if name == "images"}
    return Outcome(draws.numbers, {"distance": distance, **pictures})


def _with_states(drawn: Callable[[], Outcome], target: Target, x1: Tensor, x_t: Tensor) -> Outcome:
    """The outcome with pictures of the states."""
    outcome = drawn()
    outcome.tensors["given"] = given_pictures(target, x1, x_t)
    return outcome
