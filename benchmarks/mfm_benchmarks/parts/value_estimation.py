"""Value estimates against rollouts of the base SDE, by number of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mfm_benchmarks import bootstrap, plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Table
from mfm_benchmarks.bootstrap import Measured
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.measure import clock
from mfm_benchmarks.parts.posterior_recovery import noised
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, Posterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DenoisedValue, DrawValue

POINT = "DPS point estimate"
Found = dict[tuple[float, str], Measured]  # by time and estimator


@dataclass
class ValueComparison:
    """Pearson r over states, bias and error of V estimated from draws (paper, section 7).

    Args:
        times: outer times t.
        num_states: noised test samples.
        num_draws: draws of an estimate, and rollouts of a reference value.
        model_steps: flow-map steps of a draw; glass_steps: Euler steps of the GLASS ODE.
        rollout_steps: of the reference.
        max_rows: draws in memory at once.
    """

    times: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5])
    num_states: int = 32
    num_draws: int = 128
    model_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    glass_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    rollout_steps: int = 200
    max_rows: int = 1024

    def shrink(self) -> None:
        self.num_states, self.num_draws, self.times = min(12, self.num_states), min(32, self.num_draws), self.times[-2:]
        self.glass_steps = [k for k in self.glass_steps if k <= 8]
        self.rollout_steps = min(self.rollout_steps, 50)

    def cells(self, target: Target, x1: Tensor, identity: dict[str, Any]) -> list[Cell]:
        """`x1`: clean states to noise, at least `num_states`."""
        x1, found = x1[: self.num_states], []
        self._cells: dict[tuple[float, str], Cell] = {}
        self._reference: dict[float, Cell] = {}
        for t in self.times:
            settings = {**identity, "states": len(x1), "draws": self.num_draws, "t": t}
            x_t = noised(x1, t)
            rollouts = RolloutPosterior(self.rollout_steps, generator=torch.Generator().manual_seed(301))
            sources: dict[str, Posterior | None] = {f"MFM {k}": FlowMapPosterior(k) for k in self.model_steps}
            sources |= {f"GLASS {k}": GlassPosterior(k) for k in self.glass_steps}
            sources[POINT] = None
            self._reference[t] = Cell(
                f"value, t = {t:g}, reference", {**settings, "rollouts": self.rollout_steps},
                self._estimate(target, t, x_t, rollouts),
            )  # fmt: skip
            found.append(self._reference[t])
            for name, source in sources.items():
                self._cells[t, name] = Cell(
                    f"value, t = {t:g}, {name}", settings, self._estimate(target, t, x_t, source)
                )
                found.append(self._cells[t, name])
        return found

    def _estimate(self, target: Target, t: float, x_t: Tensor, source: Posterior | None) -> Callable[[], Outcome]:
        @torch.no_grad()
        def compute() -> Outcome:
            target.meter, begin = Meter(), clock(x_t.device)
            if source is None:
                values = DenoisedValue()(target, t, x_t).value
            else:
                estimator = DrawValue(self.num_draws, source, max_rows=self.max_rows)
                values = estimator(target, t, x_t, torch.Generator().manual_seed(302)).value
            numbers = {"nfe": target.meter.total / len(x_t), "seconds": clock(x_t.device) - begin}
            return Outcome(numbers, {"values": values})

        return compute

    def blocks(self, results: Results) -> list[Block]:
        rows, r, squares = [], {}, {}
        for (t, name), cell in self._cells.items():
            if cell not in results or self._reference[t] not in results:
                continue
            values, reference = results[cell].tensors["values"], results[self._reference[t]].tensors["values"]
            error = (values - reference).double()
            r[t, name], squares[t, name] = bootstrap.correlation(values, reference), bootstrap.mean_of(error.square())
            rows.append({
                "t": t, "estimator": name, "NFE": round(results[cell].numbers["nfe"]), "Pearson r": r[t, name],
                "bias": bootstrap.mean_of(error), "mean squared error": squares[t, name],
            })  # fmt: skip
        if not rows:
            return []
        caption = (
            f"{self.num_states} states, V from {self.num_draws} draws against V from {self.num_draws} SDE rollouts of "
            f"{self.rollout_steps} steps, which has an error of its own; 95 % intervals over states."
        )
        correlation = self._plot(r, "Pearson r with the reference")
        error = self._plot(squares, "mean squared error", "log")
        said = [*self._claims(r, "r"), *self._claims(squares, "squared error")]
        return [
            Picture("value_r_nfe", "Value estimates: correlation", correlation, caption),
            Picture("value_error_nfe", "Value estimates: error", error, caption),
            Claims("Value estimates from one-step draws", said),
            Table("value_estimates", "Value estimates", rows, caption, folded=True),
        ]

    def _plot(self, found: Found, words: str, yscale: str = "linear") -> Figure:
        kinds = {"MFM": self.model_steps, "GLASS": self.glass_steps}
        return plots.by_steps(found, self.times, kinds, words, lambda point: [(1, point)], POINT, yscale)

    def _claims(self, found: Found, what: str) -> list[str]:
        lines, ours = [], f"MFM {self.model_steps[0]}"
        for t in self.times:
            mine = found.get((t, ours))
            if mine is None:
                continue
            others = {
                name: found[t, name]
                for name in (POINT, *(f"GLASS {k}" for k in self.glass_steps))
                if (t, name) in found and len(found[t, name].replicates) == len(mine.replicates)
            }
            lines.append(f"t = {t:g}: {what} of {ours}, {mine.text()}, is {verdict(mine, others)}.")
        return lines
