"""Value estimates against rollouts of the base SDE, by number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Summary, Table
from mfm_benchmarks.charts import LineChart
from mfm_benchmarks.claims import counted, verdict
from mfm_benchmarks.measure import states_digest
from mfm_benchmarks.parts.pictured_states import DRAWS, STATES, draw_pictures, given_pictures, shown
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment.posteriors import FlowMapPosterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DenoisedValue, DrawValue, ValueEstimator
from mfm_lightning.evaluation.draws import POINT, DrawSettings, ValueErrors, draw, estimate_values, noisy_states
from mfm_lightning.interpolant import randn
from mfm_lightning.metrics.measured import Measured, rounded

SEED = 302  # of the draws
AGAIN = "SDE rollouts again"  # as exact as the reference: what its own error leaves to be reached

Found = dict[tuple[float, str], Measured]  # by time and estimator


@dataclass
class ValueComparison(DrawSettings):
    """Pearson r over states (noised test samples), bias and error of V estimated from draws (paper, section 7)."""

    def shrink(self) -> None:
        self.num_states, self.num_draws, self.times = min(12, self.num_states), min(32, self.num_draws), self.times[-2:]
        self.glass_steps = [k for k in self.glass_steps if k <= 8]
        self.rollout_steps = min(self.rollout_steps, 50)

    @property
    def _ours(self) -> str:
        return f"MFM {self.model_steps[0]}"

    def cells(
        self,
        target: Target,
        x1: Tensor,
        identity: dict[str, Any],
        subject: str = "",
        of_map: dict[str, Any] | None = None,
    ) -> list[Cell]:
        """
        Args:
            target: with conditions for each state, or one row for all.
            x1: clean states to noise, at least `num_states`.
            subject: the reward's name, where there are several.
            of_map: what draws of the Meta Flow Map alone depend on besides, where its base drift is of other weights.
        """
        x1, found = x1[: self.num_states], []
        target, self._of = target.take(slice(0, len(x1))), f", {subject}" if subject else ""
        self._cells: dict[tuple[float, str], Cell] = {}
        self._reference: dict[float, Cell] = {}
        for t in self.times:
            settings = {**identity, "states": states_digest(x1), "draws": self.num_draws, "t": t}
            x_t = noisy_states(x1, t, torch.Generator().manual_seed(1))
            rollouts = DrawValue(self.num_draws, RolloutPosterior(self.rollout_steps), max_rows=self.max_rows)
            self._reference[t] = Cell(
                f"value{self._of}, t = {t:g}, reference", {**settings, "rollouts": self.rollout_steps},
                self._estimate(target, t, x_t, rollouts),
            )  # fmt: skip
            found.append(self._reference[t])
            for name, estimator in {**self.value_estimators(), POINT: DenoisedValue(), AGAIN: rollouts}.items():
                more = (of_map or {}) if estimator.needs_meta_flow_map else {}
                seed = SEED
                if name == AGAIN:
                    more, seed = {"rollouts": self.rollout_steps}, SEED + 1
                self._cells[t, name] = Cell(
                    f"value{self._of}, t = {t:g}, {name}", settings | more,
                    self._estimate(target, t, x_t, estimator, seed, x1 if name == self._ours else None),
                )  # fmt: skip
                found.append(self._cells[t, name])
        return found

    def _estimate(
        self,
        target: Target,
        t: float,
        x_t: Tensor,
        estimator: ValueEstimator,
        seed: int = SEED,
        pictured: Tensor | None = None,
    ) -> Callable[[], Outcome]:
        """`pictured`: clean states of which, with the noised ones and further draws, pictures are kept."""

        def compute() -> Outcome:
            found = estimate_values(estimator, target, t, x_t, torch.Generator().manual_seed(seed))
            tensors = {"values": found.values[0]}
            if pictured is not None and isinstance(estimator, DrawValue):
                first = x_t[:STATES]
                noise = randn((len(first), DRAWS, *first.shape[1:]), first, torch.Generator().manual_seed(SEED + 2))
                of_first = target.take(slice(0, len(first)))
                draws = draw(estimator.posterior or FlowMapPosterior(), of_first, t, first, noise, self.max_rows)
                tensors |= {"images": draw_pictures(target, draws), "given": given_pictures(target, pictured, first)}
            return Outcome({"nfe": found.nfe}, tensors)

        return compute

    def blocks(self, results: Results) -> list[Block]:
        rows, r, squares, cost = [], {}, {}, {}
        for (t, name), cell in self._cells.items():
            if cell not in results or self._reference[t] not in results:
                continue
            values, reference = results[cell].tensors["values"], results[self._reference[t]].tensors["values"]
            errors = ValueErrors.of(values[None], reference)
            r[t, name], squares[t, name] = errors.r, errors.squared
            # of a draw: those of a value without the rewards, one a draw
            cost[t, name] = results[cell].numbers["nfe"] / (1 if name == POINT else self.num_draws) - 1
            rows.append({
                "t": t, "estimator": name, "NFE": round(results[cell].numbers["nfe"]), "Pearson r": errors.r,
                "bias": errors.bias, "mean squared error": errors.squared,
            })  # fmt: skip
        if not rows:
            return []
        caption = (
            f"Values of {self.num_states} states from {self.num_draws} draws, against values from {self.num_draws} SDE "
            f"rollouts of {self.rollout_steps} steps, which have an error of their own. 95 % intervals are over states."
        )
        correlation = self._plot(r, cost, "Pearson r with the reference")
        error = self._plot(squares, cost, "mean squared error", "log")
        said = [*self._claims(r, "Pearson r"), *self._claims(squares, "squared error")]
        return [
            *self._summary(r),
            Picture("value_r_nfe", f"Value estimates{self._of}: correlation", correlation, caption),
            Picture("value_error_nfe", f"Value estimates{self._of}: error", error, caption),
            *self._pictures(results),
            Claims(f"Value estimates from one-step draws{self._of}", said),
            Table("value_estimates", f"Value estimates{self._of}", rows, caption, folded=True, keys=["t", "estimator"]),
        ]

    def _pictures(self, results: Results) -> list[Block]:
        """States by value at the middle time of those with pictures, which results of earlier code lack."""
        found = {}
        for t in self.times:
            mine, reference = self._cells[t, self._ours], self._reference[t]
            if mine in results and reference in results and "given" in results[mine].tensors:
                found[t] = (results[mine].tensors, results[reference].tensors["values"])
        if not found:
            return []
        t = list(found)[len(found) // 2]
        mine, reference = found[t]
        rows = [
            (
                f"V = {mine['values'][k]:.2f}\nrollouts {reference[k]:.2f}",
                shown(torch.cat([mine["given"][k], mine["images"][k]])),
            )
            for k in reference[: len(mine["given"])].argsort(descending=True).tolist()
        ]
        caption = (
            f"At t = {t:g}, highest value first: the test image, its noised state, then draws in "
            f"{counted(self.model_steps[0], 'step')}. Beside each row: the value from {self.num_draws} such draws, and "
            "from rollouts."
        )
        return [Picture("value_states", f"States by value{self._of}, t = {t:g}", plots.gallery(rows), caption)]

    def _summary(self, r: Found) -> list[Block]:
        """The correlation of values from one-step draws over the times."""
        mine = [r[t, name].value for t in self.times if (t, name := self._ours) in r]
        mine = [value for value in mine if not math.isnan(value)]
        if not mine:
            return []
        return [
            Summary([
                f"Values{self._of} from draws in {counted(self.model_steps[0], 'step')} correlate with those "
                f"from rollouts with Pearson r = {rounded(min(mine))} to {rounded(max(mine))} over the times t."
            ])
        ]  # fmt: skip

    def _plot(
        self, found: Found, cost: dict[tuple[float, str], float], words: str, yscale: str = "linear"
    ) -> LineChart:
        kinds = {"MFM": self.model_steps, "GLASS": self.glass_steps}
        point = next((value for (_, name), value in cost.items() if name == POINT), 1.0)
        return plots.by_steps(found, self.times, kinds, cost, words, lambda value: [(point, value)], POINT, yscale)

    def _claims(self, found: Found, what: str) -> list[str]:
        lines, ours = [], self._ours
        for t in self.times:
            mine = found.get((t, ours))
            if mine is None or math.isnan(mine.value):
                continue
            others = {
                name: found[t, name]
                for name in (POINT, *(f"GLASS {k}" for k in self.glass_steps))
                if (t, name) in found and not math.isnan(found[t, name].value)
            }
            lines.append(f"t = {t:g}: {what} of {ours}, {mine.text()}, is {verdict(mine, others)}.")
            if (t, AGAIN) in found:
                lines[-1] += f" As many other rollouts have {found[t, AGAIN].text()}: the reference has an error."
        return lines
