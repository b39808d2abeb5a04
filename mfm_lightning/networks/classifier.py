"""A classifier of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """A small residual network on images `(B, C, H, W)` in [0, 1] of any size.

    Its activations are smooth and its normalisation is each image's own, for it gives rewards that are differentiated.

    Args:
        in_channels: of the images.
        num_classes: number of classes.
        width: channels of the first stage; each later one has twice as many, at half the resolution. A multiple of 4.
        stages: number of stages; the first works at half the images' resolution.

    Raises:
        ValueError: for a width that is no multiple of 4, or no stage.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 32, stages: int = 2) -> None:
        super().__init__()
        if width < 4 or width % 4 or stages < 1:
            raise ValueError(f"width {width} must be a multiple of 4, and stages {stages} at least 1")
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.in_channels, self.num_classes = in_channels, num_classes
        self.class_names: list[str] | None = None  # of the data that it was trained on
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.MaxPool2d(2)]
        for stage in range(stages):
            channels = width * 2**stage
            if stage:
                layers.append(nn.Conv2d(channels // 2, channels, 3, padding=1, stride=2))
            layers.append(_Residual(channels))
        self.num_features = width * 2 ** (stages - 1)
        layers += [_norm(self.num_features), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, num_classes)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """`(B, num_features)` of images `(B, C, H, W)` in [0, 1], so many at once."""
        return torch.cat([self.body(part) for part in images.split(batch_size)])

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)`; raises ValueError for images of other channels."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, {self.in_channels}, H, W) in [0, 1]")
        return self.head(self.body(images))


class _Residual(nn.Module):
    """x + f(x), f of two convolutions of as many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(4, channels)
