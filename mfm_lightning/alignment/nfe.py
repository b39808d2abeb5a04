"""Counting function evaluations as they happen (NFE; paper, F.3.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Meter:
    """Evaluations of one state each, of networks and rewards; a backward pass counts as one more.

    Attributes:
        network: evaluations of velocities and drifts, forward and backward.
        reward: evaluations of rewards, forward and backward.
    """

    network: int = 0
    reward: int = 0

    @property
    def total(self) -> int:
        return self.network + self.reward

    def __sub__(self, other: Meter) -> Meter:
        """What was counted since `other`, a copy taken earlier."""
        return Meter(self.network - other.network, self.reward - other.reward)

    def counted(self, kind: str, function: Callable[..., Tensor], each: int = 1) -> Callable[..., Tensor]:
        """`function`, with the rows of what it returns counted as `kind`, each so many times, and again when a gradient
        comes back."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            result = function(*args, **kwargs)
            self._add(kind, each * len(result))
            if result.requires_grad:
                result.register_hook(lambda gradient: self._add(kind, each * len(gradient)))
            return result

        return call

    def _add(self, kind: str, rows: int) -> None:
        setattr(self, kind, getattr(self, kind) + rows)
