"""A running estimate of log E[e^r], so that e^{r - c} neither overflows nor vanishes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

PRIOR = 4  # batches for which the level of all classes counts in a class's own
SLOTS = 4096  # of prompts: those that share one are normalised together, which is as right


class LogNormaliser(nn.Module):
    """c = log of a running mean of e^r, for each class and for the null label, kept in the log domain.

    The first batches count equally, later ones with `rate`. A batch is normalised by what came before it: c must not
    depend on the draws that it normalises. Only the very first batch has nothing before it, and is normalised by
    itself.

    A class has its own mean of e^r once that rests on enough draws. Until then its c is its level, a running mean of r
    that starts at that of all classes, plus log mean e^{r - level}, pooled over the draws of all classes. Any c is
    unbiased; a mean that rests on a draw or two makes weights e^{r-c} as wild as e^{r - r'}, though. With c from n
    draws of equal share, a weight above n is one that exceeds the sum of all n, so a record among them: for draws of
    one distribution the probability of a weight above K is at most 1/K + 1/(n+1), whatever that distribution is.

    Args:
        num_classes: labels 0..num_classes, the last one null.
        rate: of the running mean.
        enough: effective number of draws, 1 / sum p^2 for their shares p of the running mean of e^r, from which on a
            class has its own. So no draw has a share above enough^-0.5 there.

    Raises:
        ValueError: unless 0 < rate <= 1 and enough is at least 1.
    """

    # one entry for each label, and a last one for what is pooled
    value: Tensor
    concentration: Tensor
    level: Tensor
    updates: Tensor

    def __init__(self, num_classes: int = 0, rate: float = 0.02, enough: float = 16.0) -> None:
        super().__init__()
        if not 0 < rate <= 1 or enough < 1:
            raise ValueError(f"normaliser rate {rate} must lie in (0, 1], and enough {enough} be at least 1")
        self.rate, self.enough = rate, enough
        self.register_buffer("value", torch.zeros(num_classes + 2))
        self.register_buffer("concentration", torch.ones(num_classes + 2))  # sum p^2
        self.register_buffer("level", torch.zeros(num_classes + 2))
        self.register_buffer("updates", torch.zeros(num_classes + 2, dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but stay in float32: running means in bfloat16 (`bf16-true`) stand still at a rate below 2^-8."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def update(self, rewards: Tensor, label: Tensor) -> None:
        """Take in rewards `(M,)` of these labels `(M,)`: those of all ranks, so that all hold the same c."""
        rewards = rewards.float()
        self.level[-1] = torch.where(self.updates[-1] == 0, rewards.mean(), self.level[-1])
        # the pool is one more class, of rewards above their levels
        both, entry = torch.cat([rewards, rewards - self._levels()[label]]), torch.full_like(label, len(self.value) - 1)
        batch, concentration, mean, seen = self._batch(both, torch.cat([label, entry]))
        mean[-1] = rewards.mean()
        share = torch.clamp(1 / (self.updates + 1).float(), min=self.rate)
        # log of the weighted mean of e^value and e^batch, from the larger of the two; exact where they are equal
        rise = batch - self.value
        up = batch + torch.log1p((1 - share) * torch.expm1(-rise.clamp_min(0)))
        down = self.value + torch.log1p(share * torch.expm1(rise.clamp_max(0)))
        mixed = torch.where(self.updates == 0, batch, torch.where(rise > 0, up, down))
        of_batch = torch.where(self.updates == 0, 1.0, share * (batch - mixed).exp())  # the batch's share of the sum
        squares = (1 - of_batch) ** 2 * self.concentration + of_batch**2 * concentration
        level = torch.where(self.updates == 0, mean, self.level + share * (mean - self.level))
        for buffer, new in ((self.value, mixed), (self.concentration, squares), (self.level, level)):
            buffer.copy_(torch.where(seen, new, buffer))
        self.updates.add_(seen.long())

    @torch.no_grad()
    def forward(self, rewards: Tensor, label: Tensor) -> Tensor:
        """c `(B,)` for samples of these labels `(B,)`; `rewards` `(B, N)` matter only before the first update."""
        flat = rewards.flatten().float()
        pooled = self._levels() + self.value[-1]
        own = (self.updates[:-1] > 0) & (self.concentration[:-1] * self.enough <= 1)
        c = torch.where(own, self.value[:-1], pooled)[label]
        return torch.where(self.updates[-1] > 0, c, flat.logsumexp(0) - math.log(len(flat)))

    def _levels(self) -> Tensor:
        """Running means of r by label, `(num_classes + 1,)`, those of rarely seen classes near that of all."""
        seen = self.updates[:-1].float()
        return (seen * self.level[:-1] + PRIOR * self.level[-1]) / (seen + PRIOR)

    def _batch(self, rewards: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """log mean e^r by class, sum p^2 of the shares of its draws, mean r, and which classes there are."""

        def total(values: Tensor) -> Tensor:
            return torch.zeros_like(self.value).index_add_(0, label, values)

        largest = torch.full_like(self.value, -torch.inf).scatter_reduce_(0, label, rewards, "amax")
        count = total(torch.ones_like(rewards))
        seen, count = count > 0, count.clamp_min(1)
        shift = torch.where(seen, largest, 0.0)
        weights = (rewards - shift[label]).exp()  # 1 for the largest of each class
        sums = torch.where(seen, total(weights), 1.0)
        return shift + (sums / count).log(), total(weights**2) / sums**2, total(rewards) / count, seen


def prompt_slots(prompts: Sequence[str]) -> Tensor:
    """A class of `LogNormaliser(SLOTS)` for each prompt, `(B,)`, the same in all processes and runs."""
    return torch.tensor([zlib.crc32(text.encode()) % SLOTS for text in prompts], dtype=torch.long)
