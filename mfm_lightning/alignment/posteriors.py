"""Where posterior draws come from: the flow map, GLASS or the SDE of any base drift, or an oracle; by one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import as_times
from mfm_lightning.samplers import sample_posterior_glass, sample_sde


class Posterior(ABC):
    """Draws x1 `(B, N, *shape)` from p_{1|t}(. | x_t), given the inner noise `(B, N, *shape)`."""

    @abstractmethod
    def __call__(self, target: Target, t: Tensor | float, x_t: Tensor, noise: Tensor) -> Tensor: ...

    def with_drift(self, target: Target, t: Tensor, x_t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """The draws, and b_t(x_t) where it comes with them."""
        return self(target, t, x_t, noise), None


class FlowMapPosterior(Posterior):
    """`steps` steps of the Meta Flow Map; differentiable in x_t."""

    def __init__(self, steps: int = 1) -> None:
        if steps < 1:
            raise ValueError(f"steps ({steps}) must be at least 1")
        self.steps = steps

    def __call__(self, target: Target, t, x_t: Tensor, noise: Tensor) -> Tensor:
        N, x = noise.shape[1], noise.flatten(0, 1)
        outer, time = x_t.repeat_interleave(N, dim=0), as_times(t, x_t).repeat_interleave(N)
        for k in range(self.steps):
            x = target.flow_map(k / self.steps, (k + 1) / self.steps, x, time, outer)
        return x.reshape(noise.shape)

    def with_drift(self, target: Target, t: Tensor, x_t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.steps > 1 or not target.drifts_itself:
            return super().with_drift(target, t, x_t, noise)
        return target.draws_with_drift(noise, t, x_t)


class GlassPosterior(Posterior):
    """`steps` steps of the GLASS ODE on the target's base drift (Eq. 32); differentiable in x_t if the drift is."""

    def __init__(self, steps: int = 8, method: str = "euler") -> None:
        self.steps, self.method = steps, method

    def __call__(self, target: Target, t, x_t: Tensor, noise: Tensor) -> Tensor:
        return sample_posterior_glass(target.drift, x_t, t, steps=self.steps, method=self.method, noise=noise)


class OraclePosterior(Posterior):
    """Exact draws of an oracle, which has noise of its own; not differentiable."""

    def __init__(self, oracle, generator: torch.Generator | None = None) -> None:
        self.oracle, self.generator = oracle, generator

    def __call__(self, target: Target, t, x_t: Tensor, noise: Tensor) -> Tensor:
        return self.oracle.sample_posterior(x_t, t, noise.shape[1], target.labels(x_t), self.generator)


class RolloutPosterior(Posterior):
    """The base SDE from (t, x_t) to the data, `steps` Euler-Maruyama steps a draw, all states at one time.

    Its noise is its own: the inner noise it is given only says how many draws are wanted.

    Args:
        steps: steps between t and 1.
        max_diffusion: clamp of sigma^2/2 near t=0.
        generator: of the noise.
    """

    def __init__(self, steps: int = 200, max_diffusion: float = 25.0, generator: torch.Generator | None = None) -> None:
        if steps < 1:
            raise ValueError(f"steps ({steps}) must be at least 1")
        self.steps, self.max_diffusion, self.generator = steps, max_diffusion, generator

    def __call__(self, target: Target, t, x_t: Tensor, noise: Tensor) -> Tensor:
        t = torch.as_tensor(t)
        start = float(t.flatten()[0])
        if not (t == start).all():
            raise ValueError("rollouts of a batch start at one time: give one t for all states")
        x = x_t.repeat_interleave(noise.shape[1], dim=0)
        return sample_sde(target.drift, x, self.steps, start, self.max_diffusion, self.generator).reshape(noise.shape)
