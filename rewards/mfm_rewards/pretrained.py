"""What rewards with a pretrained network have in common: it is frozen, and run as an `Execution` says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfm_rewards.execution import Execution, as_execution, autocast
from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.protocol import Reward


@dataclass(frozen=True)
class Card:
    """What a user wants to know about pretrained weights before getting them.

    Args:
        measures: what the reward measures.
        values: its usual range.
        licence: of the weights.
        source: of the weights, with the paper.
        fetch: the command that downloads them.
        parameters: in millions.
        activations: GB that an image keeps for its gradient, in fp32.
    """

    measures: str
    values: str
    licence: str
    source: str
    fetch: str
    parameters: float
    activations: float

    @property
    def memory(self) -> str:
        """Expected memory in fp32: of the weights, and of each image whose gradient is wanted."""
        return f"{self.parameters * 4 / 1000:.1f} GB + {self.activations:.1f} GB/image"


class PretrainedReward(Reward):
    """Base class of rewards with a pretrained network. A subclass builds it, calls `freeze`, and implements `score`.

    It stays in evaluation mode, and its weights are not trained. It returns float32 (float64 if its weights are), and
    ignores autocast around it: the precision is the one given here.

    Args:
        execution: how the network is run, an `mfm_rewards.execution.Execution` or a dictionary of its fields; the
            defaults of `Execution` where None.
    """

    card: Card
    preprocess: Preprocessing

    def __init__(self, execution: Execution | dict[str, Any] | None = None) -> None:
        super().__init__()
        self.execution = as_execution(execution)

    @abstractmethod
    def score(self, pixels: Tensor, *context: Any, **named: Any) -> Tensor:
        """Rewards `(B,)` of preprocessed images `(B, 3, size, size)` and what else the reward `needs`, in its order."""

    def freeze(self, stacks: Iterable[nn.ModuleList]) -> None:
        """Freeze the weights, and run the blocks of each stack as `execution` says."""
        self.eval().requires_grad_(False)
        for stack in stacks:
            for i, block in enumerate(stack):
                if self.execution.compile:
                    block.compile()
                if self.execution.checkpoint_activations:
                    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

                    stack[i] = checkpoint_wrapper(block)

    def train(self, mode: bool = True) -> PretrainedReward:
        """Stays in evaluation mode, whatever `mode` is: a frozen network has no use for dropout."""
        return super().train(False)

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        graph = torch.is_grad_enabled() and images.requires_grad
        rows = self.execution.max_rows
        starts = range(0, len(images), rows)
        if len(starts) <= 1:
            return self._part(images, *context)
        parts = [(images[i : i + rows], *[c[i : i + rows] for c in context]) for i in starts]
        if graph:
            return torch.cat([cast(Tensor, checkpoint(self._part, *part, use_reentrant=False)) for part in parts])
        return torch.cat([self._part(*part) for part in parts])

    def _part(self, images: Tensor, *context: Any) -> Tensor:
        dtype = next(self.parameters()).dtype
        with autocast(images.device, "fp32"):
            return at_least_float32(self.score(self.preprocess(images.to(dtype)), *context))


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32; float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
