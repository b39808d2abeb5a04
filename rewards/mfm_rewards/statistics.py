"""Plain statistics of an image: brightness, contrast, saturation, redness, smoothness, a target colour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register


class Statistic(Reward):
    """A number of an image, times a factor.

    Args:
        scale: factor of the reward.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale


@register("brightness")
class Brightness(Statistic):
    """Mean of all pixels, times `scale`."""

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * images.flatten(1).mean(dim=1)


@register("contrast")
class Contrast(Statistic):
    """Standard deviation of the pixels' grey values, times `scale`."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(dim=1).flatten(1)
        # the root is not differentiable where an image is flat
        return self.scale * (grey.var(dim=1, unbiased=False) + 1e-12).sqrt()


@register("saturation")
class Saturation(Statistic):
    """Mean over pixels of the largest minus the smallest channel, times `scale`; 0 for grey images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1)


@register("smoothness")
class Smoothness(Statistic):
    """Minus the mean absolute difference of neighbouring pixels (total variation), times `scale`."""

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = images.diff(dim=2).abs().flatten(1), images.diff(dim=3).abs().flatten(1)
        return -self.scale * (rows.mean(dim=1) + columns.mean(dim=1))


@register("colour")
class Colour(Statistic):
    """Minus the squared distance of the mean colour from a target, times `scale`.

    Args:
        target: the colour, one number in [0, 1] for each channel.
        scale: factor of the reward.
    """

    target: Tensor

    def __init__(self, target: Sequence[float], scale: float = 1.0) -> None:
        super().__init__(scale)
        self.register_buffer("target", torch.as_tensor(target, dtype=torch.float32))
        if self.target.dim() != 1 or not ((self.target >= 0) & (self.target <= 1)).all():
            raise ValueError(f"target {list(target)} must be one number in [0, 1] a channel")

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] != len(self.target):
            raise ValueError(f"images of {images.shape[1]} channels for a target of {len(self.target)}")
        return -self.scale * (images.mean(dim=(2, 3)) - self.target.to(images)).square().sum(dim=1)
