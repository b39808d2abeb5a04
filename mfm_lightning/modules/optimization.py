"""The optimiser and its learning rate, the same settings for every module."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter

from mfm_lightning.training.muon import MuonAdamW

OPTIMIZERS = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW, "muon": MuonAdamW}
OWN = ("learning_rate", "betas", "weight_decay")  # settings of those; another has its own
FUSED = ("adamw",)  # three times faster on CPU; torch has no fused RAdam


@dataclass
class Optimization:
    """The optimiser and its learning rate; defaults are the paper's for Meta Flow Maps (Table 5).

    Args:
        optimizer: "radam", "adamw" or "muon" (of matrices; AdamW of the rest); or any by class path, `{class_path:
            torch.optim.SGD, init_args: {lr: 0.1}}`, whose settings are then all in its init_args.
        learning_rate: after the warm-up.
        betas: decay rates of the optimiser's moments.
        weight_decay: of the optimiser.
        warmup_steps: linear warm-up of the learning rate.
        final_learning_rate: reached at the last step by a cosine; None: constant after the warm-up, as in the paper.
        schedule: in place of warm-up and cosine, a schedule by class path, `{class_path:
            torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1000}}`; it counts optimiser steps.

    Raises:
        ValueError: for an unknown optimiser, a number out of range, or settings beside one by class path.
    """

    optimizer: str | OptimizerCallable = "radam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 2000
    final_learning_rate: float | None = None
    schedule: LRSchedulerCallable | None = None

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str):
            if self.optimizer not in OPTIMIZERS:
                raise ValueError(
                    f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}, or a class_path"
                )
        elif given := [f.name for f in fields(self) if f.name in OWN and getattr(self, f.name) != f.default]:
            raise ValueError(f"optimization.{given[0]} is beside an optimizer by class path: give it in its init_args")
        if self.schedule is not None and self.final_learning_rate is not None:
            raise ValueError("optimization.final_learning_rate is of the cosine, which the schedule replaces")

        for name in ("learning_rate", "weight_decay", "final_learning_rate", "warmup_steps"):
            value, least = getattr(self, name), ">" if name == "learning_rate" else ">="
            if value is not None and not (math.isfinite(value) and (value > 0 if least == ">" else value >= 0)):
                raise ValueError(f"optimization.{name} {value} must be a number {least} 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimization.betas {tuple(self.betas)} must lie in [0, 1)")

    def configure(
        self, parameters: Iterable[Parameter], max_steps: int, fused: bool = True
    ) -> OptimizerLRSchedulerConfig:
        """Optimiser and schedule as Lightning's `configure_optimizers` returns them.

        Args:
            fused: a fused optimiser, where torch has one.
        """
        if isinstance(self.optimizer, str):
            optimizer = OPTIMIZERS[self.optimizer](
                parameters, lr=self.learning_rate, betas=tuple(self.betas), weight_decay=self.weight_decay,
                **({"fused": True} if fused and self.optimizer in FUSED else {}),
            )  # fmt: skip
        else:
            optimizer = self.optimizer(parameters)
        if self.schedule is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}
        peak = float(optimizer.param_groups[0]["lr"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, max_steps, peak))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int, max_steps: int, peak: float | None = None) -> float:
        """What the learning rate, `peak` after the warm-up, is multiplied by at a step."""
        peak = self.learning_rate if peak is None else peak
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        final = 1.0 if self.final_learning_rate is None or not peak else self.final_learning_rate / peak
        progress = min(1.0, step / max(1, max_steps))
        return warmup * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
