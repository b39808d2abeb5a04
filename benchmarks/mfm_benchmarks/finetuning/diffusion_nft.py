"""DiffusionNFT (Zheng et al., "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv 2509.16117,
section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_benchmarks.finetuning.groups import advantages, check_groups, group_conditions
from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem, move_towards, weights_of, with_weights
from mfm_lightning.alignment.method import positive
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import expand, interpolate


@dataclass
class DiffusionNFT(FineTuning):
    """Flow matching on samples of an old policy, with two implicit policies of the trained velocity v:
    v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v. The loss is
    p |v+ - (x1 - x0)|^2 + (1 - p) |v- - (x1 - x0)|^2 with p in [0, 1] of the reward beside its group:
    p = 1/2 + 1/2 clip((r - mean) / deviation, -1, 1). The old policy follows the trained one:
    old <- eta old + (1 - eta) new, eta = min(`decay_rate` step, `max_decay`).

    Errors of velocities have no weight by time here; theirs is by the size of the error of the clean state. Nothing but
    the old policy's lag and the end of training holds it near the base flow.

    Args:
        beta: how far the implicit policies lie from the old one.
        steps: Euler steps of the old policy's samples.
        group_size: samples of a group, which share their conditions.
        batch_size: samples of a step, whole groups.
        updates: losses of one set of samples, each with new times and noise.
        decay_rate: of eta by steps of the old policy (theirs: 0.001).
        max_decay: the largest eta (theirs: 0.5).

    Raises:
        ValueError: for numbers out of range, or a batch that is no whole groups.
    """

    beta: float = 1.0
    steps: int = 10
    group_size: int = 16
    batch_size: int = 64
    updates: int = 1
    decay_rate: float = 0.001
    max_decay: float = 0.5

    def __post_init__(self) -> None:
        positive(steps=self.steps, updates=self.updates)
        check_groups(self.batch_size, self.group_size)
        if self.beta <= 0 or self.decay_rate < 0 or not 0 <= self.max_decay <= 1:
            raise ValueError(
                f"beta {self.beta} must be above 0, decay_rate {self.decay_rate} not negative, and max_decay "
                f"{self.max_decay} in [0, 1]"
            )

    def losses(self, problem: Problem) -> Iterator[Tensor]:
        B, G, old, step = self.batch_size, self.group_size, weights_of(problem.parameters), 0
        while True:
            conditions = group_conditions(problem.draw(B // G), G, B, problem.device)
            with torch.no_grad(), with_weights(problem.parameters, old):
                x1 = problem.sample(conditions, B, self.steps)
                p = optimality(problem.target(conditions).rewards(x1), G)
            for _ in range(self.updates):
                yield self._loss(problem, conditions, old, x1, p)
            step += 1
            move_towards(old, problem.parameters, 1 - min(self.decay_rate * step, self.max_decay))

    def _loss(self, problem: Problem, conditions: Conditions, old: list[Tensor], x1: Tensor, p: Tensor) -> Tensor:
        policy, x0, t = problem.on_policy(conditions), torch.randn_like(x1), torch.rand(len(x1), device=x1.device)
        x = interpolate(t, x0, x1)
        with torch.no_grad(), with_weights(problem.parameters, old):
            v_old = policy.drift(t, x)
        return contrast(policy.drift(t, x), v_old, x1 - x0, p, self.beta)


def optimality(rewards: Tensor, group_size: int) -> Tensor:
    """p = 1/2 + 1/2 clip(advantage, -1, 1), `(B,)`, of rewards `(B,)` by group."""
    return (1 + advantages(rewards, group_size).clamp(-1, 1)) / 2


def contrast(v: Tensor, v_old: Tensor, velocity: Tensor, p: Tensor, beta: float) -> Tensor:
    """p |v+ - velocity|^2 + (1 - p) |v- - velocity|^2, the mean over samples.

    Args:
        v: velocity `(B, *shape)` of the trained policy.
        v_old: velocity `(B, *shape)` of the old policy.
        velocity: x1 - x0, `(B, *shape)`.
        p: `(B,)`.
    """
    step = beta * (v - v_old)
    up, down = (v_old + step - velocity).square(), (v_old - step - velocity).square()
    weight = expand(p, v)
    return (weight * up + (1 - weight) * down).flatten(1).sum(dim=1).mean()
