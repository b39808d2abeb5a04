"""What a reward is: decoded images in, one number an image out.

A plain function or an `nn.Module` is a reward already. `Reward` adds what methods ask about it: whether it can be
differentiated, and what it takes besides images. A function without these attributes counts as differentiable, and
takes what its arguments are named after.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = ("images", "prompts", "labels", "groups")


class RewardError(ValueError):
    """A reward that failed, or returned something that is not one finite number an image.

    Attributes:
        states: what a method had reached when the reward failed, where a method was running.
    """

    states: Tensor | None = None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


class Reward(nn.Module, ABC):
    """Base class of rewards; a plain function works too.

    Attributes:
        name: how messages call it; `build` gives it the registered name.
        differentiable: whether `forward` can be differentiated in the images.
        needs: what `forward` takes, in this order, of "images" `(B, C, H, W)` in [0, 1] (or the states themselves,
            where they are not images), "prompts" (B strings), "labels" `(B,)` and "groups" `(B,)`: integers that are
            equal for images of one group, such as those of one prompt. A reward that needs these scores an image
            beside the others of its group, all of which are in the batch; any other scores each image by itself.
    """

    differentiable: bool = True
    needs: tuple[str, ...] = ("images",)
    name: str

    @abstractmethod
    def forward(self, images: Tensor, *context: Any, **named: Any) -> Tensor:
        """Rewards `(B,)`; it is called with what it `needs`, in that order."""


class FunctionReward(Reward):
    """Any callable as a `Reward`.

    Args:
        function: takes images `(B, C, H, W)`, and, by these names, `prompts`, `labels` and `groups`, to values `(B,)`.
            Its attributes `differentiable` and `needs` count, if it has them.
        name: how messages call it; the function's own name where None.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"a reward must be callable, got {type(function).__name__}")
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.differentiable = bool(getattr(function, "differentiable", True))
        self.needs = _needs(function)

    def forward(self, images: Tensor, *context: Any) -> Tensor:
        return self.function(images, *context)


def _needs(function: Callable) -> tuple[str, ...]:
    declared = getattr(function, "needs", None)
    if declared is None:
        target = function.forward if isinstance(function, nn.Module) else function
        names = list(inspect.signature(target).parameters)
        declared = ("images", *[n for n in names[1:] if n in INPUTS])
    if unknown := [n for n in declared if n not in INPUTS]:
        raise TypeError(f"a reward needs {unknown[0]!r}: expected a choice of {', '.join(INPUTS)}")
    if not declared or declared[0] != "images":
        raise TypeError(f"a reward's needs must begin with 'images', got {tuple(declared)}")
    return tuple(declared)


def as_reward(reward: Callable[..., Tensor], name: str | None = None) -> Reward:
    """`reward` itself if it is a `Reward`, else wrapped as one.

    Raises:
        TypeError: if it is not callable or needs something unknown.
    """
    reward = reward if isinstance(reward, Reward) else FunctionReward(reward, name)
    if not hasattr(reward, "name"):
        reward.name = name or type(reward).__name__
    return reward


def device_of(reward: Reward) -> torch.device:
    """The device of its weights; the CPU if it has none."""
    return next(itertools.chain(reward.parameters(), reward.buffers()), torch.empty(0, device="cpu")).device


def name_of(reward: Reward) -> str:
    """How messages call it."""
    return getattr(reward, "name", type(reward).__name__)


def evaluate(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str] | None = None,
    labels: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """`reward` on a batch, with what it needs, checked: `(B,)` float.

    Args:
        reward: that scores the images.
        images: `(B, C, H, W)` in [0, 1] (or states that are not images).
        prompts: B strings, for rewards that need them.
        labels: `(B,)`, for rewards that need them.
        groups: `(B,)` integers, equal for images of one group, for rewards that need them.

    Raises:
        RewardError: if something it needs is missing, it raises, or its values have a wrong shape, type or device, or
            are not finite (the message names the reward and the indices).
    """
    name, given = name_of(reward), {"images": images, "prompts": prompts, "labels": labels, "groups": groups}
    check_context(reward, len(images), prompts, labels, groups)
    try:
        values = reward(*[given[n] for n in reward.needs])
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Tensor) or values.shape != (len(images),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"reward {name!r} returned {got} for {len(images)} images: expected shape ({len(images)},)")
    if values.device != images.device:
        raise RewardError(f"reward {name!r} returned values on {values.device} for images on {images.device}")
    if not values.is_floating_point():
        raise RewardError(f"reward {name!r} returned {values.dtype}: expected floating-point values")
    finite = torch.isfinite(values.detach())
    if not finite.all():
        indices = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        raise RewardError(
            f"reward {name!r} returned {len(indices)} of {len(images)} values not finite (NaN or infinite), "
            f"at indices {shown}"
        )
    return values


def check_context(
    reward: Reward,
    num: int,
    prompts: Sequence[str] | None,
    labels: Tensor | None,
    groups: Tensor | None = None,
) -> None:
    """Raise RewardError unless what the reward needs besides images is there, one for each of `num` images."""
    for what, value in (("prompts", prompts), ("labels", labels), ("groups", groups)):
        if what not in reward.needs:
            continue
        if value is None:
            raise RewardError(f"reward {name_of(reward)!r} needs {what}: give one for each image")
        if len(value) != num:
            raise RewardError(f"reward {name_of(reward)!r} was given {len(value)} {what} for {num} images")
