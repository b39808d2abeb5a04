"""The linear interpolant I_t = (1-t) x0 + t x1, from noise at t=0 to data at t=1 (paper, section 2).

Times are `(B,)` tensors in [0, 1], states `(B, *shape)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Times = float | Tensor  # a number in [0, 1] for all states, or one for each, `(B,)`
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all rows, one for each, or torch's own


def as_times(t: Times, x: Tensor) -> Tensor:
    """Times for a batch of states: a number or `(B,)` tensor -> `(B,)`, on x's device, at least float32.

    Raises:
        ValueError: if `t` is a tensor with another number of entries than x's batch.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=x.device)
    if t.dim() == 0:
        return t.expand(len(x))
    if t.shape != (len(x),):
        raise ValueError(f"times of shape {tuple(t.shape)} for states of shape {tuple(x.shape)}: expected ({len(x)},)")
    return t


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Give `(B,)` times the number of dimensions of `(B, *shape)` states, so that they broadcast."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """I_t = (1-t) x0 + t x1; `t` `(B,)`, `x0`, `x1` `(B, *shape)`."""
    t = expand(t, x1)
    return (1 - t) * x0 + t * x1


def denoiser(t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
    """D_t(x) = E[x1 | I_t = x] = x + (1-t) b_t(x), given the velocity b_t(x)."""
    return x + (1 - expand(t, x)) * velocity


def score(t: Tensor, x: Tensor, velocity: Tensor, eps: float = 1e-6) -> Tensor:
    """grad log p_t(x) = (t b_t(x) - x) / (1-t), given b_t(x); 1-t is kept at least `eps`."""
    t = expand(t, x)
    return (t * velocity - x) / (1 - t).clamp_min(eps)


def diffusion(t: Tensor, max_value: float = 25.0) -> Tensor:
    """sigma_t^2 / 2 = (1-t) / t (Eq. 14), clamped to [0, max_value] (the release clamps at 25).

    Args:
        t: times in [0, 1], any shape.
        max_value: the clamp, reached at t = 1 / (1 + max_value).
    """
    return ((1 - t) / t.clamp_min(torch.finfo(t.dtype).tiny)).clamp(0.0, max_value)


def drawn_on(generator: torch.Generator | None, like: Tensor) -> torch.device:
    """Where random numbers are drawn: on the generator's device, that of `like` where there is no generator."""
    return like.device if generator is None else generator.device


def randn(shape: Sequence[int], like: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise like `like`, drawn on the generator's device (so that seeds agree across devices).

    Args:
        generator: one; or one for each row, so that a row's noise does not depend on the batch that it is in.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} rows of noise: give one a row")
        return torch.stack([randn(shape[1:], like, g) for g in generator])
    device = drawn_on(generator, like)
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
