"""Distances between two sets of samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


def sliced_wasserstein(x: Tensor, y: Tensor, num_projections: int = 64, generator: torch.Generator | None = None):
    """Sliced 2-Wasserstein distance: the root of the mean of W2^2 over random directions.

    Args:
        x, y: samples `(..., N, D)` of the same shape; leading dimensions are separate problems.
        generator: of the directions.

    Returns:
        `(...)` distances.
    """
    if x.shape != y.shape:
        raise ValueError(f"samples of shapes {tuple(x.shape)} and {tuple(y.shape)} must be equal in shape")
    directions = torch.randn(x.shape[-1], num_projections, generator=generator, dtype=x.dtype).to(x.device)
    directions = directions / directions.norm(dim=0)
    gap = (x @ directions).sort(dim=-2).values - (y @ directions).sort(dim=-2).values
    return gap.square().mean(dim=(-2, -1)).sqrt()


class _Features(nn.Module):
    def __init__(self, features: nn.Module, num_features: int) -> None:
        super().__init__()
        self.features, self.num_features = features, num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def frechet_distance(features: nn.Module, num_features: int, real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to `features` of two sets of images (torchmetrics' computation).

    Args:
        features: module `(B, C, H, W) -> (B, num_features)`.
        real, fake: images in [0, 1].
    """
    metric = FrechetInceptionDistance(feature=_Features(features, num_features), normalize=True)
    with torch.no_grad():
        for images, is_real in ((real, True), (fake, False)):
            for batch in images.split(512):
                metric.update(batch, real=is_real)
        return float(metric.compute())
