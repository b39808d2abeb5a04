"""Embeddings of times, labels and positions that the networks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time in [0, 1], then a two-layer MLP: `(B,) -> (B, hidden_size)`.

    The time is not multiplied by 1000 as in DiT: the derivative in time is trained, and would be 1000 times larger.

    Args:
        hidden_size: output width.
        num_frequencies: number of sines and of cosines.
        max_frequency: highest angular frequency; the lowest is `max_frequency / 10000`.
    """

    def __init__(self, hidden_size: int, num_frequencies: int = 128, max_frequency: float = 1.0) -> None:
        super().__init__()
        self.num_frequencies, self.max_frequency = num_frequencies, max_frequency
        self.mlp = nn.Sequential(
            nn.Linear(2 * num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def features(self, t: Tensor) -> Tensor:
        """cos and sin of `t` at geometrically spaced frequencies: `(B,) -> (B, 2 num_frequencies)`."""
        k = torch.arange(self.num_frequencies, device=t.device, dtype=t.dtype)
        frequencies = self.max_frequency * torch.exp(-math.log(10000.0) / self.num_frequencies * k)
        angles = t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))

    def zero_output(self) -> None:
        """Make the embedding exactly zero until it is trained."""
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)


def sincos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-d sine-cosine position embedding, `(1, grid_size^2, hidden_size)` (as in DiT and MAE)."""
    frequencies = 1.0 / 10000 ** (torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4.0))
    row, column = torch.meshgrid(*[torch.arange(grid_size, dtype=torch.float64)] * 2, indexing="ij")
    parts = []
    for axis in (column, row):  # the column comes first, as in the released weights
        angles = axis.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1).float()[None]
