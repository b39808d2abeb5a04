"""Rewards of a group's samples beside each other, as methods of policy-gradient kind take them."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions


def group_conditions(conditions: Conditions, group_size: int, num: int, device: torch.device) -> Conditions:
    """Conditions of `num / group_size` groups, a row for each of `num` samples, those of a group next to each other."""
    return conditions.expand(num // group_size, device).expand(num)


def advantages(rewards: Tensor, group_size: int, normalised: bool = True) -> Tensor:
    """(r - mean) / std by group (GRPO, arXiv 2402.03300; Flow-GRPO's Eq. 3), of rewards `(B,)` whose groups stand next
    to each other; with `normalised` False only the mean is taken away.

    Where all rewards of a group are equal, its advantages are 0.

    Raises:
        ValueError: if the rewards are no whole groups.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are no whole groups of {group_size}")
    grouped = rewards.reshape(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if normalised:
        spread = grouped.std(dim=1, keepdim=True)
        centred = torch.where(spread > 0, centred / spread.clamp_min(torch.finfo(spread.dtype).tiny), 0.0)
    return centred.flatten()


def check_groups(batch_size: int, group_size: int) -> None:
    """Raise ValueError unless a batch is whole groups of at least two samples."""
    if group_size < 2 or batch_size < 1 or batch_size % group_size:
        raise ValueError(
            f"batch_size {batch_size} must be whole groups of group_size {group_size}, which is at least 2"
        )
