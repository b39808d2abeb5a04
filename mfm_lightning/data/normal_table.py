"""Standard normal noise at the speed of a table look-up: for latents from moments, where it is most of the work."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

_LEVELS = 1 << 16


@cache
def _table() -> np.ndarray:
    """`(65536,)` float32: the means of as many equally likely pieces of N(0, 1), scaled to variance 1."""
    edges = torch.special.ndtri(torch.arange(1, _LEVELS, dtype=torch.float64) / _LEVELS)
    density = torch.nn.functional.pad(torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5, (1, 1))
    means = (density[:-1] - density[1:]) * _LEVELS
    return (means / means.square().mean().sqrt()).float().numpy()


def fill_normal(out: np.ndarray, seed: np.random.SeedSequence) -> np.ndarray:
    """Fill `out` `(B, D)` float32 with noise, the same on every machine; returns B random bits as bool `(B,)`.

    The noise takes 65,536 equally likely values, within 4.4 standard deviations: finer than the float16 of the
    moments that it is multiplied with. torch.randn takes two to three times as long.
    """
    words = -(-out.size // 4)
    raw = np.random.SFC64(seed).random_raw(words + len(out)).astype("<u8", copy=False)
    np.take(_table(), raw[:words].view(np.uint16)[: out.size].reshape(out.shape), out=out, mode="clip")
    return (raw[words:] >> np.uint64(63)).astype(bool)
