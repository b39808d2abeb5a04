"""What one training sample is made of, and how its times are drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.interpolant import interpolate


@dataclass(frozen=True)
class Pair:
    """Data and the noisy state made from it.

    x1: clean data `(B, *shape)`; t, x_t: outer time `(B,)` and state, pure noise at t = 0; label: `(B,)` with some
    dropped to the null label; guidance: `(B,)` scale, 1 where the label is dropped; None where nothing is guided.
    """

    x1: Tensor
    t: Tensor
    x_t: Tensor
    label: Tensor
    guidance: Tensor | None = None

    def take(self, rows: slice) -> Pair:
        """Some of the samples."""
        guidance = None if self.guidance is None else self.guidance[rows]
        return Pair(self.x1[rows], self.t[rows], self.x_t[rows], self.label[rows], guidance)

    def inner(self, s: Tensor, u: Tensor | None = None, num_equal: int = 0) -> InnerSample:
        """An inner sample at times s <= u `(B,)` with fresh noise; u = s where None."""
        eps = torch.randn_like(self.x1)
        return InnerSample(s, s if u is None else u, eps, interpolate(s, eps, self.x1), num_equal)


@dataclass
class InnerSample:
    """Where a term looks at the flow of a pair's posterior.

    s, u: inner times `(B,)`, s <= u; eps: inner noise; x: the inner interpolant (1-s) eps + s x1, `(B, *shape)`;
    num_equal: the first so many have u = s; teacher_velocity: the teacher's GLASS velocity at (s, x), once a term asked
    for it.
    """

    s: Tensor
    u: Tensor
    eps: Tensor
    x: Tensor
    num_equal: int = 0
    teacher_velocity: Tensor | None = None

    def take(self, rows: slice) -> InnerSample:
        """Some of the samples, all counted as u > s."""
        velocity = None if self.teacher_velocity is None else self.teacher_velocity[rows]
        return InnerSample(self.s[rows], self.u[rows], self.eps[rows], self.x[rows], 0, velocity)


@dataclass
class ConditionTimes:
    """Outer times t = U^power, and 0 with probability `zero_rate` (release: 2 and 0.1).

    With power 0 every time is 0: training of the base flow alone.
    """

    power: float = 2.0
    zero_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.power < 0 or not 0 <= self.zero_rate <= 1:
            raise ValueError(f"power {self.power} must be >= 0 and zero_rate {self.zero_rate} in [0, 1]")

    def sample(self, num: int, device: torch.device) -> Tensor:
        """`(num,)` times in [0, 1)."""
        t = torch.rand(num, device=device) ** self.power if self.power else torch.zeros(num, device=device)
        return torch.where(torch.rand(num, device=device) < self.zero_rate, 0.0, t)


@dataclass
class InnerTimes:
    """Inner times s <= u: two draws, sorted.

    distribution: "uniform", or "logit_normal" (sigmoid of N(mean, std^2)).
    annealing_steps: over so many steps the gap u - s grows from 0 to what was drawn (0: none, as in the release).
    equal_rate: share of each batch, its first samples, with u = s, where a consistency term is the diagonal's (the
        share of r = t of Mean Flows, arXiv 2505.13447): one consistency term then trains both parts at less than the
        cost of one.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    annealing_steps: int = 0
    equal_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.equal_rate <= 1:
            raise ValueError(f"equal_rate {self.equal_rate} must be in [0, 1]")
        if self.distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"unknown distribution {self.distribution!r}: expected uniform or logit_normal")

    def one(self, num: int, device: torch.device) -> Tensor:
        """`(num,)` times for the diagonal."""
        if self.distribution == "uniform":
            return torch.rand(num, device=device)
        return torch.sigmoid(self.mean + self.std * torch.randn(num, device=device))

    def num_equal(self, num: int) -> int:
        """How many of `num` samples have u = s: the first ones (the samples of a batch are exchangeable)."""
        return round(self.equal_rate * num)

    def two(self, num: int, device: torch.device, step: int = 0) -> tuple[Tensor, Tensor]:
        """`(num,)` times s and u, s <= u."""
        a, b = self.one(num, device), self.one(num, device)
        s, u = torch.minimum(a, b), torch.maximum(a, b)
        k = self.num_equal(num)
        u = torch.cat([s[:k], u[k:]])
        if self.annealing_steps:
            u = s + (u - s) * min(1.0, step / self.annealing_steps)
        return s, u


@dataclass
class PairSampler:
    """Draws a `Pair` from data: condition times, class dropout and the guidance scale.

    class_dropout: probability that a label becomes the null label.
    guidance_scale: class-guidance scale, always on unless the label is dropped (release: 2.5); 1 for none.
    """

    condition_times: ConditionTimes = dataclasses.field(default_factory=ConditionTimes)
    class_dropout: float = 0.2
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1 or self.guidance_scale < 1:
            raise ValueError(
                f"class_dropout {self.class_dropout} must be in [0, 1] and guidance_scale {self.guidance_scale} >= 1"
            )

    def sample(self, x1: Tensor, label: Tensor | None, num_classes: int) -> Pair:
        """A pair for data `(B, *shape)` and labels `(B,)` or None."""
        B = len(x1)
        t = self.condition_times.sample(B, x1.device)
        label = torch.full((B,), num_classes, device=x1.device) if label is None else label
        dropped = torch.rand(B, device=x1.device) < self.class_dropout
        label = torch.where(dropped, num_classes, label)
        guidance = None if self.guidance_scale == 1 else torch.where(label == num_classes, 1.0, self.guidance_scale)
        return Pair(x1, t, interpolate(t, torch.randn_like(x1), x1), label, guidance)
