"""Trains a policy by a method until its evaluations are spent, and measures it on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem, move_towards, weights_of, with_weights
from mfm_benchmarks.measure import clock
from mfm_lightning.alignment.nfe import Meter


@dataclass
class Training:
    """How every method is trained: AdamW without weight decay, gradients clipped by norm, an average of the weights.

    Args:
        evaluations: of networks and reward, after which it ends; a backward counts as one more of each.
        checkpoints: shares of them, increasing, at which the policy is measured; before training it is, too.
        warmup: share of the evaluations over which the learning rate rises to its value: AdamW's first steps are as
            long as any, whatever the gradient, and alone take a policy nats away.
        betas: of AdamW.
        gradient_clip: largest norm of a gradient.
        average: decay of the average of the weights by steps, which is measured; 0: the weights themselves. Bounded
            by (1 + step) / (10 + step), so that the first weights do not stay in it.

    Raises:
        ValueError: for numbers out of range.
    """

    evaluations: int = 40_000
    checkpoints: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0])
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    average: float = 0.9

    def __post_init__(self) -> None:
        marks = self.checkpoints
        if not marks or sorted(set(marks)) != marks or marks[0] <= 0 or marks[-1] > 1:
            raise ValueError(f"training.checkpoints {marks} must increase, in (0, 1]")
        if self.evaluations < 1 or self.gradient_clip <= 0 or not (0 <= self.warmup < 1 and 0 <= self.average < 1):
            raise ValueError(
                f"training: evaluations {self.evaluations} must be at least 1, gradient_clip {self.gradient_clip} "
                f"above 0, warmup {self.warmup} and average {self.average} in [0, 1)"
            )


@dataclass
class Checkpoint:
    """Where a training stands: optimiser steps, what it has evaluated, and the seconds of training alone."""

    step: int
    meter: Meter
    seconds: float


def train(
    method: FineTuning,
    problem: Problem,
    settings: Training,
    learning_rate: float,
    seed: int,
    measure: Callable[[Checkpoint], None],
) -> None:
    """Train the problem's policy. `measure` is called at each checkpoint, the averaged weights in the policy; what it
    evaluates through other meters is not counted. Of two checkpoints within one step only the last is measured.

    torch's global random state is seeded inside, and kept outside.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    parameters, meter, device = problem.parameters, problem.meter, problem.device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=settings.betas, weight_decay=0.0)
    average, step, seconds = weights_of(parameters), 0, 0.0
    marks = [round(share * settings.evaluations) for share in settings.checkpoints]

    def reached(marks: Sequence[int]) -> list[int]:
        return [mark for mark in marks if meter.total >= mark]

    def show() -> None:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), with_weights(parameters, average):
            measure(Checkpoint(step, copy.copy(meter), seconds))

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        losses = method.losses(problem)
        show()
        begin = clock(device)
        while marks:
            loss = next(losses)
            if not torch.isfinite(loss.detach()):
                raise FloatingPointError(
                    f"{type(method).__name__}: the loss is {loss.item()} at step {step} with learning rate "
                    f"{learning_rate:g}: lower the learning rate or the reward's scale"
                )
            risen = meter.total / max(1.0, settings.warmup * settings.evaluations)
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, risen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            step += 1
            move_towards(average, parameters, 1 - min(settings.average, step / (9 + step)))
            if reached(marks):
                seconds += clock(device) - begin
                show()
                marks = marks[len(reached(marks)) :]
                begin = clock(device)
