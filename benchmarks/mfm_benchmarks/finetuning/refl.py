"""ReFL (Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation", arXiv
2304.05977, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem
from mfm_lightning.alignment.method import positive
from mfm_lightning.interpolant import as_times, denoiser, interpolate
from mfm_lightning.samplers import integrate


@dataclass
class ReFL(FineTuning):
    """Samples without gradients up to one late step, chosen at random; from there the clean state is predicted in one
    go, D_t(x) = x + (1-t) b_t(x), and r(D_t(x)) ascended through that prediction. The loss of pretraining, here flow
    matching on data, is added: the reward's scale against it is what holds the policy near the base flow. Their map of
    rewards is a ReLU; here it is the identity, since rewards of any sign must be risen.

    Args:
        steps: Euler steps of a whole sample (theirs: 40).
        earliest: the first step that may be chosen, counted from 0; any up to the last may (theirs: 30 of 40).
        batch_size: samples of a step, and data of the pretraining loss.
        pretraining: weight of the loss of pretraining; 0 for none, which then needs no data.

    Raises:
        ValueError: unless 0 <= earliest < steps, for a batch below 1 or a negative weight.
    """

    steps: int = 12
    earliest: int = 9
    batch_size: int = 64
    pretraining: float = 1.0

    def __post_init__(self) -> None:
        positive(batch_size=self.batch_size)
        if not 0 <= self.earliest < self.steps:
            raise ValueError(f"earliest {self.earliest} must be one of the steps 0..{self.steps - 1}")
        if self.pretraining < 0:
            raise ValueError(f"pretraining {self.pretraining} must not be negative")

    @property
    def differentiates(self) -> bool:
        return True

    @property
    def takes_data(self) -> bool:
        return self.pretraining > 0

    def losses(self, problem: Problem) -> Iterator[Tensor]:
        times = torch.linspace(0, 1, self.steps + 1)
        while True:
            x = problem.noise(self.batch_size)
            target = problem.on_policy(problem.draw(len(x))).expand(x)
            chosen = int(torch.randint(self.earliest, self.steps, ()))
            if chosen:
                with torch.no_grad():
                    x = integrate(target.drift, x, times[: chosen + 1])
            t = as_times(times[chosen], x)
            loss = -target.rewards(denoiser(t, x, target.drift(t, x))).mean()
            if self.pretraining:
                loss = loss + self.pretraining * _flow_matching(problem, self.batch_size)
            yield loss


def _flow_matching(problem: Problem, num: int) -> Tensor:
    """E |b(t, x_t) - (x1 - x0)|^2 of the policy on data."""
    if problem.data is None:
        raise ValueError("ReFL's loss of pretraining needs data: give them, or set pretraining to 0")
    x1, conditions = problem.data(num)
    x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
    drift = problem.on_policy(conditions).expand(x1).drift(t, interpolate(t, x0, x1))
    return (drift - (x1 - x0)).flatten(1).square().sum(dim=1).mean()
