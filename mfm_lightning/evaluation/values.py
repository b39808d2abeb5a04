"""Estimators of the value V_t(x) against a reference: exact where an oracle gives it, else rollouts of the base SDE."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import (
    DenoisedValue,
    DrawValue,
    Estimate,
    ExactGradient,
    ValueEstimator,
    exact_likelihood,
)
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import ArrayData, Evaluation, TargetModule, data_of, datamodule_of
from mfm_lightning.evaluation.draws import POINT, DrawSettings, ValueErrors, ValueEstimates
from mfm_lightning.evaluation.state_values import StateValues, ValueJob
from mfm_lightning.interpolant import Generators, Times, as_times
from mfm_lightning.networks.value import ValueNetwork
from mfm_lightning.oracles import Oracle
from mfm_lightning.utils.console import write_table
from mfm_lightning.utils.digests import digest
from mfm_lightning.utils.distributed import gather_ranks
from mfm_lightning.utils.figures import log_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

REFERENCES = ("auto", "exact", "rollouts")
REFERENCE = "reference"


class ValueModule(TargetModule, Protocol):
    """With a network for the amortised value."""

    network: ValueNetwork


@dataclass
class ValueEvaluation(DrawSettings, Evaluation[ValueModule]):
    """Pearson r over states, bias and variance of value estimators, by outer time; a table and two figures.

    States are noised test data. Estimators: draws of the flow map, of the GLASS ODE and of the base SDE, the reward of
    the denoised state (the point estimate of DPS), and the amortised network where it has been trained. All of them
    use the target's base flow. The paper's setting: 200 draws, 200 rollouts of 200 steps, t = 0.1, 0.2, 0.3, 0.5.

    Estimates are kept in `states/` of the folder, state by state (`StateValues`): ranks share them, and a run that was
    stopped goes on.

    Args:
        num_repeats: independent estimates of each state's value, for the variance.
        rollout_draws: rollouts of the SDE's own estimate, which takes the most evaluations.
        reference: "exact" (the DataModule's oracle), "rollouts", or "auto": the former where there is an oracle.
        use_labels: condition states on their classes.
        seed: of states and draws.

    Raises:
        ValueError: for an unknown reference.
    """

    needs_data = ("splits",)

    num_states: int = 64
    num_draws: int = 200
    num_repeats: int = 2
    rollout_draws: int = 50
    reference: str = "auto"
    use_labels: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"unknown reference {self.reference!r}: expected one of {', '.join(REFERENCES)}")
        self._rows: list[dict[str, Any]] = []
        self._values: dict[tuple[float, str], tuple[Tensor, Tensor]] = {}

    def check(self, module: ValueModule) -> None:
        super().check(module)
        oracle, scale = self._oracle(module), module.target.settings.reward_scale
        if self.reference == "exact" and oracle is None:
            raise ValueError("reference 'exact' needs a DataModule with an oracle: use 'rollouts'")
        if oracle is not None and oracle.needs_likelihood:
            exact_likelihood(module.target.reward, module.target.settings.decoder, scale)
        module.target.check_labels(self.use_labels)

    def _oracle(self, module: ValueModule) -> Oracle | None:
        """What gives the exact value; None where rollouts are the reference."""
        return None if self.reference == "rollouts" else getattr(datamodule_of(module.trainer), "oracle", None)

    def prepare(self, module: ValueModule, folder: Path) -> None:
        """Estimates of all states, shared by the ranks; what is there from a run before is taken."""
        ranks = module.trainer.global_rank, module.trainer.world_size
        self._state_values(module, folder).fill(self._jobs(module), *ranks)
        gather_ranks(None)

    def measure(self, module: ValueModule, folder: Path) -> None:
        oracle, store, jobs = self._oracle(module), self._state_values(module, folder), self._jobs(module)
        store.fill(jobs)  # nothing, where `prepare` was called
        network = module.network if _is_trained(module) else None
        if network is None:
            log.info("the amortised network is not trained (fit it, and give --ckpt_path): it is not in the table")
        self._rows, self._values, references = [], {}, dict[float, Tensor]()
        for job in jobs:
            found = store.read(job)
            if job.name == REFERENCE:
                references[job.t] = found.values[0]
                continue
            self._add(job, found, references[job.t])
            if job.name == POINT and network is not None:  # other weights each time, and one evaluation a state
                of_network = ValueJob(job.t, "network", _NetworkValue(network), 1, 4)
                self._add(of_network, store.estimate(of_network, range(len(store.x1))), references[job.t])
        for row in self._rows:
            module.log(f"test/pearson_r/{row['estimator']}/t={row['t']}", row["r"], rank_zero_only=True)
        kind = (
            "the exact value" if oracle is not None else f"{self.num_draws} SDE rollouts of {self.rollout_steps} steps"
        )
        title = f"Value estimates against {kind}: {self.num_states} states, {self.num_draws} draws each"
        shown = [
            {
                "t": f"{row['t']:g}",
                "estimator": row["estimator"],
                "NFE": row["NFE"],
                "Pearson r (95 %)": f"{row['r']:.3f} ({row['r low']:.3f} to {row['r high']:.3f})",
                "bias": f"{row['bias']:+.3f}",
                "variance": "-" if row["variance"] is None else f"{row['variance']:.4f}",
                "ESS": f"{row['ESS']:.0f}",
            }
            for row in self._rows
        ]
        write_table(self._rows, title, folder, "value_estimates", shown=shown)

    def draw(self, module: ValueModule, folder: Path) -> None:
        if not self._rows:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._draw_correlation(folder / "r_against_nfe")
        self._draw_scatter(folder / "scatter")

    def _add(self, job: ValueJob, found: ValueEstimates, reference: Tensor) -> None:
        self._values[job.t, job.name] = (found.values.cpu(), reference)
        self._rows.append(_row(job.t, job.name, getattr(job.estimator, "num_draws", 1), found, reference))

    def _state_values(self, module: ValueModule, folder: Path) -> StateValues:
        data: ArrayData = data_of(module)
        x1, label = data.splits["test"]
        settings = {
            **module.target.described(), "states": digest(x1, label), "seed": self.seed, "use_labels": self.use_labels,
            "rollout_steps": self.rollout_steps, "exact": self._oracle(module) is not None,
            "precision": module.trainer.precision,
        }  # fmt: skip
        pick = torch.randperm(len(x1), generator=torch.Generator().manual_seed(1000 * self.seed))[: self.num_states]
        x1, label = x1[pick].to(module.device), label[pick].to(module.device)

        def target(rows: Tensor) -> Target:
            return module.target(Conditions(label=label[rows]) if self.use_labels else None)

        return StateValues(folder / "states", settings, x1, target, self.seed, self.max_rows)

    def _jobs(self, module: ValueModule) -> list[ValueJob]:
        """Of each time the reference comes first."""
        oracle = self._oracle(module)
        reference = self._rollouts(self.num_draws) if oracle is None else ExactGradient(oracle)
        estimators: dict[str, ValueEstimator] = dict(self.value_estimators())
        estimators[f"SDE {self.rollout_steps}"] = self._rollouts(self.rollout_draws)
        estimators[POINT] = DenoisedValue()
        jobs = []
        for t in self.times:
            jobs.append(ValueJob(t, REFERENCE, reference, 1, 3))
            for name, estimator in estimators.items():
                draws = getattr(estimator, "num_draws", 1)
                # an estimate without draws is the same each time
                jobs.append(ValueJob(t, name, estimator, self.num_repeats if draws > 1 else 1, 4))
        return jobs

    def _rollouts(self, num_draws: int) -> ValueEstimator:
        return DrawValue(num_draws, RolloutPosterior(self.rollout_steps), max_rows=self.max_rows)

    def _draw_correlation(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(self.times), 3.6), layout="constrained")
        axes = figure.subplots(1, len(self.times), sharey=True, squeeze=False)[0]
        for axis, t in zip(axes, self.times, strict=True):
            rows = [row for row in self._rows if row["t"] == t]
            for prefix, colour in (("MFM", "C0"), ("GLASS", "C1")):
                line = [row for row in rows if row["estimator"].startswith(f"{prefix} ")]
                steps, low, high = ([row[key] for row in line] for key in ("evaluations", "r low", "r high"))
                axis.plot(steps, [row["r"] for row in line], "o-", color=colour, label=prefix, markersize=4)
                axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            for name, marker in ((POINT, "s"), ("network", "^")):
                for row in (row for row in rows if row["estimator"] == name):
                    axis.plot(1, row["r"], marker, color="C2" if marker == "s" else "C3", label=name, markersize=5)
            ceiling = next(row for row in rows if row["estimator"].startswith("SDE"))
            axis.axhline(ceiling["r"], color="0.4", linestyle="--", linewidth=1, label=f"SDE {self.rollout_steps}")
            axis.set(xscale="log", xlabel="network evaluations of a draw", title=f"t = {t:g}")
            log_ticks(axis.xaxis, 6, sorted({*self.model_steps, *self.glass_steps}))
        axes[0].set_ylabel("Pearson r with the reference")
        axes[0].legend(fontsize=8)
        _save(figure, path)

    def _draw_scatter(self, path: Path) -> None:
        from matplotlib.figure import Figure

        names = [name for t, name in self._values if t == self.times[0]]
        wanted = [f"MFM {min(self.model_steps)}", f"GLASS {min(self.glass_steps)}", f"GLASS {max(self.glass_steps)}"]
        names = [name for name in names if name in (*wanted, f"SDE {self.rollout_steps}", POINT, "network")]
        R, C = len(self.times), len(names)
        figure = Figure(figsize=(2.3 * C, 2.3 * R + 0.4), layout="constrained")
        axes = figure.subplots(R, C, squeeze=False)
        for i, t in enumerate(self.times):
            for j, name in enumerate(names):
                values, reference = self._values[t, name]
                axis, row = axes[i, j], next(r for r in self._rows if (r["t"], r["estimator"]) == (t, name))
                axis.scatter(reference, values[0], s=6, linewidths=0)
                ends = [float(reference.min()), float(reference.max())]
                axis.plot(ends, ends, color="0.6", linewidth=1)
                axis.set_title(f"{name}, t = {t:g}: r = {row['r']:.3f}", fontsize=8)
                axis.tick_params(labelsize=7)
                if j == 0:
                    axis.set_ylabel("estimate", fontsize=8)
                if i == R - 1:
                    axis.set_xlabel("reference", fontsize=8)
        _save(figure, path)


class _NetworkValue(ValueEstimator):
    """The amortised network's value, without its gradient."""

    def __init__(self, network: ValueNetwork) -> None:
        self.network = network

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        value = target.meter.counted("network", self.network)(as_times(t, x), x, target.expand(x).conditions)
        return Estimate(None, value, torch.ones_like(value))


def _is_trained(module: ValueModule) -> bool:
    return module.global_step > 0 or module.trainer.ckpt_path is not None


def _row(t: float, name: str, draws: int, found: ValueEstimates, reference: Tensor) -> dict[str, Any]:
    errors = ValueErrors.of(found.values.cpu(), reference)
    steps = name.rpartition(" ")[2]
    return {
        "t": t,
        "estimator": name,
        "evaluations": int(steps) if steps.isdigit() else 1,  # of the network, for a draw
        "draws": draws,
        "NFE": round(found.nfe),  # of a value, with those of the reward
        "r": errors.r.value,
        "r low": errors.r.low,
        "r high": errors.r.high,
        "bias": errors.bias.value,
        "variance": errors.variance,
        "RMSE": errors.squared.value**0.5,
        "ESS": found.ess,
    }


def _save(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
