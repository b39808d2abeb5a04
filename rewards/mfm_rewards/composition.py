"""Rewards made of others: weighted sums, scaling, negation, clamping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mfm_rewards.protocol import INPUTS, Reward, evaluate, name_of
from mfm_rewards.registry import build, register

_parts: ContextVar[list[tuple[str, Tensor]] | None] = ContextVar("parts", default=None)


@contextmanager
def parts_of_rewards(found: dict[str, Tensor]) -> Iterator[None]:
    """Within the context the values of the parts of combined rewards are kept, at no more cost, in `found`: by name
    (`sum` of a clip_score and a jpeg: "clip_score", "jpeg"; of two of a kind "jpeg", "jpeg 2"), one value an image, in
    the order of evaluation. Of nested combinations those that are no combination themselves."""
    token = _parts.set(kept := [])
    try:
        yield
    finally:
        _parts.reset(token)
        for name in dict.fromkeys(name for name, _ in kept):
            found[name] = torch.cat([values for given, values in kept if given == name])


class _Combination(Reward):
    """Base class: several rewards on the same images. It is differentiable if all are, and needs what any of them does.

    Args:
        parts: the rewards; each a reward, a name, or a dictionary with a `name` or a `class_path`.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        rewards = [build(part) for part in parts]
        self.parts = nn.ModuleList(rewards)
        self.differentiable = all(part.differentiable for part in rewards)
        self.needs = ("images", *[n for n in INPUTS[1:] if any(n in part.needs for part in rewards)])
        self.names = _numbered([None if isinstance(part, _Combination) else name_of(part) for part in rewards])

    def _values(self, images: Tensor, context: tuple) -> list[Tensor]:
        given = dict(zip(self.needs[1:], context, strict=True))
        parts = list(cast(Iterable[Reward], self.parts))
        values, kept = [evaluate(part, images, **given) for part in parts], _parts.get()
        if kept is not None:
            kept += [(name, v.detach()) for name, v in zip(self.names, values, strict=True) if name is not None]
        return values


@register("sum")
class Sum(_Combination):
    """Weighted sum of other rewards.

    Args:
        rewards: at least one; each a reward, a name, or a dictionary with a `name` or a `class_path`.
        weights: one number for each reward; 1 for all where None.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        super().__init__(rewards)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.parts)
        if not self.parts or len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.parts)} rewards: give one for each")

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        values = self._values(images, context)
        terms = [w * v for w, v in zip(self.weights, values, strict=True)]
        return sum(terms[1:], start=terms[0])


@register("scale")
class Scale(_Combination):
    """Another reward times a factor, plus an offset.

    Args:
        reward: a reward, a name, or a dictionary with a `name` or a `class_path`.
        factor: that it is multiplied by.
        offset: that is added after that.
    """

    def __init__(self, reward: Any, factor: float = 1.0, offset: float = 0.0) -> None:
        super().__init__([reward])
        self.factor, self.offset = factor, offset

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return self.factor * self._values(images, context)[0] + self.offset


@register("negate")
class Negate(_Combination):
    """Minus another reward.

    Args:
        reward: a reward, a name, or a dictionary with a `name` or a `class_path`.
    """

    def __init__(self, reward: Any) -> None:
        super().__init__([reward])

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return -self._values(images, context)[0]


@register("clamp")
class Clamp(_Combination):
    """Another reward, kept between two bounds; at least one of them must be given.

    Args:
        reward: a reward, a name, or a dictionary with a `name` or a `class_path`.
        min: lower bound; none where None.
        max: upper bound; none where None.
    """

    def __init__(self, reward: Any, min: float | None = None, max: float | None = None) -> None:
        super().__init__([reward])
        if min is None and max is None:
            raise ValueError("clamp needs a min, a max, or both")
        self.min, self.max = min, max

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return self._values(images, context)[0].clamp(self.min, self.max)


@register("placed")
class Placed(_Combination):
    """Another reward on a device of its own, such as a second GPU; images are brought there, values and gradients back.

    Args:
        reward: a reward, a name, or a dictionary with a `name` or a `class_path`.
        device: where it stays, whatever it is a part of moves to: cpu, cuda:1, ...
    """

    def __init__(self, reward: Any, device: str) -> None:
        super().__init__([reward])
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {device!r} cannot be used here: {reason}") from error
        self.name = name_of(cast(Reward, self.parts[0]))
        self.parts.to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self  # it stays

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        given = tuple(value.to(self.device) if isinstance(value, Tensor) else value for value in context)
        return self._values(images.to(self.device), given)[0].to(images.device)


def _numbered(names: Sequence[str | None]) -> list[str | None]:
    """With a number for the second of a kind and on."""
    found: list[str | None] = []
    for i, name in enumerate(names):
        before = names[:i].count(name)
        found.append(f"{name} {before + 1}" if name is not None and before else name)
    return found
