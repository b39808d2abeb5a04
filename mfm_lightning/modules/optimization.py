"""The optimiser and its learning rate, the same settings for every module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter

OPTIMIZERS = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW}
FUSED = ("adamw",)  # three times faster on CPU; torch has no fused RAdam


@dataclass
class Optimization:
    """The optimiser and its learning rate; defaults are the paper's for Meta Flow Maps (Table 5).

    Args:
        optimizer: "radam" or "adamw".
        learning_rate: after the warm-up.
        betas: decay rates of the optimiser's moments.
        weight_decay: of the optimiser.
        warmup_steps: linear warm-up of the learning rate.
        final_learning_rate: reached at the last step by a cosine; None: constant after the warm-up, as in the paper.

    Raises:
        ValueError: for an unknown optimiser.
    """

    optimizer: str = "radam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 2000
    final_learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")

    def configure(
        self, parameters: Iterable[Parameter], max_steps: int, fused: bool = True
    ) -> OptimizerLRSchedulerConfig:
        """Optimiser and schedule as Lightning's `configure_optimizers` returns them.

        Args:
            fused: a fused optimiser, where torch has one.
        """
        optimizer = OPTIMIZERS[self.optimizer](
            parameters, lr=self.learning_rate, betas=tuple(self.betas), weight_decay=self.weight_decay,
            **({"fused": True} if fused and self.optimizer in FUSED else {}),
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int, max_steps: int) -> float:
        """What the learning rate is multiplied by at a step."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        final = 1.0 if self.final_learning_rate is None else self.final_learning_rate / self.learning_rate
        progress = min(1.0, step / max(1, max_steps))
        return warmup * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
