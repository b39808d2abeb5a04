"""The value V_t(x) = log E[e^{r(X1)} | X_t = x] and its gradient, estimated from posterior draws.

An estimator takes a target, a time and states, and gives an `Estimate`; steering and particle methods work with any.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.memory import by_memory
from mfm_lightning.alignment.method import positive
from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import load_value
from mfm_lightning.interpolant import Generators, Times, as_times, denoiser, expand, randn
from mfm_lightning.networks.decoders import Decoder, IdentityDecoder
from mfm_lightning.oracles import Likelihood, Oracle, scaled
from mfm_lightning.utils.row_budget import MaxRows, check_max_rows
from mfm_rewards import RewardError
from mfm_rewards.protocol import name_of

Chunk = tuple[Target, slice, slice]


@dataclass
class Estimate:
    """What an estimator found out at states `(B, *shape)`.

    Attributes:
        gradient: of V, `(B, *shape)`; None from an estimator of the value alone.
        steering: (sigma^2/2) grad V with sigma^2/2 = (1-t)/t, `(B, *shape)`, in a form that needs no clamp near t = 0:
            (E'[x1 | x] - E[x1 | x]) / (1-t), E' under the posterior tilted by e^r. None where there is no such form.
        value: of V, `(B,)`.
        ess: effective number of draws, `(B,)`, in 1..N.
        drift: b_t(x), `(B, *shape)`, where the estimator had to compute it anyway.
        posterior_ess: effective number of draws of the posterior itself, without the reward, `(B,)`, where draws have
            weights of their own.
        best: of the clean states that were scored for each state; None from an estimator that scores none.
    """

    gradient: Tensor | None
    value: Tensor
    ess: Tensor
    drift: Tensor | None = None
    steering: Tensor | None = None
    posterior_ess: Tensor | None = None
    best: Best | None = None


class ValueEstimator(ABC):
    """Estimates V at states; what gives no gradient of V needs none of the reward.

    Attributes:
        needs_reward_gradient: a black-box reward is refused before any work.
        looks_ahead: its estimates have a `best`: it scores clean states.
        needs_flow_map: a model with a drift alone is refused before any work.
    """

    needs_reward_gradient: bool = False
    looks_ahead: bool = False
    needs_flow_map: bool = False

    @property
    def needs_meta_flow_map(self) -> bool:
        """Whether posteriors are drawn from the model: a plain flow map is refused then, before any work."""
        return False

    @abstractmethod
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate: ...


class GradientEstimator(ValueEstimator):
    """Estimates V and its gradient. `needs_reward_gradient`: refused before any work with a black-box reward."""


def require_lookahead(estimator: ValueEstimator) -> None:
    """Raise ValueError unless an estimator scores clean states, of which the best can be returned."""
    if not estimator.looks_ahead:
        raise ValueError(
            f"return_best: a {type(estimator).__name__} scores no clean states: leave return_best out, or use an "
            "estimator that does, such as DrawGradient or DrawGradientFree"
        )


def log_mean_exp(rewards: Tensor, dim: int = -1) -> Tensor:
    """log (1/N sum_i e^{r_i}): the value estimate from N draws (paper, section 4)."""
    return rewards.logsumexp(dim) - math.log(rewards.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """(sum w)^2 / sum w^2, between 1 and N, from unnormalised log-weights."""
    return (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()


@dataclass
class Draws:
    """How an estimator draws from the posterior of a state.

    Args:
        num_draws: N, at least 1.
        posterior: source of the draws; one step of the flow map where None.
        antithetic: draw pairs of opposite noise; N must be even.
        max_rows: memory budget, at most so many draws at once; the result does not depend on it. "auto" finds the most
            that a GPU has room for.

    Raises:
        ValueError: for a number out of range.
    """

    num_draws: int = 1
    posterior: Posterior | None = None
    antithetic: bool = False
    max_rows: MaxRows | None = None

    def __post_init__(self) -> None:
        if self.num_draws < 1 or (self.antithetic and self.num_draws % 2):
            raise ValueError(f"num_draws ({self.num_draws}) must be at least 1, and even with antithetic noise")
        check_max_rows(self.max_rows)

    @property
    def needs_meta_flow_map(self) -> bool:
        """Whether the draws are those of a Meta Flow Map."""
        return (self.posterior or FlowMapPosterior()).needs_meta_flow_map

    def draw(self, target: Target, t: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """Draws `(B, N, *shape)` by the posterior."""
        return (self.posterior or FlowMapPosterior())(target, t, x, noise)

    def noise(self, x: Tensor, generator: Generators) -> Tensor:
        """Inner noise, `(B, N, *shape)`; antithetic: the second half is the negative of the first."""
        num = self.num_draws // 2 if self.antithetic else self.num_draws
        noise = randn((len(x), num, *x.shape[1:]), x, generator)
        return torch.cat([noise, -noise], dim=1) if self.antithetic else noise

    def chunks(self, target: Target, x: Tensor) -> Iterator[Chunk]:
        """See `chunks`."""
        return chunks(target, x, self.num_draws, self.max_rows)


@dataclass
class DrawValue(Draws, ValueEstimator):
    """V from posterior draws: log (1/N sum_i e^{r(x1_i)}), x1_i drawn from p_{1|t}(. | x) (paper, section 4)."""

    num_draws: int = 4
    looks_ahead = True

    @by_memory
    @torch.no_grad()
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        noise, t, best = self.noise(x, generator), as_times(t, x), Best(x)
        rewards = x.new_empty(len(x), self.num_draws, dtype=torch.float32)
        for part, rows, draws in self.chunks(target, x):
            x1 = self.draw(part, t[rows], x[rows], noise[rows, draws])
            rewards[rows, draws] = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
            best.update(x1, rewards[rows, draws], rows)
        return Estimate(None, log_mean_exp(rewards), effective_sample_size(rewards), best=best)


class DenoisedValue(ValueEstimator):
    """r(D_t(x)): the posterior replaced by its mean; no gradient is taken. What Feynman-Kac steering is used with."""

    looks_ahead = True

    @torch.no_grad()
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        t, best = as_times(t, x), Best(x)
        drift = target.drift(t, x)
        denoised = denoiser(t, x, drift)
        value = target.rewards(denoised)
        best.update(denoised[:, None], value[:, None])
        return Estimate(None, value, torch.ones_like(value), drift, best=best)


@dataclass
class DrawGradient(Draws, GradientEstimator):
    """MFM-G (Eq. 22): the value estimate differentiated through the draws, their noise fixed. With a GLASS posterior:
    differentiated GLASS rollouts.

    Near t = 0 the draws hardly depend on x: the gradient goes to zero, and sigma^2/2 grows without bound. Where it is
    clamped, steering takes `Estimate.steering`: MFM-GF's form of the product, from the same draws and without further
    evaluations. It needs two draws. With one (None) the clamp takes away 1 - max_diffusion t/(1-t) of the product: all
    of it at t = 0, three quarters at 0.01 and nothing from 0.04, with the default of 25.
    """

    needs_reward_gradient = True
    looks_ahead = True

    @by_memory
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        noise, t, best = self.noise(x, generator), as_times(t, x), Best(x)
        rewards = x.new_empty(len(x), self.num_draws, dtype=torch.float32)
        # gradients of chunks' log-sum-exps average, by the chunks' shares, to the gradient of the whole
        gradient, value = torch.zeros_like(x), torch.full((len(x),), -torch.inf, device=x.device)
        tilted, mean = torch.zeros_like(x), torch.zeros_like(x)  # of the draws
        for part, rows, draws in self.chunks(target, x):
            with torch.enable_grad():
                state = x[rows].detach().requires_grad_()
                x1 = self.draw(part, t[rows], state, noise[rows, draws])
                r = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
                chunk = r.logsumexp(dim=1)
                (chunk_gradient,) = torch.autograd.grad(chunk.sum(), state)
            rewards[rows, draws] = r.detach()
            best.update(x1, r, rows)
            total = torch.logaddexp(value[rows], chunk.detach())
            before, now = (value[rows] - total).exp(), (chunk.detach() - total).exp()
            gradient[rows] = expand(before, x) * gradient[rows] + expand(now, x) * chunk_gradient
            x1, weights = x1.detach(), r.detach().softmax(dim=1).to(x.dtype)
            chunk_tilted = torch.einsum("bn,bn...->b...", weights, x1)
            tilted[rows] = expand(before, x) * tilted[rows] + expand(now, x) * chunk_tilted
            mean[rows] += x1.sum(dim=1) / self.num_draws
            value[rows] = total
        steering = (tilted - mean) / expand((1 - t).clamp_min(1e-4), x) if self.num_draws > 1 else None
        return Estimate(gradient, log_mean_exp(rewards), effective_sample_size(rewards), steering=steering, best=best)


@dataclass
class DrawGradientFree(Draws, GradientEstimator):
    """MFM-GF (Eq. 20), without a reward gradient: (sigma^2/2) grad V = (sum_i w_i x1_i - mean_i x1_i) / (1-t),
    w = softmax r. The gradient is t/(1-t) times that. 1-t is kept at least 1e-4.

    Args:
        num_draws: N, at least 2: draws are weighed against each other.

    Raises:
        ValueError: for fewer than two draws, whose estimate is zero.
    """

    num_draws: int = 16
    looks_ahead = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draws < 2:
            raise ValueError(f"draws are weighed against each other: num_draws {self.num_draws} must be at least 2")

    @by_memory
    @torch.no_grad()
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        noise, t, best = self.noise(x, generator), as_times(t, x), Best(x)
        rewards = x.new_empty(len(x), self.num_draws, dtype=torch.float32)
        drawn = torch.empty_like(noise)
        for part, rows, draws in self.chunks(target, x):
            x1 = drawn[rows, draws] = self.draw(part, t[rows], x[rows], noise[rows, draws])
            rewards[rows, draws] = part.rewards(x1.flatten(0, 1)).reshape(x1.shape[:2])
            best.update(x1, rewards[rows, draws], rows)
        weights = rewards.softmax(dim=1).to(x.dtype) - 1 / self.num_draws
        shift = torch.einsum("bn,bn...->b...", weights, drawn)
        noise_left = (1 - t).clamp_min(1e-4)
        steering = shift / expand(noise_left, x)
        gradient, value = expand(t / noise_left, x) * steering, log_mean_exp(rewards)
        return Estimate(gradient, value, effective_sample_size(rewards), steering=steering, best=best)


@dataclass
class PointGradient(GradientEstimator):
    """The gradient of the reward of one clean state that stands for the posterior. Near t = 0 the clamp of sigma^2/2
    takes away 1 - max_diffusion t/(1-t) of the steering.

    Args:
        max_rows: memory budget, at most so many states at once; "auto" finds the most that a GPU has room for.
    """

    max_rows: MaxRows | None = None
    needs_reward_gradient = True
    looks_ahead = True

    @abstractmethod
    def clean(self, target: Target, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The clean state `(B, *shape)`, differentiable in x; and b_t(x) where it was computed."""

    @by_memory
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        t, parts, best = as_times(t, x), [], Best(x)
        for part, rows, _ in chunks(target, x, 1, self.max_rows):
            with torch.enable_grad():
                state = x[rows].detach().requires_grad_()
                x1, drift = self.clean(part, t[rows], state)
                value = part.rewards(x1)
                best.update(x1[:, None], value[:, None], rows)
                parts.append((torch.autograd.grad(value.sum(), state)[0], value.detach(), drift))
        gradient, value = (torch.cat([part[i] for part in parts]) for i in range(2))
        drifts = [part[2].detach() for part in parts if part[2] is not None]
        return Estimate(gradient, value, torch.ones_like(value), torch.cat(drifts) if drifts else None, best=best)


@dataclass
class DPSGradient(PointGradient):
    """The gradient of r(D_t(x)): the posterior replaced by its mean (Chung et al., arXiv 2209.14687). Near t = 0 the
    clamp of sigma^2/2 takes away 1 - max_diffusion t/(1-t) of the steering.

    Args:
        max_rows: memory budget, at most so many states at once; "auto" finds the most that a GPU has room for.
    """

    def clean(self, target: Target, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        drift = target.drift(t, x)
        return denoiser(t, x, drift), drift


@dataclass
class FlowMapGradient(PointGradient):
    """The gradient of r(X_{t,1}(x)): the posterior replaced by where the base flow leads, by one evaluation of the
    plain flow map (Sabour et al., "Test-time scaling of diffusions with flow maps", arXiv 2511.22688). Near t = 0 the
    clamp of sigma^2/2 takes away 1 - max_diffusion t/(1-t) of the steering.

    `TrajectoryTilting` makes up by weights for what is wrong with it.

    Args:
        max_rows: memory budget, at most so many states at once; "auto" finds the most that a GPU has room for.
    """

    needs_flow_map = True

    def clean(self, target: Target, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return target.base_flow_map(t, 1.0, x), None


class NetworkGradient(GradientEstimator):
    """The gradient of an amortised value network V_phi(t, x, conditions): no draws, no reward. Near t = 0 the clamp of
    sigma^2/2 takes away 1 - max_diffusion t/(1-t) of the steering.

    Args:
        network: the network, or the `.safetensors` file that fitting `ValueEstimation` exported.
    """

    def __init__(self, network: torch.nn.Module | str) -> None:
        self.network = load_value(network) if isinstance(network, str) else network
        self.network.eval().requires_grad_(False)

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        self.network.to(x.device)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            evaluate = target.meter.counted("network", self.network)
            value = evaluate(as_times(t, x), state, target.expand(x).conditions)
            (gradient,) = torch.autograd.grad(value.sum(), state)
        return Estimate(gradient, value.detach(), torch.ones_like(value.detach()))


@dataclass
class ExactGradient(GradientEstimator):
    """An oracle's closed form: what all estimators are measured against. The reward is the target's: of decoded images,
    with each sample's label and prompt, times its scale.

    Args:
        oracle: a distribution of `mfm_lightning.oracles`.

    Raises:
        TypeError, ValueError: when called, as `exact_likelihood`, for a mixture.
    """

    oracle: Oracle

    @torch.no_grad()
    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        t, target = as_times(t, x), target.expand(x)
        value = x.new_empty(len(x), dtype=torch.float32)
        gradient, steering = torch.empty_like(x), torch.empty_like(x)
        for rows, reward in self._rewards(target, len(x)):
            given = target.conditions.take(rows)
            value[rows] = self.oracle.value(x[rows], t[rows], reward, given).float()
            gradient[rows] = self.oracle.value_gradient(x[rows], t[rows], reward, given)
            steering[rows] = self.oracle.steering(x[rows], t[rows], reward, given)
        return Estimate(gradient, value, torch.ones_like(value), steering=steering)

    def _rewards(self, target: Target, num: int) -> Iterator[tuple[Tensor, Any]]:
        """Samples whose reward is one function of the state, and that function: one for each label and prompt."""
        if "groups" in target.reward.needs:
            raise RewardError(
                f"reward {name_of(target.reward)!r} depends on the other images of a group: exact values are of "
                "rewards of one image"
            )
        if self.oracle.needs_likelihood:
            yield torch.arange(num), exact_likelihood(target.reward, target.decoder, target.reward_scale)
            return
        given, needs = target.conditions, target.reward.needs
        labels = given.label.tolist() if "labels" in needs and given.label is not None else [None] * num
        prompts = given.prompts if "prompts" in needs and given.prompts is not None else [None] * num
        groups: dict[Any, list[int]] = {}
        for row, context in enumerate(zip(labels, prompts, strict=True)):
            groups.setdefault(context, []).append(row)
        for rows in groups.values():
            yield torch.tensor(rows), _of_states(target.take(torch.tensor(rows[:1])))


def exact_likelihood(reward: Any, decoder: Decoder | None, scale: float) -> Likelihood:
    """A target's reward as a mixture's closed forms need it: a linear-Gaussian likelihood of the state itself.

    Raises:
        TypeError: if the reward is of another kind, or is of decoded states.
        ValueError: for a scale that is not positive.
    """
    if decoder is not None and not isinstance(decoder, IdentityDecoder):
        raise TypeError(
            f"a mixture's closed forms are for a reward of the state itself, not of what {type(decoder).__name__} "
            "decodes: leave the decoder out, or use an EmpiricalDistribution"
        )
    return scaled(reward, scale)


def _of_states(target: Target) -> Callable[[Tensor], Tensor]:
    """The reward of any number of states, all with the one condition of a target; not counted."""
    return lambda x1: target.reward_scale * target.expand(x1).plain_rewards(x1)


def chunks(target: Target, x: Tensor, num_draws: int, max_rows: MaxRows | None) -> Iterator[Chunk]:
    """Cover all pairs of a state and a draw with at most `max_rows` pairs at once: the target of some states, and the
    slices of states and draws. What "auto" finds is a number by then (`by_memory`)."""
    if isinstance(max_rows, str):
        raise TypeError("max_rows auto: estimators with it are called by_memory")
    if max_rows is not None:
        positive(max_rows=max_rows)
    target.require_whole_groups(max_rows, len(x) * num_draws)
    draws = num_draws if max_rows is None else min(num_draws, max_rows)
    rows, target = len(x) if max_rows is None else max(1, max_rows // draws), target.expand(x)
    for i in range(0, len(x), rows):
        part = target.take(slice(i, i + rows))
        for j in range(0, num_draws, draws):
            yield part, slice(i, i + rows), slice(j, j + draws)
