"""What one training sample is made of, and how its times are drawn."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import interpolate

END = sys.maxsize  # a training step after all curricula


@dataclass(frozen=True)
class Pair:
    """Data and the noisy state made from it.

    Attributes:
        x1: clean data `(B, *shape)`.
        t: outer time `(B,)`.
        x_t: outer state `(B, *shape)`, pure noise at t = 0.
        conditions: with a row for each sample, some of them null; guidance 1 where they are, None where nothing is
            guided.
    """

    x1: Tensor
    t: Tensor
    x_t: Tensor
    conditions: Conditions

    def take(self, rows: slice) -> Pair:
        """Some of the samples."""
        return Pair(self.x1[rows], self.t[rows], self.x_t[rows], self.conditions.take(rows))

    def inner(self, s: Tensor, u: Tensor | None = None, num_equal: int = 0, step: int = 0) -> InnerSample:
        """An inner sample of a training step at times s <= u `(B,)` with fresh noise; u = s where None."""
        eps = torch.randn_like(self.x1)
        return InnerSample(s, s if u is None else u, eps, interpolate(s, eps, self.x1), num_equal, step=step)


@dataclass
class InnerSample:
    """Where a term looks at the flow of a pair's posterior.

    Attributes:
        s: inner time `(B,)`.
        u: inner time `(B,)`, s <= u.
        eps: inner noise `(B, *shape)`.
        x: the inner interpolant (1-s) eps + s x1, `(B, *shape)`.
        num_equal: the first so many samples have u = s.
        teacher_velocity: the teacher's GLASS velocity at (s, x), once a term asked for it.
        step: of training, for terms that change with it.
    """

    s: Tensor
    u: Tensor
    eps: Tensor
    x: Tensor
    num_equal: int = 0
    teacher_velocity: Tensor | None = None
    step: int = 0

    @property
    def at_start(self) -> Tensor:
        """The teacher's velocity, which a term asked for."""
        if self.teacher_velocity is None:
            raise ValueError("the teacher's velocity is not in the inner sample: the term must set teacher_at_start")
        return self.teacher_velocity

    def take(self, rows: slice) -> InnerSample:
        """Some of the samples, all counted as u > s."""
        velocity = None if self.teacher_velocity is None else self.teacher_velocity[rows]
        return InnerSample(self.s[rows], self.u[rows], self.eps[rows], self.x[rows], 0, velocity, self.step)


@dataclass
class ConditionTimes:
    """Outer times t = U^power, U uniform in (0, 1), and some times 0.

    Args:
        power: 2 in the release; above 1: more times near noise. With 0 every time is 0: the base flow alone is trained.
        zero_rate: probability of t = 0, in [0, 1]; 0.1 in the release.

    Raises:
        ValueError: for a number out of range.
    """

    power: float = 2.0
    zero_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.power < 0 or not 0 <= self.zero_rate <= 1:
            raise ValueError(f"power {self.power} must be >= 0 and zero_rate {self.zero_rate} in [0, 1]")

    @property
    def always_zero(self) -> bool:
        """Whether every time is 0."""
        return self.power == 0 or self.zero_rate == 1

    def sample(self, num: int, device: torch.device) -> Tensor:
        """`(num,)` times in [0, 1)."""
        t = torch.rand(num, device=device) ** self.power if self.power else torch.zeros(num, device=device)
        return torch.where(torch.rand(num, device=device) < self.zero_rate, 0.0, t)


@dataclass
class InnerTimes:
    """Inner times s <= u: two draws, sorted.

    Args:
        distribution: "uniform", or "logit_normal" (sigmoid of N(mean, std^2)).
        mean: of the logit-normal distribution.
        std: of the logit-normal distribution.
        shift: of a text-to-image flow's scheduler: sigma = 1 - s becomes shift sigma / (1 + (shift - 1) sigma), so that
            above 1 there are more times near noise (Esser et al., arXiv 2403.03206, Eq. 23); 1 for none. SD3's is 3.
        annealing_steps: over so many steps the gap u - s grows from 0 to what was drawn (0: none, as in the release).
        equal_rate: share of each batch, its first samples, with u = s, where a consistency term is the diagonal's (the
            share of r = t of Mean Flows, arXiv 2505.13447): one consistency term then trains both parts at less than
            the cost of one.
        draw_rate: share of each batch, its last samples, with s = 0 and u = 1: the step of a one-step draw, a corner
            that two drawn times hardly come to. Under annealing u is less than 1 there, too; where terms share the
            inner sample, the diagonal's times are 0 in that share.

    Raises:
        ValueError: for an unknown distribution, rates outside [0, 1] or of more than 1 together, or a shift that is not
            positive.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    annealing_steps: int = 0
    equal_rate: float = 0.0
    shift: float = 1.0
    draw_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("equal_rate", "draw_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be in [0, 1]")
        if self.equal_rate + self.draw_rate > 1:
            raise ValueError(f"equal_rate {self.equal_rate} and draw_rate {self.draw_rate} are more than 1 together")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift {self.shift} must be positive")
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"unknown distribution {self.distribution!r}: expected uniform or logit_normal")

    def one(self, num: int, device: torch.device) -> Tensor:
        """`(num,)` times for the diagonal."""
        if self.distribution == "uniform":
            s = torch.rand(num, device=device)
        else:
            s = torch.sigmoid(self.mean + self.std * torch.randn(num, device=device))
        return s if self.shift == 1 else s / (s + self.shift * (1 - s))

    def num_equal(self, num: int) -> int:
        """How many of `num` samples have u = s: the first ones (the samples of a batch are exchangeable)."""
        return round(self.equal_rate * num)

    def two(self, num: int, device: torch.device, step: int = 0) -> tuple[Tensor, Tensor]:
        """`(num,)` times s and u, s <= u."""
        a, b = self.one(num, device), self.one(num, device)
        s, u = torch.minimum(a, b), torch.maximum(a, b)
        k = self.num_equal(num)
        u = torch.cat([s[:k], u[k:]])
        if d := min(round(self.draw_rate * num), num - k):
            s, u = torch.cat([s[:-d], torch.zeros_like(s[-d:])]), torch.cat([u[:-d], torch.ones_like(u[-d:])])
        if self.annealing_steps:
            u = s + (u - s) * min(1.0, step / self.annealing_steps)
        return s, u


def noised(
    x1: Tensor,
    conditions: Conditions,
    times: ConditionTimes,
    class_dropout: float,
    null: Conditions,
) -> Pair:
    """Training states of data `(B, *shape)`: outer times are drawn, some conditions dropped to null, noise is mixed in.

    Args:
        x1: data `(B, *shape)`.
        conditions: as they came with the data; what is missing becomes null.
        times: of the states.
        class_dropout: probability that a sample's conditions are dropped.
        null: the network's null condition.
    """
    B = len(x1)
    t = times.sample(B, x1.device)
    dropped = torch.rand(B, device=x1.device) < class_dropout
    conditions = conditions.filled(replace(null, guidance=None)).drop(dropped, null)
    return Pair(x1, t, interpolate(t, torch.randn_like(x1), x1), conditions)


@dataclass
class PairSampler:
    """Draws a `Pair` from data: condition times, class dropout and the guidance scale.

    Args:
        condition_times: outer times.
        class_dropout: probability that a sample's conditions become null, in [0, 1].
        guidance_scale: guidance scale, always on unless the conditions are dropped (release: 2.5); 1 for none.

    Raises:
        ValueError: for a number out of range.
    """

    condition_times: ConditionTimes = field(default_factory=ConditionTimes)
    class_dropout: float = 0.2
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1 or self.guidance_scale < 1:
            raise ValueError(
                f"class_dropout {self.class_dropout} must be in [0, 1] and guidance_scale {self.guidance_scale} >= 1"
            )

    def sample(self, x1: Tensor, conditions: Conditions, null: Conditions) -> Pair:
        """A pair for data `(B, *shape)` and its conditions.

        Args:
            x1: data `(B, *shape)`.
            conditions: as they came with the data.
            null: the network's null condition.
        """
        pair = noised(x1, conditions, self.condition_times, self.class_dropout, null)
        if self.guidance_scale == 1:
            return pair
        scale = torch.where(pair.conditions.is_null(null), 1.0, self.guidance_scale)
        return replace(pair, conditions=replace(pair.conditions, guidance=scale))
