"""Sequential Monte Carlo: particles weighted by an estimate of the value, resampled as they move.

Feynman-Kac steering (Singhal et al., arXiv 2501.06848) moves them by the base process, twisted SMC (TDS; Wu et al.,
arXiv 2306.17775) by the steered one. Both are consistent: with many particles they sample the tilted distribution of
the discretised base process, whatever the estimate of the value; how many it takes depends on the estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import GlassPosterior, Posterior
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.steering import time_grid
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import (
    DPSGradient,
    Estimate,
    GradientEstimator,
    ValueEstimator,
    effective_sample_size,
)
from mfm_lightning.interpolant import as_times, diffusion, expand, randn, score

TRANSITIONS = ("sde", "glass")
KEEP = ("sample", "best", "all")


def systematic_resample(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices of resampled particles `(B, M)` in 0..M-1, for log-weights `(B, M)` of any normalisation.

    Systematic: one uniform number a row, so that a particle of weight w has floor(M w) or ceil(M w) copies.
    """
    B, M = log_weights.shape
    cumulative = log_weights.double().softmax(dim=1).cumsum(dim=1)
    cumulative[:, -1] = 1.0
    device = generator.device if generator is not None else log_weights.device
    first = torch.rand(B, 1, generator=generator, device=device, dtype=torch.float64).to(log_weights.device)
    points = (torch.arange(M, device=log_weights.device) + first) / M
    return torch.searchsorted(cumulative, points, right=True).clamp_max(M - 1)


def bridge(now: float, then: float, x: Tensor, x1: Tensor) -> tuple[Tensor, float]:
    """Mean `(B, *shape)` and variance of p(x_then | x_now, x1), for now <= then <= 1 and now < 1.

    The process is that of the base SDE: x_now given x_then is N((now/then) x_then, .), whatever x1.
    """
    ratio = now / then
    gap = (then - now) / then * (1 - now + ratio * (1 - then))  # (1-now)^2 - ratio^2 (1-then)^2, nothing cancels
    total = (1 - now) ** 2
    mean = (then * gap / total) * x1 + (ratio * (1 - then) ** 2 / total) * x
    return mean, (1 - then) ** 2 * gap / total


def check_particles(num_particles: int, ess_threshold: float, keep: str) -> None:
    """Raise ValueError if one of these is out of range."""
    if num_particles < 1:
        raise ValueError(f"num_particles {num_particles} must be at least 1")
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold {ess_threshold} must be in [0, 1]")
    if keep not in KEEP:
        raise ValueError(f"unknown keep {keep!r}: expected one of {', '.join(KEEP)}")


@torch.no_grad()
def feynman_kac(
    target: Target,
    x0: Tensor,
    value: ValueEstimator,
    num_particles: int = 8,
    times: Tensor | Sequence[float] | None = None,
    transition: str = "sde",
    posterior: Posterior | None = None,
    ess_threshold: float = 0.5,
    keep: str = "sample",
    max_diffusion: float = 25.0,
    generator: torch.Generator | None = None,
) -> AlignmentResult:
    """Feynman-Kac steering: M particles a sample move by the base process, weighted by the change of their value.

    Needs no gradient, so it takes black-box rewards (with a value estimator that takes them).

    Args:
        x0: noise `(B*M, *shape)`, particles of a sample next to each other; the states at the first time.
        value: estimator of V at a state. In the last step the reward itself is taken.
        num_particles: M.
        times: grid; 100 uniform steps from 0.01 to 1 where None.
        transition: "sde": Euler-Maruyama steps of the base SDE, the last one without noise; "glass": exact transitions
            p(x_t' | x_t), a posterior draw x1 and then the Gaussian p(x_t' | x_t, x1), for few, large steps.
        posterior: draws for the latter; 4 GLASS steps where None.
        ess_threshold: a sample's particles are resampled (systematically) where their effective number falls below
            this share of M. 0: never; 1: at each step.
        keep: what is returned of each sample: "sample", one particle drawn by weight; "best", the one of highest
            reward (biased upwards); "all", M particles, resampled by weight, `(B*M, *shape)`.
        max_diffusion: clamp of sigma^2/2 near t=0.
        generator: of all noise.

    Returns:
        The trace has the mean effective number of particles and of resamplings; `log_normaliser` `(B,)` estimates
        log E[e^r] (its exponential without bias, for the discretised base process).

    Raises:
        ValueError: for an unknown transition or `keep`, a threshold outside [0, 1], or particles that do not divide x0.
        RewardError: where the reward fails, with the step, and the states so far as the error's `states`.
    """
    if transition not in TRANSITIONS:
        raise ValueError(f"unknown transition {transition!r}: expected one of {', '.join(TRANSITIONS)}")
    settings = {"value": type(value).__name__, "transition": transition}
    move = _Glass(posterior or GlassPosterior(4)) if transition == "glass" else _SDE(max_diffusion)
    return _run("feynman_kac", settings, target, x0, value, move, num_particles, times, ess_threshold, keep, generator)


@torch.no_grad()
def twisted_smc(
    target: Target,
    x0: Tensor,
    estimator: GradientEstimator | None = None,
    num_particles: int = 8,
    times: Tensor | Sequence[float] | None = None,
    strength: float = 1.0,
    clip: float | None = None,
    ess_threshold: float = 0.5,
    keep: str = "sample",
    max_diffusion: float = 25.0,
    generator: torch.Generator | None = None,
) -> AlignmentResult:
    """Twisted SMC (TDS): M particles a sample move by the steered SDE; weights make up for what is wrong with it.

    Args:
        estimator: of V and its gradient; DPS where None, as in TDS.
        strength: factor of the proposal's steering; the weights account for it.
        clip: largest norm of a step's steering, in standard deviations of the step's noise times sqrt(dimension).
        others: as `feynman_kac`.

    Raises:
        RewardError: before any work if the estimator needs a gradient that the reward has not got.
    """
    estimator = estimator or DPSGradient()
    if estimator.needs_reward_gradient:
        target.require_gradient(f"twisted SMC with {type(estimator).__name__}")
    settings = {"estimator": type(estimator).__name__, "strength": strength}
    move = _SDE(max_diffusion, strength, clip)
    return _run(
        "twisted_smc", settings, target, x0, estimator, move, num_particles, times, ess_threshold, keep, generator
    )


class _SDE:
    """Euler-Maruyama steps, steered where the estimate has a gradient; gives log p/q of each."""

    def __init__(self, max_diffusion: float, strength: float = 0.0, clip: float | None = None) -> None:
        self.max_diffusion, self.strength, self.clip = max_diffusion, strength, clip

    def __call__(self, target: Target, now: float, then: float, x: Tensor, estimate: Estimate, generator):
        t, dt = as_times(now, x), then - now
        b = target.drift(t, x) if estimate.drift is None else estimate.drift
        half = diffusion(t, self.max_diffusion)
        mean = x + dt * (b + expand(half, x) * score(t, x, b))
        if then >= 1:  # without noise there is nothing to weigh a twist against
            return mean, x.new_zeros(len(x))
        noise, deviation = randn(x.shape, x, generator), expand((2 * half * dt).sqrt(), x)
        if not self.strength or estimate.gradient is None:
            return mean + deviation * noise, x.new_zeros(len(x))
        shift = self.strength * deviation * estimate.gradient  # in standard deviations of the step
        if self.clip is not None:
            largest = self.clip * x[0].numel() ** 0.5
            shift = shift * (largest / expand(shift.flatten(1).norm(dim=1), x).clamp_min(1e-20)).clamp_max(1.0)
        # N(x'; mean, s^2) / N(x'; mean + s shift, s^2) at x' = mean + s (shift + noise)
        log_ratio = -(shift * noise + shift.square() / 2).flatten(1).sum(dim=1)
        return mean + deviation * (shift + noise), log_ratio


class _Glass:
    """Exact transitions by a posterior draw and the Gaussian bridge to it."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def __call__(self, target: Target, now: float, then: float, x: Tensor, estimate: Estimate, generator):
        x1 = self.posterior(target, now, x, randn((len(x), 1, *x.shape[1:]), x, generator))[:, 0]
        mean, variance = bridge(now, then, x, x1)
        return mean + variance**0.5 * randn(x.shape, x, generator), x.new_zeros(len(x))


def _run(
    name, settings, target, x0, value, move, num_particles, times, ess_threshold, keep, generator
) -> AlignmentResult:
    check_particles(num_particles, ess_threshold, keep)
    if len(x0) % num_particles:
        raise ValueError(f"{len(x0)} states for {num_particles} particles a sample: give B*M states")
    times = torch.as_tensor(time_grid(100) if times is None else times, dtype=torch.float64).tolist()
    if len(times) < 2 or any(b <= a for a, b in itertools.pairwise(times)) or times[-1] != 1:
        raise ValueError(f"times must be increasing numbers that end at 1, got {times[:3]}...{times[-1]}")
    M, K, shape = num_particles, len(times) - 1, x0.shape[1:]
    run = Run(target, name, particles=M, steps=K, ess_threshold=ess_threshold, keep=keep, **settings)
    x, rows = x0, torch.arange(len(x0) // M, device=x0.device)[:, None]
    with run.step(0, K, times[0], x):
        estimate = value(target, times[0], x, generator)
    log_weights, log_normaliser = estimate.value.reshape(-1, M), 0.0
    for k, (now, then) in enumerate(itertools.pairwise(times)):
        ess = effective_sample_size(log_weights)
        poor = ess < ess_threshold * M * (1 + 1e-6)
        run.note(now, value=estimate.value, ess=ess, resampled=poor)
        if poor.any():
            index = torch.where(
                poor[:, None], systematic_resample(log_weights, generator), torch.arange(M, device=x.device)
            )
            flat = (rows * M + index).flatten()
            x, estimate = x[flat], _take(estimate, flat)
            mean = log_weights.logsumexp(dim=1, keepdim=True) - torch.tensor(M).log()
            log_normaliser = log_normaliser + torch.where(poor, mean[:, 0], 0.0)
            log_weights = torch.where(poor[:, None], 0.0, log_weights)
        before = estimate.value
        x, log_ratio = move(target, now, then, x, estimate, generator)
        with run.step(k, K, then, x):
            if then < 1:
                estimate = value(target, then, x, generator)
            else:
                reward = target.rewards(x)
                estimate = Estimate(None, reward, torch.ones_like(reward))
        log_weights = log_weights + (estimate.value - before + log_ratio).reshape(-1, M)
    log_normaliser = log_normaliser + log_weights.logsumexp(dim=1) - torch.tensor(M).log()
    run.note(1.0, value=estimate.value, ess=effective_sample_size(log_weights))
    if keep == "best":
        index = estimate.value.reshape(-1, M).argmax(dim=1, keepdim=True)
    else:
        index = systematic_resample(log_weights, generator)
        if keep == "sample":  # a random one of the resampled, which has the weights' distribution
            device = generator.device if generator is not None else x.device
            pick = torch.randint(M, (len(index), 1), generator=generator, device=device).to(x.device)
            index = index.gather(1, pick)
    return run.finish(x.reshape(-1, M, *shape)[rows, index].flatten(0, 1), log_normaliser)


def _take(estimate: Estimate, index: Tensor) -> Estimate:
    parts = {f.name: getattr(estimate, f.name) for f in fields(estimate)}
    return replace(estimate, **{k: v[index] for k, v in parts.items() if v is not None})
