"""The linear interpolant I_t = (1-t) x0 + t x1, from noise at t=0 to data at t=1 (paper, section 2).

Times are `(B,)` tensors in [0, 1], states `(B, *shape)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Times = float | Tensor  # a number in [0, 1] for all states, or one for each, `(B,)`
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all, one for each sample, or torch's own


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
        shape: of the noise, `(B, *shape)`.
        like: tensor whose type and device the noise has.
        generator: one; or one for each of B samples, so that a sample's noise does not depend on the batch that it is
            in. The k rows of a sample, next to each other among B*k, are drawn from its own at once.

    Raises:
        ValueError: if the rows are no multiple of the generators.
    """
    if isinstance(generator, Sequence):
        rows = (_rows_each(shape[0], generator), *shape[1:])
        return torch.cat([torch.randn(rows, generator=g, device=g.device, dtype=like.dtype) for g in generator]).to(
            like.device
        )
    device = drawn_on(generator, like)
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def rand(num: int, like: Tensor, generator: Generators = None) -> Tensor:
    """`(num,)` uniform numbers in [0, 1), float64, on the device of `like`; drawn as in `randn`."""
    if isinstance(generator, Sequence):
        rows = _rows_each(num, generator)
        drawn = [torch.rand(rows, generator=g, device=g.device, dtype=torch.float64) for g in generator]
        return torch.cat(drawn).to(like.device)
    device = drawn_on(generator, like)
    return torch.rand(num, generator=generator, device=device, dtype=torch.float64).to(like.device)


def _rows_each(rows: int, generators: Sequence[torch.Generator]) -> int:
    if not generators or rows % len(generators):
        raise ValueError(f"{len(generators)} generators for {rows} rows of noise: give one a row, or one a sample")
    return rows // len(generators)


def noise_seed(seed: int | tuple[int, ...], index: int) -> int:
    """A seed in 0..2^32-1 (torch's CPU generator takes no more bits), different for each index below 2^32.

    Args:
        seed: further numbers tell apart what else is drawn for the same sample.
        index: of the sample.
    """
    numbers = [number % 2**64 for number in (seed if isinstance(seed, tuple) else (seed,))]
    start = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    return (start + 2654435761 * index) % 2**32  # an odd factor: one to one, and neighbours are far apart


def sample_generators(seed: int | tuple[int, ...], indices: Iterable[int]) -> list[torch.Generator]:
    """One for each sample, by its index (`noise_seed`), on the CPU: noise is the same on every device and in every
    batch."""
    return [torch.Generator().manual_seed(noise_seed(seed, i)) for i in indices]


def own_generators(generator: Generators, num: int) -> Sequence[torch.Generator]:
    """One for each of `num` samples: those that are given, or made by one number of the one that is given."""
    if isinstance(generator, Sequence):
        return generator
    device = "cpu" if generator is None else generator.device
    return sample_generators(int(torch.randint(2**62, (), generator=generator, device=device)), range(num))
