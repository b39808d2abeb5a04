"""Flow-GRPO (Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from mfm_benchmarks.finetuning.groups import advantages, check_groups, group_conditions
from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem
from mfm_lightning.alignment.method import not_negative, positive
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import as_times, diffusion
from mfm_lightning.samplers import euler_maruyama


class Step(NamedTuple):
    """A step of a rollout that has noise: its time and the next, the states `(B, *shape)` at both, and the
    log-probability `(B,)` of the latter under the policy that made it."""

    now: float
    then: float
    x: Tensor
    x_next: Tensor
    log_probability: Tensor


@dataclass
class FlowGRPO(FineTuning):
    """Policy gradients on the steps of an SDE sampler: rollouts, advantages relative to their group, PPO's clipped
    ratio, and the KL divergence of each step from the base flow's (their Eqs. 3 to 5).

    Their SDE has sigma = a sqrt(t / (1-t)) with noise at t = 1; in our time sigma^2/2 = a^2/2 (1-t)/t, whose drift is
    b + sigma^2/2 score (their Eq. 8). It ends where they do, at the value of the first step's end, in place of infinity
    at t = 0. The step to data has no noise, so no probability, and is left out of the objective. Probabilities are
    those of a whole state, summed over its entries; their code takes means over entries, which is another scale of
    `kl_weight` and `clip`. All steps of a rollout are differentiated at once, so memory grows with their number.

    Args:
        steps: of a rollout (theirs: 10 in training).
        noise_level: a (theirs: 0.7).
        group_size: samples of a group, which share their conditions (theirs: 24).
        batch_size: samples of a rollout, whole groups.
        kl_weight: beta, weight of the KL divergence, against advantages of deviation 1 where they are normalised.
        clip: of the ratio of probabilities.
        epochs: updates by one rollout; in the first the ratio is 1.
        normalised: divide advantages by the group's standard deviation. Without, with kl_weight 1 and noise_level
            sqrt 2, whose SDE forgets its start, the optimum is the distribution tilted by e^r, r the scaled reward.

    Raises:
        ValueError: for numbers out of range, or a batch that is no whole groups.
    """

    steps: int = 10
    noise_level: float = 0.7
    group_size: int = 16
    batch_size: int = 64
    kl_weight: float = 0.0
    clip: float = 0.2
    epochs: int = 1
    normalised: bool = True

    def __post_init__(self) -> None:
        positive(epochs=self.epochs)
        not_negative(kl_weight=self.kl_weight, clip=self.clip, noise_level=self.noise_level)
        check_groups(self.batch_size, self.group_size)
        if self.steps < 2 or not self.noise_level:
            raise ValueError(
                f"steps {self.steps} must be at least 2, for the last has no noise, and noise_level "
                f"{self.noise_level} above 0"
            )

    def losses(self, problem: Problem) -> Iterator[Tensor]:
        B, G = self.batch_size, self.group_size
        while True:
            conditions = group_conditions(problem.draw(B // G), G, B, problem.device)
            policy, base = problem.on_policy(conditions), problem.target(conditions)
            rollout, x1 = self.rollout(policy, problem.noise(B))
            with torch.no_grad():
                advantage = advantages(policy.rewards(x1), G, self.normalised)
            for _ in range(self.epochs):
                yield torch.stack([self._loss(step, advantage, policy, base) for step in rollout]).mean()

    @torch.no_grad()
    def rollout(self, policy: Target, x: Tensor) -> tuple[list[Step], Tensor]:
        """The steps with noise, from noise `x` `(B, *shape)`, and the clean state."""
        found, times = [], torch.linspace(0, 1, self.steps + 1).tolist()
        for now, then in itertools.pairwise(times[:-1]):
            step = self.distribution(policy, now, then, x)
            x_next = step.sample()
            found.append(Step(now, then, x, x_next, log_probability(step, x_next)))
            x = x_next
        now = times[-2]
        x1, _ = euler_maruyama(now, 1, x, policy.drift(as_times(now, x), x), self.half_diffusion(now, x))
        return found, x1

    def half_diffusion(self, now: float, x: Tensor) -> Tensor:
        """sigma^2/2 = a^2/2 (1-t)/t, `(B,)`, at most its value at the end of the first step."""
        return self.noise_level**2 / 2 * diffusion(as_times(now, x), self.steps - 1.0)

    def distribution(self, target: Target, now: float, then: float, x: Tensor) -> Normal:
        """Of the state at `then`, given the state `x` at `now`; all entries are independent."""
        half = self.half_diffusion(now, x)
        mean, deviation = euler_maruyama(now, then, x, target.drift(as_times(now, x), x), half)
        if deviation is None:
            raise ValueError(f"the step from {now:g} to {then:g} has no noise, so no probability")
        return Normal(mean, deviation)

    def _loss(self, step: Step, advantage: Tensor, policy: Target, base: Target) -> Tensor:
        """-min(ratio A, clip(ratio) A) + beta KL, the mean over samples."""
        ours = self.distribution(policy, step.now, step.then, step.x)
        ratio = (log_probability(ours, step.x_next) - step.log_probability).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.kl_weight:
            with torch.no_grad():
                theirs = self.distribution(base, step.now, step.then, step.x)
            gap = (ours.mean - theirs.mean) / theirs.stddev  # of equal deviations
            loss = loss + self.kl_weight * gap.flatten(1).square().sum(dim=1) / 2
        return loss.mean()


def log_probability(step: Normal, x: Tensor) -> Tensor:
    """Of states `(B, *shape)`, `(B,)`."""
    return step.log_prob(x).flatten(1).sum(dim=1)
