"""The value V_t(x) = log E[e^{r(X1)} | X_t = x] and its gradient, estimated from posterior draws.

Gradient estimators take a target, a time and states, and give an `Estimate`; steering works with any of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import load_value
from mfm_lightning.interpolant import as_times, denoiser, expand, randn


@dataclass
class Estimate:
    """What an estimator found out at states `(B, *shape)`.

    gradient: of V, `(B, *shape)`, None from an estimator of the value alone; value: of V, `(B,)`; ess: effective number
    of draws, `(B,)`, in 1..N; drift: b_t(x), where the estimator had to compute it anyway.
    """

    gradient: Tensor | None
    value: Tensor
    ess: Tensor
    drift: Tensor | None = None


class ValueEstimator(ABC):
    """Estimates V at states; what gives no gradient of V needs none of the reward."""

    needs_reward_gradient: bool = False

    @abstractmethod
    def __call__(
        self, target: Target, t: Tensor | float, x: Tensor, generator: torch.Generator | None = None
    ) -> Estimate: ...


class GradientEstimator(ValueEstimator):
    """Estimates V and its gradient. `needs_reward_gradient`: refused before any work with a black-box reward."""


def log_mean_exp(rewards: Tensor, dim: int = -1) -> Tensor:
    """log (1/N sum_i e^{r_i}): the value estimate from N draws (paper, section 4)."""
    return rewards.logsumexp(dim) - math.log(rewards.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 and N, from unnormalised log-weights."""
    return (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()


def inner_noise(
    x: Tensor, num_draws: int, antithetic: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Noise for draws, `(B, N, *shape)`; antithetic: the second half is the negative of the first (N even)."""
    if num_draws < 1 or (antithetic and num_draws % 2):
        raise ValueError(f"num_draws ({num_draws}) must be at least 1, and even with antithetic noise")
    noise = randn((len(x), num_draws // 2 if antithetic else num_draws, *x.shape[1:]), x, generator)
    return torch.cat([noise, -noise], dim=1) if antithetic else noise


@torch.no_grad()
def estimate_value(
    target: Target,
    t: Tensor | float,
    x: Tensor,
    num_draws: int = 16,
    posterior: Posterior | None = None,
    antithetic: bool = False,
    max_rows: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """V_t(x) from `num_draws` posterior draws for each state, and the effective sample size; `(B,)` both.

    Args:
        posterior: source of draws; one step of the flow map where None.
        max_rows: at most so many draws in memory at once.
    """
    posterior = posterior or FlowMapPosterior()
    noise = inner_noise(x, num_draws, antithetic, generator)
    rewards = x.new_empty(len(x), num_draws, dtype=torch.float32)
    for part, rows, draws in _chunks(target, x, num_draws, max_rows):
        x1 = posterior(part, as_times(t, x)[rows], x[rows], noise[rows, draws])
        rewards[rows, draws] = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
    return log_mean_exp(rewards), effective_sample_size(rewards)


@dataclass
class DrawValue(ValueEstimator):
    """V from posterior draws; see `estimate_value`."""

    num_draws: int = 4
    posterior: Posterior | None = None
    antithetic: bool = False
    max_rows: int | None = None

    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        settings = (self.num_draws, self.posterior, self.antithetic, self.max_rows)
        return Estimate(None, *estimate_value(target, t, x, *settings, generator=generator))


class DenoisedValue(ValueEstimator):
    """r(D_t(x)): the posterior replaced by its mean; no gradient is taken. What Feynman-Kac steering is used with."""

    @torch.no_grad()
    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        t = as_times(t, x)
        drift = target.drift(t, x)
        value = target.rewards(denoiser(t, x, drift))
        return Estimate(None, value, torch.ones_like(value), drift)


@dataclass
class DrawGradient(GradientEstimator):
    """MFM-G (Eq. 22): the value estimate differentiated through the draws, their noise fixed. With a GLASS posterior:
    differentiated GLASS rollouts.

    num_draws: N; antithetic: pairs of opposite noise; max_rows: memory budget, at most so many draws at once (the
    result does not depend on it).
    """

    num_draws: int = 1
    posterior: Posterior | None = None
    antithetic: bool = False
    max_rows: int | None = None
    needs_reward_gradient = True

    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        posterior, t = self.posterior or FlowMapPosterior(), as_times(t, x)
        noise = inner_noise(x, self.num_draws, self.antithetic, generator)
        rewards = x.new_empty(len(x), self.num_draws, dtype=torch.float32)
        # gradients of chunks' log-sum-exps average, by the chunks' shares, to the gradient of the whole
        gradient, value = torch.zeros_like(x), torch.full((len(x),), -torch.inf, device=x.device)
        for part, rows, draws in _chunks(target, x, self.num_draws, self.max_rows):
            with torch.enable_grad():
                state = x[rows].detach().requires_grad_()
                x1 = posterior(part, t[rows], state, noise[rows, draws])
                r = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
                chunk = r.logsumexp(dim=1)
                (chunk_gradient,) = torch.autograd.grad(chunk.sum(), state)
            rewards[rows, draws] = r.detach()
            total = torch.logaddexp(value[rows], chunk.detach())
            before, now = (value[rows] - total).exp(), (chunk.detach() - total).exp()
            gradient[rows] = expand(before, x) * gradient[rows] + expand(now, x) * chunk_gradient
            value[rows] = total
        return Estimate(gradient, log_mean_exp(rewards), effective_sample_size(rewards))


@dataclass
class DrawGradientFree(GradientEstimator):
    """MFM-GF (Eq. 20), without a reward gradient: t / (1-t)^2 (sum_i w_i x1_i - mean_i x1_i), w = softmax r."""

    num_draws: int = 16
    posterior: Posterior | None = None
    antithetic: bool = False
    max_rows: int | None = None
    needs_reward_gradient = False

    def __post_init__(self) -> None:
        if self.num_draws < 2:
            raise ValueError(f"draws are weighed against each other: num_draws {self.num_draws} must be at least 2")

    @torch.no_grad()
    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        posterior, t = self.posterior or FlowMapPosterior(), as_times(t, x)
        noise = inner_noise(x, self.num_draws, self.antithetic, generator)
        rewards = x.new_empty(len(x), self.num_draws, dtype=torch.float32)
        drawn, drift = torch.empty_like(noise), None
        for part, rows, draws in _chunks(target, x, self.num_draws, self.max_rows):
            if self.max_rows is None:  # all in one chunk: the drift may come with the draws
                x1, drift = posterior.with_drift(part, t, x, noise)
            else:
                x1 = posterior(part, t[rows], x[rows], noise[rows, draws])
            drawn[rows, draws] = x1
            rewards[rows, draws] = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
        weights = rewards.softmax(dim=1).to(x.dtype) - 1 / self.num_draws
        shift = torch.einsum("bn,bn...->b...", weights, drawn)
        factor = t / (1 - t).clamp_min(1e-4) ** 2
        return Estimate(expand(factor, x) * shift, log_mean_exp(rewards), effective_sample_size(rewards), drift)


@dataclass
class DPSGradient(GradientEstimator):
    """The gradient of r(D_t(x)): the posterior replaced by its mean (Chung et al., arXiv 2209.14687)."""

    max_rows: int | None = None
    needs_reward_gradient = True

    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        t, parts = as_times(t, x), []
        for part, rows, _ in _chunks(target, x, 1, self.max_rows):
            with torch.enable_grad():
                state = x[rows].detach().requires_grad_()
                drift = part.drift(t[rows], state)
                value = part.rewards(denoiser(t[rows], state, drift))
                parts.append((torch.autograd.grad(value.sum(), state)[0], value.detach(), drift.detach()))
        gradient, value, drift = (torch.cat(p) for p in zip(*parts, strict=True))
        return Estimate(gradient, value, torch.ones_like(value), drift)


class NetworkGradient(GradientEstimator):
    """The gradient of an amortised value network V_phi(t, x, label): no draws, no reward.

    Args:
        network: the network, or the `.safetensors` file that fitting `ValueEstimation` exported.
    """

    needs_reward_gradient = False

    def __init__(self, network: torch.nn.Module | str) -> None:
        self.network = load_value(network) if isinstance(network, str) else network
        self.network.eval().requires_grad_(False)

    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        self.network.to(x.device)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            value = target.meter.counted("network", self.network)(as_times(t, x), state, target.labels(x))
            (gradient,) = torch.autograd.grad(value.sum(), state)
        return Estimate(gradient, value.detach(), torch.ones_like(value.detach()))


@dataclass
class ExactGradient(GradientEstimator):
    """An oracle's closed form: what all estimators are measured against."""

    oracle: object
    needs_reward_gradient = False

    def __call__(self, target: Target, t, x: Tensor, generator: torch.Generator | None = None) -> Estimate:
        t, label = as_times(t, x), target.labels(x)
        reward = (
            target.reward if target.reward_scale == 1 else lambda x1: target.reward_scale * target.plain_rewards(x1)
        )
        value = self.oracle.value(x, t, reward, label).float()
        return Estimate(self.oracle.value_gradient(x, t, reward, label), value, torch.ones_like(value))


ESTIMATORS = ("mfm_g", "mfm_gf", "glass_g", "glass_gf", "dps")


def gradient_estimator(
    name: str,
    num_draws: int = 1,
    posterior_steps: int = 1,
    antithetic: bool = False,
    max_rows: int | None = None,
) -> GradientEstimator:
    """An estimator by name: `mfm_g`, `mfm_gf`, `glass_g` (differentiated rollouts), `glass_gf`, `dps`.

    Args:
        num_draws: N (not of dps).
        posterior_steps: flow-map or GLASS steps of a draw.

    Raises:
        ValueError: for an unknown name, or a gradient-free estimate from fewer than two draws, which is zero.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown gradient estimator {name!r}: expected one of {', '.join(ESTIMATORS)}")
    if name == "dps":
        return DPSGradient(max_rows)
    posterior = FlowMapPosterior(posterior_steps) if name.startswith("mfm") else GlassPosterior(posterior_steps)
    kind = DrawGradientFree if name.endswith("_gf") else DrawGradient
    return kind(num_draws, posterior, antithetic, max_rows)


def _chunks(target: Target, x: Tensor, num_draws: int, max_rows: int | None):
    """Cover all pairs of a state and a draw with at most `max_rows` pairs at once: the target of some states, and the
    slices of states and draws."""
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows {max_rows} must be at least 1")
    draws = num_draws if max_rows is None else min(num_draws, max_rows)
    rows, target = len(x) if max_rows is None else max(1, max_rows // draws), target.for_states(x)
    for i in range(0, len(x), rows):
        part = target.take(slice(i, i + rows))
        for j in range(0, num_draws, draws):
            yield part, slice(i, i + rows), slice(j, j + draws)
