"""Samplers as functions: base ODE and SDE, posterior by GLASS, and K-step refinement (Algorithm 1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.glass import BaseDrift, glass_velocity
from mfm_lightning.interpolant import Generators, Times, as_times, diffusion, expand, interpolate, randn, score
from mfm_lightning.models import MetaFlowMap

Callback = Callable[[int, Tensor], None]
METHODS = ("euler", "heun")


def integrate(
    velocity: BaseDrift,
    x: Tensor,
    times: Tensor | Sequence[float],
    method: str = "euler",
    callback: Callback | None = None,
) -> Tensor:
    """Solve dx/dt = velocity(t, x) over the grid `times`.

    Heun's step to 1 is a midpoint step, of second order and two evaluations too. Velocities are those of flows to data
    at 1, and jump there where a step is longer than the data's (or the posterior's) deviation: a corrector at 1 would
    leave half of the step undone.

    Args:
        velocity: takes times `(B,)` and states `(B, *shape)`.
        x: the state at `times[0]`, `(B, *shape)`.
        times: increasing grid, K+1 numbers in [0, 1].
        method: "euler", or "heun" (two evaluations a step).
        callback: called as `callback(k, x)` after each step.

    Raises:
        ValueError: if the method is not known or the grid does not increase.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    times = _grid(times)
    for k, (now, then) in enumerate(itertools.pairwise(times)):
        v = velocity(as_times(now, x), x)
        if method == "heun" and then < 1:
            v = (v + velocity(as_times(then, x), x + (then - now) * v)) / 2
        elif method == "heun":
            v = velocity(as_times((now + then) / 2, x), x + (then - now) / 2 * v)
        x = x + (then - now) * v
        if callback:
            callback(k, x)
    return x


def sample_ode(
    drift: BaseDrift, x0: Tensor, steps: int = 100, method: str = "euler", callback: Callback | None = None
) -> Tensor:
    """Base flow dx = b_t(x) dt from noise `x0` `(B, *shape)` at t=0 to data at t=1, on a uniform grid."""
    return integrate(drift, x0, torch.linspace(0, 1, steps + 1), method, callback)


def euler_maruyama(
    now: float,
    then: float,
    x: Tensor,
    drift: Tensor,
    half: Tensor,
    steering: Tensor | float = 0.0,
    share: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Mean `(B, *shape)` and deviation of an Euler-Maruyama step of dx = (b + h score + c + k c) dt + sqrt(2 h) dW.

    The step to 1 is the denoiser, x + (1-t) (b + c), without noise. With c = h grad V and h = (1-t)/t it is the mean of
    x1 given x under the posterior tilted by e^r. The plain step would leave noise of size (1-t)/t on the sample.

    Args:
        now: the step's time.
        then: the next time.
        x: states `(B, *shape)` at `now`, and their `drift` b.
        drift: b, `(B, *shape)`.
        half: h = sigma^2/2, `(B,)`.
        steering: c, `(B, *shape)`.
        share: k = h / ((1-t)/t), what the clamp leaves of sigma^2/2, where c is (1-t)/t grad V; 1 where c is h grad V.

    Returns:
        The deviation broadcasts against x; None where there is no noise.
    """
    t, dt = as_times(now, x), then - now
    if then == 1:
        return x + dt * (drift + steering), None
    velocity = drift + expand(half, x) * score(t, x, drift) + (1 + share) * steering
    return x + dt * velocity, expand((2 * half * dt).sqrt(), x)


def sample_sde(
    drift: BaseDrift,
    x0: Tensor,
    steps: int = 100,
    t_start: float = 0.01,
    max_diffusion: float = 25.0,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Base SDE dx = (b + sigma^2/2 score) dt + sigma dW (Eq. 14), by Euler-Maruyama; its step to 1 is the denoiser.

    Args:
        drift: b_t(x), as `drift(t, x)`.
        x0: noise `(B, *shape)`, taken as the state at `t_start`.
        steps: of Euler-Maruyama.
        t_start: first time, in [0, 1]; from 1 there is no step, and x0 is returned.
        max_diffusion: clamp of sigma^2/2 = (1-t)/t near t=0. The clamped SDE has the same marginals.
        generator: of the noise of the steps.
        callback: called as `callback(k, x)` after each step.
    """
    x = x0
    if t_start == 1:
        return x
    times = _grid(torch.linspace(t_start, 1, steps + 1, dtype=torch.float64))
    for k, (now, then) in enumerate(itertools.pairwise(times)):
        t = as_times(now, x)
        x, deviation = euler_maruyama(now, then, x, drift(t, x), diffusion(t, max_diffusion))
        if deviation is not None:
            x = x + deviation * randn(x.shape, x, generator)
        if callback:
            callback(k, x)
    return x


def sample_posterior_glass(
    base_drift: BaseDrift,
    x_t: Tensor,
    t: Times,
    num_samples: int = 1,
    steps: int = 16,
    method: str = "euler",
    noise: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """Draws from p_{1|t}(. | x_t) by the GLASS ODE of a base drift (Eq. 32), `(B, N, *shape)`.

    Args:
        base_drift: `base_drift(t, x)`; called with B*N states, draws of one state next to each other.
        x_t: noisy states `(B, *shape)`.
        t: their times, one for all or `(B,)`.
        num_samples: N, draws for each state.
        steps: of the inner ODE.
        method: "euler" or "heun".
        noise: inner noise at s=0, `(B, N, *shape)`; drawn from `generator` where None.
        generator: of the noise.
    """
    if noise is None:
        noise = randn((len(x_t), num_samples, *x_t.shape[1:]), x_t, generator)
    N = noise.shape[1]
    outer = x_t.repeat_interleave(N, dim=0)
    time = as_times(t, x_t).repeat_interleave(N, dim=0)

    def velocity(s: Tensor, x_s: Tensor) -> Tensor:
        return glass_velocity(base_drift, s, x_s, time, outer)

    return integrate(velocity, noise.flatten(0, 1), torch.linspace(0, 1, steps + 1), method).reshape(noise.shape)


def sample_refinement(
    model: MetaFlowMap,
    x0: Tensor,
    steps: int = 4,
    conditions: Conditions | None = None,
    generator: Generators = None,
    times: Sequence[float] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """K-step refinement (Algorithm 1): draw x1 = X_{0,1}(eps; t_k, x), renoise it to t_{k+1}, repeat.

    Args:
        model: a Meta Flow Map.
        x0: noise `(B, *shape)`, the state at t_0 = 0.
        steps: K; one step is a one-step sample.
        conditions: as the model takes them.
        generator: of the inner and the renoising noise: one, or one for each row.
        times: t_0 = 0 < ... < t_{K-1} < 1; uniform where None.
        callback: called as `callback(k, x)` after each step.

    Returns:
        The last draw of x1, `(B, *shape)`.
    """
    if steps < 1 and times is None:
        raise ValueError(f"steps ({steps}) must be at least 1")
    times = [k / steps for k in range(steps)] if times is None else list(times)
    x = x1 = x0
    conditions = (conditions or Conditions()).expand(len(x0), x0.device)
    for k, t in enumerate(times):
        eps = randn(x.shape, x, generator)
        x1 = model.flow_map(0.0, 1.0, eps, t, x, conditions)
        if callback:
            callback(k, x1)
        if k + 1 < len(times):
            x = interpolate(as_times(times[k + 1], x), randn(x.shape, x, generator), x1)
    return x1


def _grid(times: Tensor | Sequence[float]) -> list[float]:
    times = times.tolist() if isinstance(times, Tensor) else [float(t) for t in times]
    if len(times) < 2 or any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError(f"times must be at least two increasing numbers, got {times[:4]}...")
    return times
