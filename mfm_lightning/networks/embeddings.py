"""Embeddings of times, labels and positions that the networks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mfm_lightning.networks.dual import Dual, cos_sin, linear, silu


def patches(x: Tensor, size: int) -> Tensor:
    """`(B, C, H, W)` to tokens `(B, T, C size size)`: one a patch, row by row."""
    B, C, H, W = x.shape
    tokens = x.reshape(B, C, H // size, size, W // size, size).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(B, -1, C * size * size)


class TimeFeatures(nn.Module):
    """cos and sin of a time in [0, 1] at geometrically spaced frequencies: `(B,) -> (B, 2 num_frequencies)`.

    The time is not multiplied by 1000 as in DiT: the derivative in time is trained, and would be 1000 times larger.

    Args:
        num_frequencies: number of sines and of cosines.
        max_frequency: highest angular frequency; the lowest is near `max_frequency / 10000`.
    """

    def __init__(self, num_frequencies: int = 128, max_frequency: float = 1.0) -> None:
        super().__init__()
        self.num_frequencies, self.max_frequency = num_frequencies, max_frequency
        self.size = 2 * num_frequencies

    def forward(self, t: Dual) -> Dual:
        time = t.value
        k = torch.arange(self.num_frequencies, device=time.device, dtype=time.dtype)
        frequencies = self.max_frequency * torch.exp(-math.log(10000.0) / self.num_frequencies * k)
        return cos_sin(t.map(lambda t: t[:, None] * frequencies))


class TimeEmbedding(nn.Module):
    """`TimeFeatures`, then a two-layer MLP: `(B,) -> (B, hidden_size)`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.features = TimeFeatures()
        self.mlp = nn.Sequential(
            nn.Linear(self.features.size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    @property
    def first(self) -> nn.Linear:
        """The MLP's first layer."""
        return cast(nn.Linear, self.mlp[0])

    @property
    def second(self) -> nn.Linear:
        """The MLP's second layer."""
        return cast(nn.Linear, self.mlp[2])

    def forward(self, t: Dual) -> Dual:
        features = self.features(t).map(lambda f: f.to(self.first.weight.dtype))
        return linear(self.second, silu(linear(self.first, features)))

    def zero_output(self) -> None:
        """Make the embedding exactly zero until it is trained."""
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)


def sincos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-d sine-cosine position embedding, `(1, grid_size^2, hidden_size)` (as in DiT and MAE)."""
    frequencies = 1.0 / 10000 ** (torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4.0))
    row, column = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    parts = []
    for axis in (column, row):  # the column comes first, as in the released weights
        angles = axis.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()[None]


def nearest_scale(guidance: Tensor, scales: Sequence[float]) -> Tensor:
    """Index of each guidance scale among (1, *scales), `(B,)`; the nearest where it is none of them."""
    known = torch.tensor([1.0, *scales], device=guidance.device, dtype=guidance.dtype)
    return (guidance[:, None] - known).abs().argmin(dim=1)
