"""Weighted Diamond Maps (Holderrieth et al., arXiv 2602.05993): posterior and value from a plain two-time flow map.

A plain flow map X_{t',1} has no posterior draws: it is a function of the state. Renoising x_t to an earlier time t'
makes it random, and importance weights make it consistent. X_{t',1} carries p_{t'} to the data, so for any proposal q

    E[f(X1) | x_t] = E_q[w(z) f(X_{t',1}(z))] / E_q[w(z)],
    w(z) = p_{t'}(z) N(x_t; t X_{t',1}(z), (1-t)^2 I) / q(z | x_t).

The proposal is the noising process, z = a (x_t + (1-t) sqrt(lambda - 1) eps), from the signal-to-noise ratio
SNR(t) = t^2/(1-t)^2 to SNR(t') = SNR(t) / lambda, with a = 1 / (t + (1-t) sqrt(lambda)) and t' = t a. log p_{t'} is the
line integral of its score, (t' b - z)/(1-t'), from the proposal's centre to z, by Gauss-Legendre nodes: at one time, so
that it is exact in the limit of nodes. The weights are derived here in this form; the paper's released code has other
approximations of the integral and of the likelihood. A Meta Flow Map's plain flow map is that at t = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.memory import by_memory
from mfm_lightning.alignment.method import positive
from mfm_lightning.alignment.posteriors import Posterior, further_noise
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import Estimate, GradientEstimator, chunks, effective_sample_size
from mfm_lightning.interpolant import Generators, Times, as_times, expand, rand, randn, score
from mfm_lightning.utils.row_budget import MaxRows, check_max_rows


def renoising(t: Tensor, snr_factor: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """t', and the factors of x_t and of the noise in z = a x_t + d eps, of times t `(B,)`; finite at t = 0.

    Args:
        t: times `(B,)`.
        snr_factor: lambda; where None, 2 + 1/SNR(t). With it the proposal is the posterior's own for data N(0, I), and
            all weights are equal: t'^2 / (t'^2 + (1-t')^2) is the square of t^2 / (t^2 + (1-t)^2).
    """
    noise = 1 - t
    if snr_factor is None:  # both of a's terms times t: (1-t) sqrt(lambda) has no limit at t = 0
        whole = t.square() + noise * (2 * t.square() + noise.square()).sqrt()
        return t.square() / whole, t / whole, noise * (t.square() + noise.square()).sqrt() / whole
    whole = t + noise * snr_factor**0.5
    return t / whole, 1 / whole, noise * (snr_factor - 1) ** 0.5 / whole


def weighted_draws(
    target: Target, t: Tensor, x_t: Tensor, eps: Tensor, snr_factor: float | None = None, nodes: int = 1
) -> tuple[Tensor, Tensor]:
    """Draws x1 = X_{t',1}(z) `(B, N, *shape)`, and the logarithms of their weights `(B, N)`, up to a constant of x_t.

    Differentiable in x_t where that is asked for: log p_{t'}(z) then has the score at z for its gradient, whatever the
    nodes, which takes one more evaluation a draw. The constant's gradient is left out: of two log-sum-exps of the
    same draws it cancels in the difference.

    Args:
        target: the flow map, and the reward.
        t: times `(B,)`.
        x_t: states `(B, *shape)`.
        eps: standard normal noise `(B, N, *shape)`.
        snr_factor: as in `DiamondDraws`.
        nodes: as in `DiamondDraws`.
    """
    N, (time, shrink, spread) = eps.shape[1], renoising(t, snr_factor)
    step = expand(spread, eps) * eps
    z = expand(shrink, eps) * x_t[:, None] + step
    flat, s = z.flatten(0, 1), time.repeat_interleave(N)
    target = target.expand(flat)
    x1 = target.base_flow_map(s, 1.0, flat).reshape(eps.shape)

    def score_at(points: Tensor) -> Tensor:
        with torch.no_grad():
            points = points.detach().flatten(0, 1)
            return score(s, points, target.drift(s, points)).reshape(eps.shape)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(2).sum(dim=2)

    log_weights = product(eps, eps) / 2  # -log q
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        back = (1 - float(node)) / 2  # from z
        log_weights = log_weights + float(weight) / 2 * product(score_at(z - back * step), step)
    if torch.is_grad_enabled() and x_t.requires_grad:
        log_weights = log_weights + product(score_at(z), z - z.detach())
    residual = (x_t[:, None] - expand(t, eps) * x1) / expand((1 - t).clamp_min(1e-4), eps)
    return x1, log_weights - product(residual, residual) / 2


@dataclass
class DiamondDraws:
    """Weighted draws from a plain flow map, by renoising (arXiv 2602.05993; see `mfm_lightning.alignment.diamond`).

    Args:
        num_draws: N, at least 2: draws are weighed against each other.
        snr_factor: lambda, above 1: the state is renoised to the time whose signal-to-noise ratio is so many times
            lower. Where None, it is 2 + 1/SNR(t), with which all weights are equal for data N(0, I).
        nodes: Gauss-Legendre nodes of log p_{t'}, at least 1; each is one evaluation of the drift a draw.
        max_rows: memory budget, at most so many draws at once, and at least `num_draws`; the result does not depend on
            it. "auto" finds the most that a GPU has room for.

    Raises:
        ValueError: for a number out of range.
    """

    num_draws: int = 16
    snr_factor: float | None = None
    nodes: int = 1
    max_rows: MaxRows | None = None
    needs_flow_map = True

    def __post_init__(self) -> None:
        check_max_rows(self.max_rows)
        if self.num_draws < 2:
            raise ValueError(f"draws are weighed against each other: num_draws {self.num_draws} must be at least 2")
        check_renoising(self.snr_factor, self.nodes)
        if isinstance(self.max_rows, int) and self.max_rows < self.num_draws:
            raise ValueError(
                f"max_rows {self.max_rows} is below num_draws {self.num_draws}: the weighted draws of a state are made "
                "together"
            )

    @property
    def fewest_rows(self) -> int:
        """Those of one state, which are made together."""
        return self.num_draws


def check_renoising(snr_factor: float | None, nodes: int) -> None:
    """Raise ValueError for a number out of range."""
    positive(nodes=nodes)
    if snr_factor is not None and not (math.isfinite(snr_factor) and snr_factor > 1):
        raise ValueError(f"snr_factor {snr_factor} must be a number above 1: a state is renoised to an earlier time")


@dataclass
class DiamondGradient(DiamondDraws, GradientEstimator):
    """The value log (sum_i w_i e^{r_i} / sum_i w_i) of weighted draws, differentiated through flow map, weights and
    reward, the noise fixed.

    The paper takes the score of x_t for the gradient of the second sum's logarithm, of which it is the limit. That of
    the same draws is taken here: a constant reward then has no gradient.

    Network evaluations a draw: `nodes` + 3. Near t = 0 steering takes the product of `DiamondGradientFree`, from the
    same draws.
    """

    needs_reward_gradient = True
    looks_ahead = True

    @by_memory
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        eps, t, parts, best = _noise(self, x, generator), as_times(t, x), [], Best(x)
        for part, rows, _ in chunks(target, x, self.num_draws, self.max_rows):
            with torch.enable_grad():
                state = x[rows].detach().requires_grad_()
                x1, log_weights = weighted_draws(part, t[rows], state, eps[rows], self.snr_factor, self.nodes)
                r = part.rewards(x1.flatten(0, 1)).reshape(log_weights.shape)
                value = (log_weights + r).logsumexp(dim=1) - log_weights.logsumexp(dim=1)
                (gradient,) = torch.autograd.grad(value.sum(), state)
            best.update(x1, r, rows)
            parts.append(_estimate(t[rows], x1.detach(), log_weights.detach(), r.detach(), gradient))
        return _joined(parts, best)


@dataclass
class DiamondGradientFree(DiamondDraws, GradientEstimator):
    """The value log (sum_i w_i e^{r_i} / sum_i w_i) of weighted draws, and the product
    (sigma^2/2) grad V = (E'[x1] - E[x1]) / (1-t) with E under the weights w, E' under w e^r: no gradient of network or
    reward is taken.

    Network evaluations a draw: `nodes` + 1.
    """

    looks_ahead = True

    @by_memory
    @torch.no_grad()
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        eps, t, parts, best = _noise(self, x, generator), as_times(t, x), [], Best(x)
        for part, rows, _ in chunks(target, x, self.num_draws, self.max_rows):
            x1, log_weights = weighted_draws(part, t[rows], x[rows], eps[rows], self.snr_factor, self.nodes)
            r = part.rewards(x1.flatten(0, 1)).reshape(log_weights.shape)
            best.update(x1, r, rows)
            parts.append(_estimate(t[rows], x1, log_weights, r))
        return _joined(parts, best)


def _noise(draws: DiamondDraws, x: Tensor, generator: Generators) -> Tensor:
    return randn((len(x), draws.num_draws, *x.shape[1:]), x, generator)


def _estimate(t: Tensor, x1: Tensor, log_weights: Tensor, r: Tensor, gradient: Tensor | None = None) -> Estimate:
    """Of weighted draws x1 `(B, N, *shape)`; the gradient is the product's where None."""
    tilted = log_weights + r
    difference = (tilted.softmax(dim=1) - log_weights.softmax(dim=1)).to(x1.dtype)
    noise_left = (1 - t).clamp_min(1e-4)
    steering = torch.einsum("bn,bn...->b...", difference, x1) / expand(noise_left, x1[:, 0])
    if gradient is None:
        gradient = expand(t / noise_left, steering) * steering
    value = (tilted.logsumexp(dim=1) - log_weights.logsumexp(dim=1)).float()
    ess, posterior_ess = (effective_sample_size(w).float() for w in (tilted, log_weights))
    return Estimate(gradient, value, ess, steering=steering, posterior_ess=posterior_ess)


def _joined(parts: list[Estimate], best: Best) -> Estimate:
    names = ("gradient", "value", "ess", "steering", "posterior_ess")
    return Estimate(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, best=best)


class DiamondPosterior(Posterior):
    """Draws by resampling: of `num_proposals` weighted draws of a plain flow map, one is taken by its weight. Their
    distribution tends to the posterior's as proposals grow in number. Not differentiable.

    The first proposal is made of the inner noise; the others' noise, and the choice, follow from it.

    Args:
        num_proposals: flow-map evaluations of a draw, at least 2.
        snr_factor: lambda, above 1, by which the signal-to-noise ratio is lowered; 2 + 1/SNR(t) where None.
        nodes: Gauss-Legendre nodes of log p_{t'}, at least 1; each is one evaluation of the drift a proposal.

    Raises:
        ValueError: for a number out of range.
        TypeError: when called, if a gradient in the state is asked for.
    """

    needs_flow_map = True
    differentiable = False

    def __init__(self, num_proposals: int = 16, snr_factor: float | None = None, nodes: int = 1) -> None:
        if num_proposals < 2:
            raise ValueError(f"a draw is chosen among proposals: num_proposals {num_proposals} must be at least 2")
        check_renoising(snr_factor, nodes)
        self.num_proposals, self.snr_factor, self.nodes = num_proposals, snr_factor, nodes

    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x_t.requires_grad:
            raise TypeError(
                "draws of a DiamondPosterior have no gradient: use DiamondGradient, or DrawGradientFree with them"
            )
        B, N, K = *noise.shape[:2], self.num_proposals
        own, first = further_noise(noise), noise.flatten(0, 1)[:, None]
        others = randn((B * N * (K - 1), *x_t.shape[1:]), x_t, own).reshape(B * N, K - 1, *x_t.shape[1:])
        eps = torch.cat([first, others], dim=1).reshape(B, N * K, *x_t.shape[1:])
        with torch.no_grad():
            x1, log_weights = weighted_draws(target, as_times(t, x_t), x_t, eps, self.snr_factor, self.nodes)
        cumulative = log_weights.reshape(B * N, K).double().softmax(dim=1).cumsum(dim=1)
        points = rand(B * N, x_t, own)[:, None] * cumulative[:, -1:]
        which = torch.searchsorted(cumulative, points, right=True).clamp_max(K - 1)[:, 0]
        proposals = x1.reshape(B * N, K, *x_t.shape[1:])
        return proposals[torch.arange(B * N, device=x_t.device), which].reshape(noise.shape)
