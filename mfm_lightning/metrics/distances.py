"""Distances between two sets of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # widths of the kernels, in median distances


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


def multiscale_kernel(y: Tensor, scales: Sequence[float] = SCALES) -> Callable[[Tensor], Tensor]:
    """The mean of Gaussian kernels of distances, of widths `scales` times the median distance within `y` `(M, D)`."""
    median = torch.pdist(y[:2000]).median()

    def kernel(distance: Tensor) -> Tensor:
        return sum(torch.exp(-0.5 * (distance / (scale * median)) ** 2) for scale in scales) / len(scales)

    return kernel


def mmd(x: Tensor, y: Tensor, scales: Sequence[float] = SCALES) -> float:
    """Squared maximum mean discrepancy, unbiased (it can be below 0), of the mean of Gaussian kernels (paper, F.1).

    Args:
        x, y: samples `(N, D)` and `(M, D)`.
        scales: widths of the kernels, in units of the median distance within y.
    """
    x, y = x.double(), y.double()
    kernel = multiscale_kernel(y, scales)
    N, M = len(x), len(y)
    own = sum(2 * kernel(torch.pdist(a)).sum() / (n * (n - 1)) for a, n in ((x, N), (y, M)))
    return float(own - 2 * kernel(torch.cdist(x, y)).mean())


def mean_pairwise_distance(x: Tensor, label: Tensor | None = None) -> float:
    """Mean Euclidean distance between different samples `(N, D)`, within each class of `label` `(N,)` and then over
    the classes: a measure of diversity."""
    groups = [x] if label is None else [x[label == c] for c in label.unique()]
    return float(torch.stack([torch.pdist(g.flatten(1)).mean() for g in groups if len(g) > 1]).mean())


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
