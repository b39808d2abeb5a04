"""A running estimate of log E[e^r], so that e^{r - c} neither overflows nor vanishes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogNormaliser(nn.Module):
    """c = log of a running mean of e^r, for each class and for the null label, kept in the log domain.

    The first batches count equally, later ones with `rate`. A batch is normalised by what came before it: c must not
    depend on the draws that it normalises. For a class that has not been seen, it is the batch's own.

    Args:
        num_classes: labels 0..num_classes, the last one null.
        rate: of the running mean.

    Raises:
        ValueError: unless 0 < rate <= 1.
    """

    value: Tensor
    updates: Tensor

    def __init__(self, num_classes: int = 0, rate: float = 0.02) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"normaliser rate {rate} must lie in (0, 1]")
        self.rate = rate
        self.register_buffer("value", torch.zeros(num_classes + 1))
        self.register_buffer("updates", torch.zeros(num_classes + 1, dtype=torch.long))

    @torch.no_grad()
    def update(self, rewards: Tensor, label: Tensor) -> None:
        """Take in rewards `(M,)` of these labels `(M,)`: those of all ranks, so that all hold the same c."""
        batch, seen = self._batch(rewards, label)
        share = torch.clamp(1 / (self.updates + 1).float(), min=self.rate)
        # log of the weighted mean of e^value and e^batch, from the larger of the two; exact where they are equal
        rise = batch - self.value
        up = batch + torch.log1p((1 - share) * torch.expm1(-rise.clamp_min(0)))
        down = self.value + torch.log1p(share * torch.expm1(rise.clamp_max(0)))
        mixed = torch.where(self.updates == 0, batch, torch.where(rise > 0, up, down))
        self.value.copy_(torch.where(seen, mixed, self.value))
        self.updates.add_(seen.long())

    @torch.no_grad()
    def forward(self, rewards: Tensor, label: Tensor) -> Tensor:
        """c `(B,)` for samples of these labels `(B,)`; `rewards` and their labels are looked at for unseen classes."""
        batch, _ = self._batch(rewards.flatten(), label.repeat_interleave(rewards.numel() // len(label)))
        return torch.where(self.updates > 0, self.value, batch)[label]

    def _batch(self, rewards: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """log mean e^r by class, and which classes there are."""
        K = len(self.value)
        largest = torch.full((K,), -torch.inf, device=rewards.device)
        largest.scatter_reduce_(0, label, rewards.float(), "amax")
        count = torch.zeros(K, device=rewards.device).index_add_(
            0, label, torch.ones_like(rewards, dtype=torch.float32)
        )
        seen = count > 0
        shift = torch.where(seen, largest, 0.0)
        total = torch.zeros(K, device=rewards.device).index_add_(0, label, (rewards.float() - shift[label]).exp())
        return torch.where(seen, shift + (total / count.clamp_min(1)).log(), 0.0), seen
