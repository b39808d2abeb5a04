"""What rewards with a pretrained network have in common: frozen, with a precision and a memory bound of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.protocol import Reward


@dataclass(frozen=True)
class Card:
    """What a user wants to know of pretrained weights before getting them.

    measures, values: what the reward tells, and its usual range; licence, source: of the weights, with the paper;
    fetch: the command that gets them; parameters: in millions; activations: GB that an image keeps for its gradient, in
    fp32.
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
    """Base class. A subclass builds its network, calls `freeze`, and implements `score`.

    Always in evaluation mode, and nothing in it is trained. It computes in its own precision, whatever autocast is
    around it, and returns float32 (float64 if its weights are).

    Args:
        precision: of the network, "fp32", or "bf16" by autocast; what is made of its features is computed in fp32.
        checkpoint_activations: keep the input of each block only and compute the rest again in the backward pass.
        compile: `torch.compile`, block by block.
        max_rows: images at once; with a gradient, parts are computed again in the backward pass: memory is that of one.
    """

    card: Card
    preprocess: Preprocessing

    def __init__(
        self,
        precision: str = "fp32",
        checkpoint_activations: bool = False,
        compile: bool = False,
        max_rows: int = 64,
    ) -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"unknown precision {precision!r}: expected 'fp32' or 'bf16'")
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.precision, self.max_rows = precision, max_rows
        self._checkpoint, self._compile = checkpoint_activations, compile

    def in_precision(self, device: torch.device) -> torch.autocast:
        """A context for the network alone."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def score(self, pixels: Tensor, *context: Any) -> Tensor:
        """Rewards `(B,)` of preprocessed images `(B, 3, size, size)`."""
        raise TypeError(f"{type(self).__name__} must implement score(pixels, ...)")

    def freeze(self, stacks: Iterable[nn.ModuleList]) -> None:
        """Freeze the weights, and make the blocks of each stack be executed as the options say."""
        self.eval().requires_grad_(False)
        for stack in stacks:
            for i, block in enumerate(stack):
                if self._compile:
                    block.compile()
                if self._checkpoint:
                    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

                    stack[i] = checkpoint_wrapper(block)

    def train(self, mode: bool = True) -> PretrainedReward:
        """Stays in evaluation mode: a frozen network has no use for dropout."""
        return super().train(False)

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        graph = torch.is_grad_enabled() and images.requires_grad
        starts = range(0, len(images), self.max_rows)
        if len(starts) <= 1:
            return self._part(images, *context)
        parts = [(images[i : i + self.max_rows], *[c[i : i + self.max_rows] for c in context]) for i in starts]
        if graph:
            return torch.cat([checkpoint(self._part, *part, use_reentrant=False) for part in parts])
        return torch.cat([self._part(*part) for part in parts])

    def _part(self, images: Tensor, *context: Any) -> Tensor:
        dtype = next(self.parameters()).dtype
        with torch.autocast(images.device.type, enabled=False):  # any around it
            return at_least_float32(self.score(self.preprocess(images.to(dtype)), *context))


def at_least_float32(x: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
