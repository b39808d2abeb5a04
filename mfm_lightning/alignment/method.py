"""What an alignment method is: an object with its settings as fields, called with a target and noise."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.result import AlignmentResult
from mfm_lightning.alignment.target import Target, is_plain_flow_map, require_gradient
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.interpolant import Generators, expand, randn
from mfm_lightning.models import MetaFlowMap
from mfm_rewards import Reward


class AlignmentMethod(ABC):
    """Aligned samples from noise. A config names it with its fields, Python calls it.

    Attributes:
        uses_reward_scale: whether the result depends on the reward's multiplier; not where only the order of rewards
            counts.
        needs_flow_map: whether the method itself, besides its parts, is made of the flow map of the model.
    """

    uses_reward_scale: bool = True
    needs_flow_map: bool = False

    @property
    def needs_reward_gradient(self) -> bool:
        """Whether the reward must be differentiable."""
        return False

    @property
    def needs_meta_flow_map(self) -> bool:
        """Whether posteriors are drawn from the model, which must then be no plain flow map."""
        return False

    def check(self, reward: Reward, model: object = None) -> None:
        """Refuse before any work what does not give what the method needs.

        Raises:
            RewardError: for a reward without a gradient, where one is needed.
            CheckpointError: for a `model` that is a plain flow map or none at all, where posteriors are drawn from it;
                for one that is no flow map, where a part needs one.
        """
        if self.needs_reward_gradient:
            require_gradient(reward, type(self).__name__)
        if self.needs_meta_flow_map and is_plain_flow_map(model):
            raise CheckpointError(
                f"{type(self).__name__} draws posteriors from the model, which is a plain flow map: use "
                "DiamondGradient, DiamondGradientFree or DiamondPosterior in it (docs/lookahead.md), or give a Meta "
                "Flow Map's file"
            )
        if self.needs_meta_flow_map and model is not None and not isinstance(model, MetaFlowMap):
            raise CheckpointError(
                f"{type(self).__name__} draws posteriors from the model, and a {type(model).__name__} gives none: "
                "give it a posterior, such as GlassPosterior, or steer by DPSGradient"
            )
        has_map = model is None or isinstance(model, MetaFlowMap) or hasattr(model, "base_flow_map")
        if not has_map and (part := _needing_a_flow_map(self)) is not None:
            raise CheckpointError(
                f"{type(part).__name__} needs a flow map, and a {type(model).__name__} has none: use a method of its "
                "drift alone, such as Steering by DPSGradient, Search with a GlassPosterior, or FeynmanKac"
            )

    @abstractmethod
    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        """One sample for each noise x0 `(B, *shape)`.

        Args:
            target: with conditions for B samples, or one row for all.
            x0: noise `(B, *shape)`, one row for each sample.
            generator: of all further noise: one, or one for each sample, whose result then does not depend on the batch
                that it is in.

        Raises:
            RewardError: before any work if the method needs a gradient that the reward has not got; while running if
                the reward fails, with the step, and the states so far as the error's `states`.
        """


def _needing_a_flow_map(part: Any) -> Any | None:
    """A method, or a part of it at any depth, that is made of a flow map; None where a drift is enough."""
    if part.needs_flow_map:
        return part
    inside = [value for value in vars(part).values() if hasattr(value, "needs_flow_map")]
    return next((found for value in inside if (found := _needing_a_flow_map(value)) is not None), None)


@dataclass
class TimeGrid:
    """`steps + 1` times from `start` to `end`, uniform in u with t = u^power.

    Args:
        steps: at least 1.
        start: first time, in [0, end).
        end: last time, at most 1.
        power: above 1 the grid is finer near noise; positive.
        of_model: in place of the others, the model's own grid of so many steps: a text-to-image flow's scheduler.
        shift: of the model's own grid, in place of its scheduler's.

    Raises:
        ValueError: for a number out of range, or a shift of another grid than the model's.
    """

    steps: int = 100
    start: float = 0.01
    end: float = 1.0
    power: float = 1.0
    of_model: bool = False
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and not self.of_model:
            raise ValueError(f"shift {self.shift} is of a model's own grid: set of_model, or leave it out")
        if self.of_model and (self.start, self.end, self.power) != (0.01, 1.0, 1.0):
            raise ValueError("a model's own grid has its own start, end and power: leave them out, or of_model")
        if self.steps < 1 or not 0 <= self.start < self.end <= 1 or self.power <= 0:
            raise ValueError(
                f"a time grid needs steps ({self.steps}) >= 1, 0 <= start ({self.start}) < end ({self.end}) <= 1 and "
                f"power ({self.power}) > 0"
            )

    @property
    def times(self) -> list[float]:
        """The times, increasing; where they are not the model's own."""
        first, last = (end ** (1 / self.power) for end in (self.start, self.end))
        grid = torch.linspace(first, last, self.steps + 1, dtype=torch.float64) ** self.power
        return [self.start, *grid[1:-1].tolist(), self.end]

    def pairs(self, model: object) -> list[tuple[float, float]]:
        """Each step's time and the next, for samples of a model.

        Raises:
            TypeError: for `of_model`, if the model has no grid of its own.
        """
        if not self.of_model:
            return list(itertools.pairwise(self.times))
        if (own := getattr(model, "time_grid", None)) is None:
            raise TypeError(f"a {type(model).__name__} has no time grid of its own: leave out of_model")
        return list(itertools.pairwise(own(self.steps, self.shift)))


def with_particles(x0: Tensor, num_particles: int, generator: Generators = None) -> Tensor:
    """`(B*M, *shape)` noise whose first particle of each sample is x0 `(B, *shape)`."""
    others = randn((len(x0), num_particles - 1, *x0.shape[1:]), x0, generator)
    return torch.cat([x0[:, None], others], dim=1).flatten(0, 1)


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless a setting is one of those known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")


def positive(**numbers: int) -> None:
    """Raise ValueError unless each of these settings is at least 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")


def not_negative(**numbers: float | None) -> None:
    """Raise ValueError unless each of these settings, where it is given, is a number that is not negative."""
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} {value} must be a number that is not negative")


def norms(x: Tensor) -> Tensor:
    """Norm of each `(B, *shape)`, as `(B, 1, ...)`, which does not overflow where the numbers themselves do not."""
    largest = x.abs().flatten(1).amax(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    norm = (x.flatten(1) / largest[:, None]).norm(dim=1) * largest
    return expand(norm, x)
