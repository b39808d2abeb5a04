"""How alike an image is to its mirror image."""

from __future__ import annotations

from torch import Tensor

from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register

AXES = {"left_right": (3,), "up_down": (2,), "rotation": (2, 3)}


@register("symmetry")
class Symmetry(Reward):
    """Minus the mean squared difference between an image and its mirror image.

    Args:
        axis: "left_right" or "up_down" to mirror it, "rotation" to turn it by 180 degrees.
        scale: factor of the reward.
    """

    def __init__(self, axis: str = "left_right", scale: float = 1.0) -> None:
        super().__init__()
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r}: expected one of {', '.join(AXES)}")
        self.axis, self.scale = axis, scale

    def forward(self, images: Tensor) -> Tensor:
        return -self.scale * (images - images.flip(AXES[self.axis])).square().flatten(1).mean(dim=1)
