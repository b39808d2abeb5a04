"""The fine-tuning objective MFM-FT (paper, Eq. 43): off-policy, unbiased with one posterior draw.

b_theta(t, x_t) regresses on sg[ b - (e^r - 1)(b_theta - b) + (sigma^2/2) grad e^r ]. Averaged over the draw, the target
equals b_theta where (b_theta - b) E[e^r | x_t] = (sigma^2/2) grad E[e^r | x_t]: at b + (sigma^2/2) grad V. That holds
with e^{r-c} for any c that does not depend on the draw, so that a normaliser c keeps e^r within range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import expand, randn

GRADIENTS = ("reward", "free")
MAX_LOG_WEIGHT = 12.0  # e^{r-c} ends here; reached only while the normaliser c is still far too low


class Tilt(NamedTuple):
    """weight: mean over draws of e^{r-c}, `(B,)`; gradient: unbiased for grad_x E[e^{r-c} | x_t = x], `(B, *shape)`;
    rewards: r of the draws (scaled, without the normaliser), `(B, N)`; product: unbiased for (1-t)/t times that
    gradient, in the gradient-free form, which is finite at t = 0, `(B, *shape)`."""

    weight: Tensor
    gradient: Tensor
    rewards: Tensor
    product: Tensor


def tilt_by_reward_gradient(
    target: Target,
    t: Tensor,
    x: Tensor,
    noise: Tensor,
    posterior: Posterior,
    log_normaliser: Callable[[Tensor], Tensor],
    base: Tensor,
) -> Tilt:
    """e^{r-c} differentiated through the draws, their noise fixed (as MFM-G, Eq. 22).

    Args:
        target: what draws come from, and the reward.
        t: outer times `(B,)`.
        x: outer states `(B, *shape)`.
        noise: of N draws, `(B, N, *shape)`.
        posterior: that draws x1.
        log_normaliser: a function of the rewards `(B, N)` that gives c, `(B,)`.
        base: b_t(x), `(B, *shape)`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x1 = posterior(target, t, x, noise)
        rewards = target.rewards(x1.flatten(0, 1)).reshape(noise.shape[:2])
        log_weights = rewards - log_normaliser(rewards.detach())[:, None]
        weight = log_weights.clamp_max(MAX_LOG_WEIGHT).exp().mean(dim=1)
        (gradient,) = torch.autograd.grad(weight.sum(), x)
    product = _product(t, x.detach(), base, x1.detach(), log_weights.detach().clamp_max(MAX_LOG_WEIGHT))
    return Tilt(weight.detach(), gradient, rewards.detach(), product)


@torch.no_grad()
def tilt_without_gradient(
    target: Target,
    t: Tensor,
    x: Tensor,
    noise: Tensor,
    posterior: Posterior,
    log_normaliser: Callable[[Tensor], Tensor],
    base: Tensor,
) -> Tilt:
    """The same for black-box rewards, by grad_x E[f(X1) | x] = t/(1-t)^2 Cov(f(X1), X1 | x) (as MFM-GF, Eq. 20).

    The score of the posterior in x is t (x1 - E[x1 | x]) / (1-t)^2, and the base flow gives E[x1 | x] = D_t(x) =
    x + (1-t) b_t(x). So (e^{r-c} - 1) t (x1 - D_t(x)) / (1-t)^2 is unbiased even from one draw; the -1, whose term has
    mean zero, takes away most of the noise.
    """
    x1 = posterior(target, t, x, noise)
    rewards = target.rewards(x1.flatten(0, 1)).reshape(noise.shape[:2])
    log_weights = (rewards - log_normaliser(rewards)[:, None]).clamp_max(MAX_LOG_WEIGHT)
    product = _product(t, x, base, x1, log_weights)
    gradient = expand(t / (1 - t).clamp_min(1e-3), x) * product
    return Tilt(log_weights.exp().mean(dim=1), gradient, rewards, product)


def _product(t: Tensor, x: Tensor, base: Tensor, x1: Tensor, log_weights: Tensor) -> Tensor:
    """Mean over draws of (e^{r-c} - 1) (x1 - D_t(x)) / (1-t), `(B, *shape)`: (1-t)/t grad_x E[e^{r-c} | x]."""
    centred = x1 - (x + expand(1 - t, x) * base)[:, None]
    mean = torch.einsum("bn,bn...->b...", log_weights.expm1().to(x.dtype), centred) / x1.shape[1]
    return mean / expand((1 - t).clamp_min(1e-3), x)


class Regression(NamedTuple):
    """errors: squared, `(B,)`, whose mean is the loss; policy: b_theta, with its graph, `(B, *shape)`; tilt, terms: of
    the target."""

    errors: Tensor
    policy: Tensor
    tilt: Tilt
    terms: tuple[Tensor, ...]


def regress(
    target: Target,
    t: Tensor,
    x: Tensor,
    base: Tensor,
    policy: Callable[[], Tensor],
    half_diffusion: Tensor,
    clamped: Tensor,
    posterior: Posterior,
    num_draws: int,
    log_normaliser: Callable[[Tensor], Tensor],
    gradient: str,
) -> Regression:
    """Eq. 43 at training states: b_theta's squared distance to its target, summed over a state's coordinates.

    Args:
        target: what draws come from, and the reward.
        t: outer times `(B,)`.
        x: outer states `(B, *shape)`.
        base: b_t(x), `(B, *shape)`.
        policy: gives b_theta(t, x), with a graph; called after the draws.
        half_diffusion: as of `finetuning_target`.
        clamped: as of `finetuning_target`.
        posterior: that draws x1.
        num_draws: draws for each state.
        log_normaliser: as of `tilt_by_reward_gradient`.
        gradient: one of `GRADIENTS`.
    """
    noise = randn((len(x), num_draws, *x.shape[1:]), x)
    tilted = tilt_by_reward_gradient if gradient == "reward" else tilt_without_gradient
    tilt = tilted(target, t, x, noise, posterior, log_normaliser, base)
    drift = policy()
    terms = finetuning_target(base, drift, tilt, half_diffusion, clamped)
    return Regression((drift - sum(terms)).float().flatten(1).square().sum(dim=1), drift, tilt, terms)


def control_cost(base: Tensor, policy: Tensor, half_diffusion: Tensor) -> Tensor:
    """|b_theta - b|^2 / (sigma^2/2), `(B,)`: what the policy's SDE spends per unit of time to leave the base SDE.

    By Girsanov its integral over t in (0, 1), averaged over the states of a process, is the KL divergence of that
    process from the other one: KL(policy || base) over the policy's states, KL(base || policy) over noised data. With
    sigma^2/2 = (1-t)/t the base SDE forgets its start, so that at b + (sigma^2/2) grad V these are KL(tilted || data)
    over noised samples of the tilted distribution, and KL(data || tilted) over noised data. Over other states it is
    neither.

    Args:
        base: b_t(x), `(B, *shape)`.
        policy: b_theta(t, x), `(B, *shape)`.
        half_diffusion: sigma^2/2, `(B,)`; counted as 0.05 where it is less, at times t above 0.95.
    """
    return (policy - base).flatten(1).square().sum(dim=1) / half_diffusion.clamp_min(0.05)


def finetuning_target(
    base: Tensor, policy: Tensor, tilt: Tilt, half_diffusion: Tensor, clamped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The three terms whose sum b_theta regresses on (Eq. 43): b, -(e^r - 1)(b_theta - b), (sigma^2/2) grad e^r.

    Args:
        base: b_t(x), `(B, *shape)`.
        policy: b_theta(t, x), `(B, *shape)`.
        tilt: e^r and its gradient, of the same states.
        half_diffusion: sigma^2/2, `(B,)`.
        clamped: where it is less than the (1-t)/t that is meant, `(B,)`: there the third term is the tilt's product,
            of which the clamp would take away a part. Nowhere where None.
    """
    policy = policy.detach()
    term = expand(half_diffusion, base) * tilt.gradient
    if clamped is not None:
        term = torch.where(expand(clamped, base), tilt.product, term)
    return base, -expand(tilt.weight - 1, base) * (policy - base), term
