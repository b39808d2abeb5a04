"""Steered ODE and SDE: the base dynamics plus the gradient of the value (paper, section 3 and Algorithms 2-3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import GradientEstimator
from mfm_lightning.interpolant import as_times, diffusion, expand, randn, score

DYNAMICS = ("ode", "sde")


def time_grid(steps: int, start: float = 0.01, end: float = 1.0, power: float = 1.0) -> Tensor:
    """`steps + 1` times from `start` to `end`, uniform in u with t = u^power (power above 1: finer near noise).

    Raises:
        ValueError: unless steps >= 1, 0 <= start < end <= 1 and power > 0.
    """
    if steps < 1 or not 0 <= start < end <= 1 or power <= 0:
        raise ValueError(
            f"a time grid needs steps ({steps}) >= 1, 0 <= start ({start}) < end ({end}) <= 1 and power ({power}) > 0"
        )
    grid = torch.linspace(start ** (1 / power), end ** (1 / power), steps + 1, dtype=torch.float64) ** power
    grid[0], grid[-1] = start, end
    return grid


def steering_term(
    gradient: Tensor,
    drift: Tensor,
    half_diffusion: Tensor,
    strength: float = 1.0,
    renormalise: bool = False,
    clip: float | None = None,
) -> Tensor:
    """What is added to the base drift `(B, *shape)`: strength * (sigma^2/2) * gradient, with its remedies.

    Args:
        gradient: of the value; half_diffusion: sigma^2/2, `(B,)`.
        renormalise: instead give it the base drift's norm, sample by sample, times strength (Eq. 136).
        clip: largest norm of the term, in units of the base drift's norm.
    """
    term = expand(half_diffusion, gradient) * gradient
    base = expand(drift.flatten(1).norm(dim=1), drift)
    if renormalise:
        # a gradient of zero stays zero: there is no direction to go
        norm = expand(term.flatten(1).norm(dim=1), term)
        term = torch.where(norm > 0, term / norm.clamp_min(1e-20) * base, term)
    term = strength * term
    if clip is not None:
        norm = expand(term.flatten(1).norm(dim=1), term)
        term = term * (clip * base / norm.clamp_min(1e-20)).clamp_max(1.0)
    return term


@torch.no_grad()
def steer(
    target: Target,
    x0: Tensor,
    estimator: GradientEstimator,
    times: Tensor | Sequence[float] | None = None,
    dynamics: str = "ode",
    strength: float = 1.0,
    steer_from: float = 0.0,
    steer_to: float = 1.0,
    renormalise: bool = False,
    clip: float | None = None,
    max_diffusion: float = 25.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> AlignmentResult:
    """Generate from noise by the steered ODE, dx = (b + lambda sigma^2/2 grad V) dt, or SDE,
    dx = (b + sigma^2/2 score + lambda sigma^2 grad V) dt + sigma dW, with sigma^2/2 = (1-t)/t (Eq. 14).

    Args:
        x0: noise `(B, *shape)`, the state at the first time.
        estimator: of the gradient of V.
        times: grid; 100 uniform steps from 0.01 to 1 where None.
        strength: lambda; 0 gives the base sampler (and costs only its evaluations).
        steer_from, steer_to: steer only at times in [steer_from, steer_to].
        renormalise, clip: see `steering_term`.
        max_diffusion: clamp of sigma^2/2 near t=0.
        generator: of draws and of the SDE's noise.
        callback: called as `callback(k, x)` after each step.

    Raises:
        RewardError: before any work if the estimator needs a gradient that the reward has not got; while running if
            the reward fails, with the step, and the states so far as the error's `states`.
        ValueError: for unknown dynamics or a grid that does not increase.
    """
    if dynamics not in DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}: expected one of {', '.join(DYNAMICS)}")
    if estimator.needs_reward_gradient and strength:
        target.require_gradient(type(estimator).__name__)
    times = torch.as_tensor(time_grid(100) if times is None else times, dtype=torch.float64).tolist()
    if len(times) < 2 or any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"times must be at least two increasing numbers, got {times[:4]}...")
    run = Run(
        target, f"steered {dynamics}", estimator=type(estimator).__name__, steps=len(times) - 1, strength=strength,
        num_draws=getattr(estimator, "num_draws", None), renormalise=renormalise,
    )  # fmt: skip
    x = x0
    for k, (now, then) in enumerate(itertools.pairwise(times)):
        t, dt = as_times(now, x), then - now
        half = diffusion(t, max_diffusion)
        estimate = None
        if strength and steer_from <= now <= steer_to:
            with run.step(k, len(times) - 1, now, x):
                estimate = estimator(target, t, x, generator)
        b = target.drift(t, x) if estimate is None or estimate.drift is None else estimate.drift
        velocity = b if dynamics == "ode" else b + expand(half, x) * score(t, x, b)
        if estimate is not None:
            term = steering_term(estimate.gradient, b, half, strength, renormalise, clip)
            velocity = velocity + (term if dynamics == "ode" else 2 * term)
            size = term.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-20)
            run.note(now, value=estimate.value, ess=estimate.ess, steering_over_drift=size)
        previous, x = x, x + dt * velocity
        if dynamics == "sde" and then < 1:
            x = x + expand((2 * half * dt).sqrt(), x) * randn(x.shape, x, generator)
        if not torch.isfinite(x).all():
            bad = (~torch.isfinite(x).flatten(1).all(dim=1)).nonzero().flatten().tolist()
            failure = FloatingPointError(
                f"steering left the finite numbers at step {k + 1} (t = {then:.4g}) in samples {bad[:8]}: use more "
                "steps, a smaller strength, clip, or renormalise"
            )
            failure.states = previous
            raise failure
        if callback:
            callback(k, x)
    return run.finish(x)
