"""Where posterior draws come from: the flow map, GLASS or the SDE of any base drift, or an oracle; by one interface."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mfm_lightning.alignment.method import positive
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import Times
from mfm_lightning.models import posterior_steps
from mfm_lightning.oracles import Oracle
from mfm_lightning.samplers import METHODS, sample_posterior_glass, sample_sde


class Posterior(ABC):
    """Draws x1 `(B, N, *shape)` from p_{1|t}(. | x_t), given the inner noise `(B, N, *shape)`.

    A draw depends on its own state and inner noise alone: states and draws can then be cut into parts.

    Attributes:
        needs_meta_flow_map: a plain flow map is refused.
        needs_flow_map: a model with a drift alone is refused.
        differentiable: whether draws have a gradient in x_t, where the model has.
    """

    needs_meta_flow_map: bool = False
    needs_flow_map: bool = False
    differentiable: bool = True

    @abstractmethod
    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor: ...


class FlowMapPosterior(Posterior):
    """`steps` steps of the Meta Flow Map; differentiable in x_t.

    Args:
        steps: flow-map steps of a draw, on a uniform inner grid, at least 1.

    Raises:
        ValueError: for no steps.
    """

    needs_meta_flow_map = True

    def __init__(self, steps: int = 1) -> None:
        positive(steps=steps)
        self.steps = steps

    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor:
        return posterior_steps(target.expand(noise.flatten(0, 1)).flow_map, x_t, t, noise, self.steps)


class GlassPosterior(Posterior):
    """`steps` steps of the GLASS ODE on the target's base drift (Eq. 32); differentiable in x_t if the drift is.

    Args:
        steps: steps of a draw, at least 1.
        method: "euler", or "heun" (two evaluations a step, of second order).

    Raises:
        ValueError: for no steps, or an unknown method.
    """

    def __init__(self, steps: int = 8, method: str = "euler") -> None:
        positive(steps=steps)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
        self.steps, self.method = steps, method

    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor:
        drift = target.expand(noise.flatten(0, 1)).drift
        return sample_posterior_glass(drift, x_t, t, steps=self.steps, method=self.method, noise=noise)


class OraclePosterior(Posterior):
    """Exact draws of an oracle; not differentiable. Their noise is other than the inner noise, and follows from it.

    Args:
        oracle: a distribution of `mfm_lightning.oracles`.
        generator: of the draws, one after the other, whatever the inner noise; results then change with the parts that
            states and draws are cut into.
    """

    differentiable = False

    def __init__(self, oracle: Oracle, generator: torch.Generator | None = None) -> None:
        self.oracle, self.generator = oracle, generator

    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor:
        generator = self.generator or further_noise(noise)
        return self.oracle.sample_posterior(x_t, t, noise.shape[1], target.expand(x_t).conditions, generator)


class RolloutPosterior(Posterior):
    """The base SDE from (t, x_t) to the data, `steps` Euler-Maruyama steps a draw, all states at one time.

    Its noise is other than the inner noise it is given, and follows from it.

    Args:
        steps: steps between t and 1, at least 1.
        max_diffusion: clamp of sigma^2/2 near t=0.
        generator: of the noise, one step after the other, whatever the inner noise; results then change with the parts
            that states and draws are cut into.

    Raises:
        ValueError: for no steps; when called, for states at different times.
    """

    def __init__(self, steps: int = 200, max_diffusion: float = 25.0, generator: torch.Generator | None = None) -> None:
        positive(steps=steps)
        self.steps, self.max_diffusion, self.generator = steps, max_diffusion, generator

    def __call__(self, target: Target, t: Times, x_t: Tensor, noise: Tensor) -> Tensor:
        t = torch.as_tensor(t)
        start = float(t.flatten()[0])
        if not (t == start).all():
            raise ValueError("rollouts of a batch start at one time: give one t for all states")
        x = x_t.repeat_interleave(noise.shape[1], dim=0)
        drift = target.expand(x).drift
        generator = self.generator or further_noise(noise)
        return sample_sde(drift, x, self.steps, start, self.max_diffusion, generator).reshape(noise.shape)


def further_noise(noise: Tensor) -> list[torch.Generator]:
    """A generator for each draw's further noise, seeded by the bits of its inner noise `(B, N, *shape)`."""
    rows = noise.detach().flatten(0, 1).flatten(1).float().cpu().numpy()
    return [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
