"""The best clean state of each sample that has been scored so far."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """The best look-ahead of each of B samples.

    Args:
        like: states `(B, *shape)`, for number, shape, type and device.

    Attributes:
        states: the best clean states `(B, *shape)`; `like` before the first update.
        rewards: their rewards `(B,)`, times the target's `reward_scale`; minus infinity before the first update.
    """

    def __init__(self, like: Tensor) -> None:
        self.states = like.detach().clone()
        self.rewards = like.new_full((len(like),), -torch.inf, dtype=torch.float32)

    @torch.no_grad()
    def update(self, x1: Tensor, rewards: Tensor, rows: slice = slice(None)) -> None:
        """Keep what is better than before; of equal ones the first.

        Args:
            x1: clean states `(b, N, *shape)` of the samples `rows`.
            rewards: `(b, N)`, times `reward_scale`.
            rows: the samples that these are of.
        """
        top, which = rewards.detach().max(dim=1)
        found = x1.detach()[torch.arange(len(x1), device=x1.device), which]
        better = top > self.rewards[rows]
        self.states[rows] = torch.where(better.reshape(-1, *[1] * (found.dim() - 1)), found, self.states[rows])
        self.rewards[rows] = torch.where(better, top, self.rewards[rows])

    def merge(self, other: Best) -> None:
        """Keep what another has better: of the same samples, or of k states of each, next to each other."""
        grouped = other.states.reshape(len(self.states), -1, *self.states.shape[1:])
        self.update(grouped, other.rewards.reshape(len(self.states), -1))
