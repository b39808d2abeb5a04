"""Posterior draws and value estimates by name, and how good they are: for evaluations here and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawValue, ValueEstimator
from mfm_lightning.interpolant import Generators, as_times, interpolate, randn
from mfm_lightning.metrics.distances import correlation, sliced_wasserstein
from mfm_lightning.metrics.measured import Measured, mean_of

POINT = "DPS point estimate"  # the reward of the denoised state


@dataclass
class DrawSettings:
    """Which draws are looked at, at which noisy states.

    Args:
        times: outer times t.
        num_states: noisy states for each time.
        num_draws: draws of each state, and rollouts of its reference.
        model_steps: flow-map steps of a draw, "MFM k".
        glass_steps: Euler steps of the GLASS ODE, "GLASS k".
        rollout_steps: Euler-Maruyama steps of the base SDE.
        max_rows: at most so many draws in memory at once.
    """

    times: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5])
    num_states: int = 32
    num_draws: int = 128
    model_steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    glass_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    rollout_steps: int = 200
    max_rows: int = 1024

    def value_estimators(self) -> dict[str, DrawValue]:
        """Values from the draws of each of `posteriors`, by the same names."""
        found = posteriors(self.model_steps, self.glass_steps)
        return {name: DrawValue(self.num_draws, source, max_rows=self.max_rows) for name, source in found.items()}


def posteriors(model_steps: Sequence[int], glass_steps: Sequence[int]) -> dict[str, Posterior]:
    """Sources of draws by name: "MFM k" of k flow-map steps, "GLASS k" of k steps of the GLASS ODE."""
    found: dict[str, Posterior] = {f"MFM {k}": FlowMapPosterior(k) for k in model_steps}
    return found | {f"GLASS {k}": GlassPosterior(k) for k in glass_steps}


def noisy_states(x1: Tensor, t: float, generator: Generators) -> Tensor:
    """`x_t` of clean states `(B, *shape)`; the same noise at all times, given a fresh generator."""
    return interpolate(as_times(t, x1), randn(x1.shape, x1, generator), x1)


@torch.no_grad()
def draw(source: Posterior, target: Target, t: float, x_t: Tensor, noise: Tensor, max_rows: int = 1024) -> Tensor:
    """Draws `(B, N, *shape)`, some states at once.

    Args:
        x_t: noisy states `(B, *shape)`.
        noise: inner noise `(B, N, *shape)`.
        max_rows: at most so many draws in memory at once, and those of one state at least.
    """
    rows = torch.arange(len(x_t)).split(max(1, max_rows // noise.shape[1]))
    target = target.expand(x_t)
    return torch.cat([source(target.take(part), t, x_t[part], noise[part]) for part in rows])


def draw_distance(draws: Tensor, reference: Tensor, num_projections: int, seed: int) -> Tensor:
    """Sliced W2 between draws and reference draws of each state, both `(B, N, *shape)`: `(B,)`, on the CPU.

    Args:
        seed: of the directions.
    """
    a, b = (x.cpu().flatten(2) for x in (draws, reference))
    return sliced_wasserstein(a, b, num_projections, torch.Generator().manual_seed(seed))


@dataclass
class ValueEstimates:
    """What an estimator says of states.

    values: `(k, B)`, of k repeats; each_ess: effective numbers of draws, `(k, B)`; nfe: evaluations for one value.
    """

    values: Tensor
    each_ess: Tensor
    nfe: float

    @property
    def ess(self) -> float:
        """The mean effective number of draws."""
        return self.each_ess.mean().item()


@torch.no_grad()
def estimate_values(
    estimator: ValueEstimator, target: Target, t: float, x: Tensor, generator: Generators, repeats: int = 1
) -> ValueEstimates:
    """V_t(x) at states `(B, *shape)`, as often as wanted, each time with other noise of the generator; of one for each
    state, an estimate depends on its state alone."""
    target.meter = Meter()
    found = [estimator(target, t, x, generator) for _ in range(repeats)]
    values, ess = (torch.stack([getattr(e, name) for e in found]) for name in ("value", "ess"))
    return ValueEstimates(values, ess, target.meter.total / (len(x) * repeats))


@dataclass
class ValueErrors:
    """Estimates against reference values, with intervals over states.

    r: Pearson's, mean over repeats; bias: mean error; squared: mean squared error; variance: of a state's estimates
    over repeats, None of a single one, which does not tell it.
    """

    r: Measured
    bias: Measured
    squared: Measured
    variance: float | None

    @classmethod
    def of(cls, values: Tensor, reference: Tensor) -> ValueErrors:
        """Of estimates `(k, B)` and a reference `(B,)`."""
        error = values.double() - reference.double()
        variance = values.var(dim=0).mean().item() if len(values) > 1 else None
        bias, squared = mean_of(error.mean(dim=0)), mean_of(error.square().mean(dim=0))
        return cls(correlation(values, reference), bias, squared, variance)
