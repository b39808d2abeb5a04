"""Rewards made of others: weighted sums, scaling, negation, clamping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mfm_rewards.protocol import Reward, evaluate
from mfm_rewards.registry import build, register


class _Combination(Reward):
    """Several rewards on the same images; differentiable if all are, and needs what any of them needs."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(build(part) for part in parts)
        self.differentiable = all(part.differentiable for part in self.parts)
        self.needs = ("images", *[n for n in ("prompts", "labels") if any(n in part.needs for part in self.parts)])

    def _values(self, images: Tensor, context: tuple) -> list[Tensor]:
        given = dict(zip(self.needs[1:], context, strict=True))
        return [evaluate(p, images, given.get("prompts"), given.get("labels")) for p in self.parts]


@register("sum")
class Sum(_Combination):
    """Weighted sum of other rewards.

    Args:
        rewards: each a reward, a name, or a dictionary with a name or a class_path.
        weights: one for each; 1 where None.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        super().__init__(rewards)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.parts)
        if not self.parts or len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.parts)} rewards: give one for each")

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        values = self._values(images, context)
        return sum(w * v for w, v in zip(self.weights, values, strict=True))


@register("scale")
class Scale(_Combination):
    """Another reward times a factor, plus an offset."""

    def __init__(self, reward: Any, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__([reward])
        self.factor, self.offset = factor, offset

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return self.factor * self._values(images, context)[0] + self.offset


@register("negate")
class Negate(_Combination):
    """Minus another reward."""

    def __init__(self, reward: Any) -> None:
        super().__init__([reward])

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return -self._values(images, context)[0]


@register("clamp")
class Clamp(_Combination):
    """Another reward, kept between two bounds."""

    def __init__(self, reward: Any, min: float | None = None, max: float | None = None) -> None:
        super().__init__([reward])
        if min is None and max is None:
            raise ValueError("clamp needs a min, a max, or both")
        self.min, self.max = min, max

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return self._values(images, context)[0].clamp(self.min, self.max)
