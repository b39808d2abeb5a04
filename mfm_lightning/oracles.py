"""Distributions whose flow, posterior and value are known in closed form (docs/design.md).

Both classes have the same four methods. They are the ground truth in tests, validate rewards and samplers, and stand in
for a teacher. Conditions are optional everywhere; without a label, or with the null label `num_classes`, all of the
distribution is meant. An oracle knows nothing of guidance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Generators, Times, as_times, expand, rand, randn

Reward = Callable[[Tensor], Tensor]


class LinearGaussian(Protocol):
    """A reward log N(y; A x1, noise_std^2 I), of which a mixture knows value and tilt.

    Attributes:
        operator: A, `(M, D)`; observation: y, `(M,)`; noise_std: positive.
    """

    operator: Tensor
    observation: Tensor
    noise_std: float


@dataclass
class Likelihood:
    """A `LinearGaussian` and a constant beside it: log N(y; A x1, noise_std^2 I) + offset."""

    operator: Tensor
    observation: Tensor
    noise_std: float
    offset: float = 0.0


def scaled(reward: Any, scale: float) -> Likelihood:
    """`scale` log N(y; A x1, s^2 I) = log N(y; A x1, s^2 / scale I) + offset, again a linear-Gaussian likelihood.

    Raises:
        TypeError: if the reward is of another kind.
        ValueError: for a scale that is not positive.
    """
    given = require_linear_gaussian(reward)
    if not scale > 0:
        raise ValueError(f"reward_scale {scale} of a likelihood must be positive: else there is no closed form")
    normal = (1 - scale) * math.log(2 * math.pi * given.noise_std**2) - math.log(scale)
    offset = len(given.observation) / 2 * normal
    return Likelihood(given.operator, given.observation, given.noise_std / scale**0.5, offset)


class Oracle(ABC):
    """A distribution whose flow, posterior and value are known exactly.

    Attributes:
        state_shape: shape of a state.
        num_classes: number of labels; `num_classes` is the null label.
        needs_likelihood: whether V is known only for a linear-Gaussian likelihood of the state itself; else for any
            function of the state.
    """

    num_classes: int
    needs_likelihood: bool = False

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """b_t(x) = E[x1 - x0 | I_t = x], `(B, *shape)`."""

    @abstractmethod
    def sample_posterior(
        self,
        x_t: Tensor,
        t: Times,
        num_samples: int = 1,
        conditions: Conditions | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Exact draws from p_{1|t}(. | x_t), `(B, N, *shape)`.

        Args:
            x_t: noisy states `(B, *shape)`.
            t: their times, one for all or `(B,)`.
            num_samples: N, draws for each state.
            conditions: labels of classes, where the oracle has them.
            generator: one; or one for each state, or for each of the B*N draws.
        """

    @abstractmethod
    def value(self, x: Tensor, t: Times, reward: Any, conditions: Conditions | None = None) -> Tensor:
        """V_t(x) = log E[exp r(X1) | I_t = x], `(B,)`."""

    @abstractmethod
    def value_gradient(self, x: Tensor, t: Times, reward: Any, conditions: Conditions | None = None) -> Tensor:
        """grad_x V_t(x), `(B, *shape)`."""

    @abstractmethod
    def steering(self, x: Tensor, t: Times, reward: Any, conditions: Conditions | None = None) -> Tensor:
        """(sigma^2/2) grad V = (E'[x1 | x] - E[x1 | x]) / (1-t), sigma^2/2 = (1-t)/t, `(B, *shape)`; E' is under the
        posterior tilted by e^r. Finite also at t = 0, where sigma^2/2 is not."""


class GaussianMixture(Oracle):
    """A mixture of Gaussians, sum_k w_k N(m_k, C_k).

    Args:
        means: `(K, D)`.
        covariances: `(K, D, D)`, positive definite; or a number for that multiple of the identity.
        weights: `(K,)`, positive; equal where None. They are normalised.

    Raises:
        ValueError: if shapes do not fit, a weight is not positive or a covariance is not positive definite.
    """

    num_classes = 0
    needs_likelihood = True

    def __init__(
        self,
        means: Sequence | Tensor,
        covariances: float | Sequence | Tensor = 1.0,
        weights: Sequence | Tensor | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        K, D = self.means.shape
        self.covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if self.covariances.dim() == 0:
            self.covariances = self.covariances * torch.eye(D, dtype=torch.float64).expand(K, D, D)
        if self.covariances.shape != (K, D, D):
            raise ValueError(
                f"covariances of shape {tuple(self.covariances.shape)}: expected a number or ({K}, {D}, {D})"
            )
        shares = torch.ones(K) if weights is None else torch.as_tensor(weights)
        if shares.shape != (K,) or bool((shares <= 0).any()):
            raise ValueError(f"weights {shares.tolist()}: expected {K} positive numbers")
        self.weights = shares.double() / shares.double().sum()
        self.variances, self.axes = torch.linalg.eigh(self.covariances)  # (K, D), (K, D, D)
        if (self.variances <= 0).any():
            raise ValueError("covariances must be positive definite")

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.means.shape[1],)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`(num, D)` independent draws, float32."""
        k = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        z = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[k] + torch.einsum("bij,bj->bi", self.axes[k], self.variances[k].sqrt() * z)).float()

    def log_prob(self, t: Times, x: Tensor) -> Tensor:
        """log p_t(x) of the noisy state I_t, `(B,)`, at x `(B, D)`."""
        return self._posterior(as_times(t, x), x)[0].logsumexp(dim=1)

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """b_t(x) = E[x1 - x0 | I_t = x], `(B, D)`; finite on all of [0, 1]."""
        t = as_times(t, x)
        log_joint, noisy, centred = self._posterior(t, x)
        lam, time = self.variances.to(x), t[:, None, None]
        inside = (time * lam - (1 - time)) / noisy * centred  # (B, K, D), in the components' own axes
        component = self.means.to(x) + torch.einsum("kij,bkj->bki", self.axes.to(x), inside)
        return (log_joint.softmax(dim=1)[..., None] * component).sum(dim=1)

    def sample_posterior(
        self,
        x_t: Tensor,
        t: Times,
        num_samples: int = 1,
        conditions: Conditions | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Exact draws from p_{1|t}(. | x_t), `(B, N, D)`."""
        log_joint, means, variances = self._posterior_moments(as_times(t, x_t), x_t)
        k = _drawn(log_joint.softmax(1), num_samples, generator)  # (B, N)
        rows = torch.arange(len(x_t), device=x_t.device)[:, None]
        z = randn((k.numel(), x_t.shape[1]), x_t, generator).reshape(*k.shape, -1)
        spread = torch.einsum("bnij,bnj->bni", self.axes.to(x_t)[k], variances[rows, k].sqrt() * z)
        return means[rows, k] + spread

    def value(self, x: Tensor, t: Times, reward: LinearGaussian, conditions: Conditions | None = None) -> Tensor:
        """V_t(x) = log E[exp r(X1) | I_t = x], `(B,)`, for a linear-Gaussian likelihood reward.

        Args:
            x: noisy states `(B, *shape)`.
            t: their times, one for all or `(B,)`.
            reward: r(x1) = log N(y; A x1, noise_std^2 I), with attributes `operator` A `(M, D)`, `observation` y `(M,)`
                and `noise_std`; e.g. `mfm_rewards.linear_gaussian.LinearGaussianLikelihood`. A constant `offset`, where
                it has one (`scaled`), is added.
            conditions: labels of classes, where the oracle has them.

        Raises:
            TypeError: if the reward is of another kind, for which a mixture has no closed form.
        """
        log_joint, _, _, normal = self._measured(as_times(t, x), x, reward)
        log_evidence = normal.log_prob(reward.observation.to(x))
        return (log_joint.log_softmax(dim=1) + log_evidence).logsumexp(dim=1) + getattr(reward, "offset", 0.0)

    def value_gradient(
        self, x: Tensor, t: Times, reward: LinearGaussian, conditions: Conditions | None = None
    ) -> Tensor:
        """grad_x V_t(x), `(B, D)`: the derivative of the closed form."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.value(x, t, reward).sum(), x)[0]

    def steering(self, x: Tensor, t: Times, reward: LinearGaussian, conditions: Conditions | None = None) -> Tensor:
        """(sigma^2/2) grad V, `(B, D)`, from the components' posteriors and those after the measurement: weights times
        the evidence, means moved by the Kalman gain."""
        t = as_times(t, x)
        log_joint, means, gain, normal = self._measured(t, x, reward)
        y = reward.observation.to(x)
        tilted = (log_joint + normal.log_prob(y)).softmax(dim=1)
        residual = torch.linalg.solve(normal.covariance_matrix, (y - normal.mean)[..., None])
        moved = (tilted[..., None] * (gain @ residual)[..., 0]).sum(dim=1)
        weights = tilted - log_joint.softmax(dim=1)  # sum to 0, so that any common point may be taken from the means
        moved = moved + (weights[..., None] * (means - x[:, None])).sum(dim=1)
        return moved / expand((1 - t).clamp_min(1e-6), x)

    def tilted(self, reward: LinearGaussian) -> GaussianMixture:
        """p(x1) e^{r(x1)} / Z, again a mixture, for a linear-Gaussian likelihood reward (as in `value`).

        Raises:
            TypeError: if the reward is of another kind.
        """
        require_linear_gaussian(reward)
        A, y = reward.operator.to(self.means), reward.observation.to(self.means)
        precision = torch.linalg.inv(self.covariances)
        covariances = torch.linalg.inv(precision + A.T @ A / reward.noise_std**2)
        information = torch.einsum("kij,kj->ki", precision, self.means) + A.T @ y / reward.noise_std**2
        evidence = A @ self.covariances @ A.T + reward.noise_std**2 * torch.eye(len(y), dtype=torch.float64)
        log_evidence = torch.distributions.MultivariateNormal(self.means @ A.T, evidence).log_prob(y)
        means = torch.einsum("kij,kj->ki", covariances, information)
        return GaussianMixture(means, covariances, (self.weights.log() + log_evidence).softmax(0))

    def _posterior(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # log w_k N(x; t m_k, t^2 C_k + (1-t)^2 I), the noisy variances and the centred state in the components' axes
        t = t[:, None, None]
        noisy = t**2 * self.variances.to(x) + (1 - t) ** 2
        centred = torch.einsum("kji,bkj->bki", self.axes.to(x), x[:, None] - t * self.means.to(x))
        log_normal = -0.5 * (centred**2 / noisy + noisy.log() + torch.log(torch.tensor(2 * torch.pi))).sum(dim=-1)
        return self.weights.log().to(x) + log_normal, noisy, centred

    def _posterior_moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_joint, noisy, centred = self._posterior(t, x)
        lam, time = self.variances.to(x), t[:, None, None]
        gain = torch.einsum("kij,bkj->bki", self.axes.to(x), time * lam / noisy * centred)
        return log_joint, self.means.to(x) + gain, (1 - time) ** 2 * lam / noisy

    def _measured(
        self, t: Tensor, x: Tensor, reward: LinearGaussian
    ) -> tuple[Tensor, Tensor, Tensor, torch.distributions.MultivariateNormal]:
        # of the components' posteriors N(m, V): log weights, m, V A^T, and the distribution of y
        require_linear_gaussian(reward)
        log_joint, means, variances = self._posterior_moments(t, x)
        A, y = reward.operator.to(x), reward.observation.to(x)
        axes = torch.einsum("mi,kij->kmj", A, self.axes.to(x))
        cross = torch.einsum("kij,bkj,kmj->bkim", self.axes.to(x), variances, axes)
        evidence = A @ cross + reward.noise_std**2 * torch.eye(len(y), dtype=x.dtype, device=x.device)
        normal = torch.distributions.MultivariateNormal(means @ A.T, evidence)
        return log_joint, means, cross, normal


def _drawn(probability: Tensor, num: int, generator: Generators) -> Tensor:
    """`num` indices `(B, num)` with replacement, by probabilities `(B, M)`."""
    if not isinstance(generator, Sequence):
        return torch.multinomial(probability, num, replacement=True, generator=generator)
    # by the inverse of the distribution function: one uniform number a draw, from the generator of its state or its own
    uniform = rand(len(probability) * num, probability, generator).reshape(-1, num)
    cumulative = probability.double().cumsum(dim=1)
    # its end is 1 but for rounding
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_max(probability.shape[1] - 1)


def require_linear_gaussian(reward: Any) -> LinearGaussian:
    """The reward; TypeError unless it is a linear-Gaussian likelihood, for which a mixture has closed forms."""
    if not all(hasattr(reward, name) for name in ("operator", "observation", "noise_std")):
        raise TypeError(
            f"the value of a {type(reward).__name__} under a mixture has no closed form: give a linear-Gaussian "
            "likelihood (with operator, observation, noise_std), or use an EmpiricalDistribution"
        )
    return reward


class EmpiricalDistribution(Oracle):
    """A finite data set, each point with equal weight.

    The posterior is a softmax over the points. All is computed in float64, whatever the states' type, and given back in
    theirs: in float32 squared distances in thousands of dimensions, over (1-t)^2, are off by more than a value may be.
    Batches are cut so that no more than `max_elements` weights are held at once: 50,000 float32 points in 3,072
    dimensions take their own 0.6 GB, 1.2 GB for their copy in float64, and little more.

    Args:
        points: `(M, *shape)`.
        labels: `(M,)` integers in 0..num_classes-1, or None.
        num_classes: number of labels; found from `labels` where None.
        max_elements: number of weights (states x points) held at once.
        min_noise: 1-t is kept at least this in the softmax and the drift, which at t=1 is undefined off the data.
    """

    def __init__(
        self,
        points: Tensor,
        labels: Tensor | None = None,
        num_classes: int | None = None,
        max_elements: int = 2**24,
        min_noise: float = 1e-3,
    ) -> None:
        if labels is not None and labels.shape != (len(points),):
            raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(points)} points")
        self.points, self.labels = points, labels
        self.num_classes = (0 if labels is None else int(labels.max()) + 1) if num_classes is None else num_classes
        self.max_elements, self.min_noise = max_elements, min_noise
        self._flat = points.flatten(1).double()
        self._squares = self._flat.square().sum(dim=1)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.points.shape[1:])

    def to(self, device: torch.device | str) -> EmpiricalDistribution:
        """A copy on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return EmpiricalDistribution(
            self.points.to(device), labels, self.num_classes, self.max_elements, self.min_noise
        )

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`(num, *shape)` points drawn with replacement."""
        return self.points[torch.randint(len(self.points), (num,), generator=generator)]

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """b_t(x) = (E[x1 | I_t = x] - x) / (1-t), `(B, *shape)`."""
        means = [w.softmax(1) @ self._flat for w in self._log_weights(t, x, conditions)]
        noise = expand((1 - as_times(t, x.double())).clamp_min(self.min_noise), x)
        return ((torch.cat(means).reshape(x.shape) - x) / noise).to(x.dtype)

    def sample_posterior(
        self,
        x_t: Tensor,
        t: Times,
        num_samples: int = 1,
        conditions: Conditions | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Exact draws from p_{1|t}(. | x_t), `(B, N, *shape)`."""
        weights = self._log_weights(t, x_t, conditions)
        if not isinstance(generator, Sequence):
            return self.points[torch.cat([_drawn(w.softmax(1), num_samples, generator) for w in weights])]
        each, drawn, done = len(generator) // len(x_t), [], 0
        for w in weights:
            drawn.append(_drawn(w.softmax(1), num_samples, generator[done * each : (done + len(w)) * each]))
            done += len(w)
        return self.points[torch.cat(drawn)]

    def value(self, x: Tensor, t: Times, reward: Reward, conditions: Conditions | None = None) -> Tensor:
        """V_t(x) = log E[exp r(X1) | I_t = x], `(B,)`, for any reward `(M, *shape) -> (M,)`."""
        r = self._rewards(reward)
        weights = self._log_weights(t, x, conditions)
        return torch.cat([(w.log_softmax(1) + r).logsumexp(1) for w in weights]).to(x.dtype)

    def value_gradient(self, x: Tensor, t: Times, reward: Reward, conditions: Conditions | None = None) -> Tensor:
        """grad_x V_t(x) = t/(1-t)^2 (E'[x1 | x] - E[x1 | x]), E' under weights times e^r; `(B, *shape)`.

        The reward's gradient is not needed.
        """
        time = as_times(t, x.double())
        ratio = time / (1 - time).clamp_min(self.min_noise)
        return (expand(ratio, x) * self.steering(x, t, reward, conditions)).to(x.dtype)

    def steering(self, x: Tensor, t: Times, reward: Reward, conditions: Conditions | None = None) -> Tensor:
        """(sigma^2/2) grad V = (E'[x1 | x] - E[x1 | x]) / (1-t), `(B, *shape)`."""
        r, weights = self._rewards(reward), self._log_weights(t, x, conditions)
        shift = torch.cat([((w + r).softmax(1) - w.softmax(1)) @ self._flat for w in weights]).reshape(x.shape)
        t = as_times(t, x.double())
        return (shift / expand((1 - t).clamp_min(self.min_noise), x)).to(x.dtype)

    @torch.no_grad()
    def _rewards(self, reward: Reward, batch: int = 1024) -> Tensor:
        return torch.cat([reward(p) for p in self.points.split(batch)])

    @property
    def null_conditions(self) -> Conditions:
        """All of the distribution, one row."""
        return Conditions(label=self.num_classes)

    def _log_weights(self, t: Times, x: Tensor, conditions: Conditions | None) -> Iterator[Tensor]:
        """Batch by batch, log p(x | x1 = point) up to a constant of the state, `(b, M)`, float64."""
        x = x.flatten(1).double()
        t = as_times(t, x)
        label = (conditions or Conditions()).filled(self.null_conditions).expand(len(x), x.device).label
        assert label is not None  # filled
        rows = max(1, self.max_elements // len(self.points))
        for time, state, wanted in zip(t.split(rows), x.split(rows), label.split(rows), strict=True):
            time = time[:, None]
            inner = time * (state @ self._flat.T) - 0.5 * time**2 * self._squares
            weights = inner / (1 - time).clamp_min(self.min_noise) ** 2
            if self.labels is not None:
                other = (self.labels != wanted[:, None]) & (wanted[:, None] != self.num_classes)
                weights = weights.masked_fill(other, float("-inf"))
            yield weights
