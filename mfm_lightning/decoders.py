"""From a model's states to the images that rewards see, so that rewards never know about latents."""

from __future__ import annotations

from torch import Tensor, nn


class Decoder(nn.Module):
    """Base class: `(B, *shape)` states to images `(B, C, H, W)` in [0, 1], differentiable, frozen."""

    def forward(self, states: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must implement forward(states) -> images")


class IdentityDecoder(Decoder):
    """The states as they are: for vectors, where the reward is a function of the state."""

    def forward(self, states: Tensor) -> Tensor:
        return states


class PixelDecoder(Decoder):
    """Pixels in [-1, 1] (the range of `low` and `high`) to [0, 1].

    Args:
        low, high: state values of black and white.
        clamp: cut off what lies outside [0, 1], so that no reward can be had by leaving the range of images; the
            gradient is zero there.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0, clamp: bool = True) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"low {low} must be below high {high}")
        self.low, self.high, self.clamp = low, high, clamp

    def forward(self, states: Tensor) -> Tensor:
        images = (states - self.low) / (self.high - self.low)
        return images.clamp(0, 1) if self.clamp else images
