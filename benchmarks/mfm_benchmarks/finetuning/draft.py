"""DRaFT-K (Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv 2309.17400)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem
from mfm_lightning.alignment.method import positive
from mfm_lightning.glass import BaseDrift
from mfm_lightning.samplers import integrate


@dataclass
class DRaFT(FineTuning):
    """Ascends E[r(x1)] with the gradient through the last K steps of sampling alone (their section 3; K = `steps` is
    DRaFT). Here the sampler is the flow's ODE by Euler steps. Nothing but the end of training holds it near the base
    flow. Left out: DRaFT-LV's further noises for K = 1, and LoRA, which is a matter of the policy's parameters.

    Args:
        last: K.
        steps: Euler steps of a sample.
        batch_size: samples of a step.

    Raises:
        ValueError: unless 1 <= last <= steps, or for a batch below 1.
    """

    last: int = 1
    steps: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        positive(last=self.last, batch_size=self.batch_size)
        if self.last > self.steps:
            raise ValueError(f"last {self.last} of {self.steps} steps: expected at most as many")

    @property
    def differentiates(self) -> bool:
        return True

    def losses(self, problem: Problem) -> Iterator[Tensor]:
        while True:
            x0 = problem.noise(self.batch_size)
            target = problem.on_policy(problem.draw(len(x0))).expand(x0)
            yield -target.rewards(self.samples(target.drift, x0)).mean()

    def samples(self, drift: BaseDrift, x0: Tensor) -> Tensor:
        """x1 `(B, *shape)` from noise `x0`, with a graph through the last K steps."""
        times, first, x = torch.linspace(0, 1, self.steps + 1), self.steps - self.last, x0
        if first:
            with torch.no_grad():
                x = integrate(drift, x, times[: first + 1])
        return integrate(drift, x, times[first:])
