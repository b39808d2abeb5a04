"""Estimators of the value V_t(x) against a reference: exact where an oracle gives it, else rollouts of the base SDE."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, Posterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DenoisedValue, DrawValue, Estimate, ValueEstimator
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.interpolant import as_times, interpolate
from mfm_lightning.oracles import require_linear_gaussian
from mfm_lightning.utils.console import track, write_table

log = logging.getLogger(__name__)

REFERENCES = ("auto", "exact", "rollouts")


class ValueEvaluation(Evaluation):
    """Pearson r over states, bias and variance of value estimators, by outer time; a table and two figures.

    States are noised test data. Estimators: draws of the flow map, of the GLASS ODE and of the base SDE, the reward of
    the denoised state (the point estimate of DPS), and the amortised network where it has been trained. All of them
    use the target's base flow. The paper's setting: 200 draws, 200 rollouts of 200 steps, t = 0.1, 0.2, 0.3, 0.5.

    Args:
        times: outer times t.
        num_states: states for each time.
        num_draws: draws of an estimate, and rollouts of a reference value.
        num_repeats: independent estimates of each state's value, for the variance.
        model_steps: flow-map steps; glass_steps: Euler steps of the GLASS ODE; rollout_steps: of the SDE.
        rollout_draws: rollouts of the SDE's own estimate, which is the dearest.
        reference: "exact" (the DataModule's oracle), "rollouts", or "auto": the former where there is an oracle.
        use_labels: condition states on their classes.
        max_rows: at most so many draws in memory at once.
        seed: of states and draws.

    Raises:
        ValueError: for an unknown reference.
    """

    def __init__(
        self,
        times: list[float] = (0.1, 0.2, 0.3, 0.5),
        num_states: int = 64,
        num_draws: int = 200,
        num_repeats: int = 2,
        model_steps: list[int] = (1, 2, 4),
        glass_steps: list[int] = (1, 2, 4, 8, 16),
        rollout_steps: int = 200,
        rollout_draws: int = 50,
        reference: str = "auto",
        use_labels: bool = False,
        max_rows: int = 1024,
        seed: int = 0,
    ) -> None:
        if reference not in REFERENCES:
            raise ValueError(f"unknown reference {reference!r}: expected one of {', '.join(REFERENCES)}")
        self.times, self.num_states, self.num_draws, self.num_repeats = tuple(times), num_states, num_draws, num_repeats
        self.model_steps, self.glass_steps, self.rollout_steps = tuple(model_steps), tuple(glass_steps), rollout_steps
        self.rollout_draws, self.reference, self.use_labels, self.max_rows = (
            rollout_draws,
            reference,
            use_labels,
            max_rows,
        )
        self.seed = seed
        self._rows: list[dict[str, Any]] = []
        self._values: dict[tuple[float, str], tuple[Tensor, Tensor]] = {}

    def check(self, module) -> None:
        oracle, settings = getattr(module.trainer.datamodule, "oracle", None), module.target.settings
        if self.reference == "exact" and oracle is None:
            raise ValueError("reference 'exact' needs a DataModule with an oracle: use 'rollouts'")
        if self._is_exact(module):
            require_linear_gaussian(module.target.reward)
            if settings.reward_scale != 1:
                raise ValueError(f"the exact value is for reward_scale 1, not {settings.reward_scale}: use 'rollouts'")
        module.target.check_labels(self.use_labels)

    def _is_exact(self, module) -> bool:
        return self.reference != "rollouts" and getattr(module.trainer.datamodule, "oracle", None) is not None

    @torch.no_grad()
    def measure(self, module, folder: Path) -> None:
        exact = self._is_exact(module)
        x1, label = self._states(module)
        target = module.target(Conditions(label=label) if self.use_labels else None)
        network = module.network if _is_trained(module) else None
        if network is None:
            log.info("the amortised network is not trained (fit it, and give --ckpt_path): it is not in the table")
        self._rows, self._values = [], {}
        estimators = self._estimators(network)
        jobs = [(t, name) for t in self.times for name in ("reference", *estimators)]
        for t, name in track(jobs, describe=lambda job: f"t = {job[0]}: {job[1]}"):
            x = interpolate(as_times(t, x1), torch.randn(x1.shape, generator=self._generator(1)).to(x1), x1)
            if name == "reference" and exact:
                reference = module.trainer.datamodule.oracle.value(x, t, target.reward).float()
            elif name == "reference":
                reference = self._from_draws(RolloutPosterior(self.rollout_steps, generator=self._generator(2)))(
                    target, t, x, self._generator(3)
                ).value
            else:
                evaluations, draws, estimate = estimators[name]
                generator = self._generator(4)
                # an estimate without draws is the same each time
                repeats = self.num_repeats if draws > 1 else 1
                target.meter = Meter()
                found = [estimate(target, t, x, generator) for _ in range(repeats)]
                nfe = target.meter.total / (len(x) * repeats)
                values, ess = torch.stack([e.value for e in found]), torch.stack([e.ess for e in found]).mean().item()
                self._values[t, name] = (values.cpu(), reference.cpu())
                self._rows.append(_row(t, name, evaluations, draws, nfe, values.cpu(), reference.cpu(), ess, self.seed))
        for row in self._rows:
            module.log(f"test/pearson_r/{row['estimator']}/t={row['t']}", row["r"], rank_zero_only=True)
        kind = "the exact value" if exact else f"{self.num_draws} SDE rollouts of {self.rollout_steps} steps"
        title = f"Value estimates against {kind}: {self.num_states} states, {self.num_draws} draws each"
        shown = [
            {
                "t": f"{row['t']:g}",
                "estimator": row["estimator"],
                "NFE": row["NFE"],
                "Pearson r (95 %)": f"{row['r']:.3f} ({row['r low']:.3f} to {row['r high']:.3f})",
                "bias": f"{row['bias']:+.3f}",
                "variance": f"{row['variance']:.4f}",
                "ESS": f"{row['ESS']:.0f}",
            }
            for row in self._rows
        ]
        write_table(self._rows, title, folder, "value_estimates", shown=shown)

    def draw(self, module, folder: Path) -> None:
        if not self._rows:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._draw_correlation(folder / "r_against_nfe")
        self._draw_scatter(folder / "scatter")

    def _states(self, module) -> tuple[Tensor, Tensor]:
        x1, label = module.trainer.datamodule.splits["test"]
        pick = torch.randperm(len(x1), generator=self._generator())[: self.num_states]
        return x1[pick].to(module.device), label[pick].to(module.device)

    def _estimators(self, network) -> dict[str, tuple[int, int, Callable[..., Estimate]]]:
        """By name: network evaluations of a draw, number of draws, and the estimator."""
        N = self.num_draws
        found = {f"MFM {k}": (k, N, self._from_draws(FlowMapPosterior(k))) for k in self.model_steps}
        found |= {f"GLASS {k}": (k, N, self._from_draws(GlassPosterior(k))) for k in self.glass_steps}
        rollouts = RolloutPosterior(self.rollout_steps, generator=self._generator(5))
        estimate = self._from_draws(rollouts, self.rollout_draws)
        found[f"SDE {self.rollout_steps}"] = (self.rollout_steps, self.rollout_draws, estimate)
        found["DPS point"] = (1, 1, DenoisedValue())
        if network is not None:

            def amortised(target: Target, t: float, x: Tensor, generator: torch.Generator) -> Estimate:
                given = target.expand(x).conditions
                value = target.meter.counted("network", network)(as_times(t, x), x, given)
                return Estimate(None, value, torch.ones_like(value))

            found["network"] = (1, 1, amortised)
        return found

    def _from_draws(self, posterior: Posterior, num_draws: int | None = None) -> ValueEstimator:
        return DrawValue(num_draws or self.num_draws, posterior, max_rows=self.max_rows)

    def _generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + offset)

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
            for name, marker in (("DPS point", "s"), ("network", "^")):
                for row in (row for row in rows if row["estimator"] == name):
                    axis.plot(1, row["r"], marker, color="C2" if marker == "s" else "C3", label=name, markersize=5)
            ceiling = next(row for row in rows if row["estimator"].startswith("SDE"))
            axis.axhline(ceiling["r"], color="0.4", linestyle="--", linewidth=1, label=f"SDE {self.rollout_steps}")
            axis.set(xscale="log", xlabel="network evaluations of a draw", title=f"t = {t:g}")
            axis.set_xticks(ticks := sorted({*self.model_steps, *self.glass_steps}), [str(k) for k in ticks])
            axis.minorticks_off()
        axes[0].set_ylabel("Pearson r with the reference")
        axes[0].legend(fontsize=8)
        _save(figure, path)

    def _draw_scatter(self, path: Path) -> None:
        from matplotlib.figure import Figure

        names = [name for t, name in self._values if t == self.times[0]]
        wanted = [f"MFM {min(self.model_steps)}", f"GLASS {min(self.glass_steps)}", f"GLASS {max(self.glass_steps)}"]
        names = [name for name in names if name in (*wanted, f"SDE {self.rollout_steps}", "DPS point", "network")]
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


def _is_trained(module) -> bool:
    return module.global_step > 0 or module.trainer.ckpt_path is not None


def _row(
    t, name, evaluations, draws, nfe: float, values: Tensor, reference: Tensor, ess: float, seed: int
) -> dict[str, Any]:
    r, low, high = _correlation(values, reference, seed)
    error = values - reference
    return {
        "t": t,
        "estimator": name,
        "evaluations": evaluations,  # of the network, for a draw
        "draws": draws,
        "NFE": round(nfe),  # of a value, with those of the reward
        "r": r,
        "r low": low,
        "r high": high,
        "bias": error.mean().item(),
        "variance": values.var(dim=0).mean().item() if len(values) > 1 else 0.0,
        "RMSE": error.square().mean().sqrt().item(),
        "ESS": ess,
    }


def _correlation(values: Tensor, reference: Tensor, seed: int) -> tuple[float, float, float]:
    """Pearson r over states, mean over repeats, with a 95 % bootstrap interval over states."""
    from scipy.stats import bootstrap, pearsonr

    def mean_r(*columns, axis: int) -> np.ndarray:
        *estimates, wanted = columns
        return np.mean([pearsonr(v, wanted, axis=axis).statistic for v in estimates], axis=0)

    data = (*values.double().numpy(), reference.double().numpy())
    if any(np.ptp(column) == 0 for column in data):  # no correlation with what does not vary
        return (float("nan"),) * 3
    interval = bootstrap(
        data, mean_r, paired=True, vectorized=True, method="percentile", n_resamples=2000,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(mean_r(*data, axis=-1)), float(interval.low), float(interval.high)


def _save(figure, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
