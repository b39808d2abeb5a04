"""Measures of sets of samples: distances, diversity, correlation.

`measure(x, ...)` is one number. With `weights` `(R, N)`, how often each of x's samples counts (rows of mean 1), it is R
numbers, one for each resampled set: `resampled(measure, x, ...)` makes an interval of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfm_lightning.metrics.measured import Measured, of_parts

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # widths of the kernels, in median distances


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    num_projections: int = 64,
    generator: torch.Generator | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sliced 2-Wasserstein distance: the root of the mean of W2^2 over random directions.

    Args:
        x: samples `(..., N, D)`; leading dimensions are separate problems.
        y: reference samples `(..., k N, D)`.
        generator: of the directions.
        weights: `(R, N)`, whole numbers, for x `(N, D)`.

    Returns:
        `(...)` distances; `(R,)` with weights.

    Raises:
        ValueError: for other shapes.
    """
    *batch, N, D = x.shape
    k = y.shape[-2] // N if N else 0
    if not k or y.shape != (*batch, k * N, D):
        raise ValueError(
            f"{y.shape[-2]} reference samples for {N}, of shapes {tuple(y.shape)} and {tuple(x.shape)}: they must be "
            "equal in shape, or the reference a multiple of the samples"
        )
    directions = torch.randn(D, num_projections, generator=generator, dtype=x.dtype).to(x.device)
    directions = directions / directions.norm(dim=0)
    # W2^2 to k sorted values a sample: the distance to their mean, and their variance
    blocks = (y @ directions).sort(dim=-2).values.unflatten(-2, (N, k))
    means, spread = blocks.mean(dim=-2), blocks.var(dim=-2, correction=0).mean(dim=(-2, -1))
    projected, order = (x @ directions).sort(dim=-2)

    def distance(values: Tensor) -> Tensor:
        return ((values - means).square().mean(dim=(-2, -1)) + spread).sqrt()

    if weights is None:
        return distance(projected)
    found, columns = [], projected.T.flatten()
    for row in weights.long().to(x.device):
        rows = torch.repeat_interleave(row[order].T.flatten())  # the same number for each projection: N
        found.append(distance(columns[rows].reshape(num_projections, N).T))
    return torch.stack(found)


def multiscale_kernel(y: Tensor, scales: Sequence[float] = SCALES) -> Callable[[Tensor], Tensor]:
    """The mean of Gaussian kernels of distances, of widths `scales` times the median distance within `y` `(M, D)`."""
    median = torch.pdist(y[:2000]).median()

    def kernel(distance: Tensor) -> Tensor:
        kernels = (torch.exp(-0.5 * (distance / (scale * median)) ** 2) for scale in scales)
        return sum(kernels, start=distance.new_zeros(())) / len(scales)

    return kernel


def mmd(x: Tensor, y: Tensor, scales: Sequence[float] = SCALES, weights: Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy, unbiased (it can be below 0), of the mean of Gaussian kernels (paper, F.1).

    Args:
        x: samples `(N, D)`.
        y: samples `(M, D)`.
        scales: widths of the kernels, in units of the median distance within y.
        weights: `(R, N)`.

    Returns:
        `()`, or `(R,)` with weights; float64.
    """
    x, y = x.double(), y.double()
    kernel, w, M = multiscale_kernel(y, scales), _rows(weights, x), len(y)
    within = _mean_of_pairs(kernel(torch.cdist(x, x)), w)
    across = w @ kernel(torch.cdist(x, y)).mean(dim=1) / len(x)
    own = 2 * kernel(torch.pdist(y)).sum() / (M * (M - 1))
    return _as_asked(within + own - 2 * across, weights)


def pairwise_distance(x: Tensor, label: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Mean Euclidean distance between different samples, a measure of diversity.

    Args:
        x: samples `(N, *shape)`.
        label: `(N,)`; then within each class that has two samples, and the mean over classes.
        weights: `(R, N)`.

    Returns:
        `()`, or `(R,)` with weights; float64.
    """
    flat, w = x.double().flatten(1), _rows(weights, x)
    groups = (
        [torch.arange(len(x), device=x.device)]
        if label is None
        else [(label == c).nonzero()[:, 0] for c in label.unique()]
    )
    found = torch.stack([_mean_of_pairs(torch.cdist(flat[g], flat[g]), w[:, g]) for g in groups])
    return _as_asked(found.nanmean(dim=0), weights)


def frequency_distance(classes: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """L2 between the frequencies of `classes` `(N,)` and the probabilities `wanted` `(C,)` (paper, 7.1.2).

    Returns:
        `()`, or `(R,)` with weights `(R, N)`; float64.
    """
    one_hot = torch.nn.functional.one_hot(classes, len(wanted)).double()
    frequencies = _rows(weights, classes) @ one_hot / len(classes)
    return _as_asked((frequencies - wanted.double()).norm(dim=1), weights)


def correlation(x: Tensor, y: Tensor) -> Measured:
    """Pearson r of `x` `(B,)` or `(k, B)` (then the mean of k correlations) with `y` `(B,)`.

    Its parts are those of its influence function, a b - r (a^2 + b^2) / 2 with x and y standardised to a and b. The
    interval is made on Fisher's scale z = atanh r, with no standard error below his 1 / (n - 3)^(1/2), times what the
    mean over k leaves of the parts' deviation. Where x or y does not vary, r is nan and has none.
    """
    x, y = x.double().reshape(-1, len(y)), y.double()
    if any(v.min() == v.max() for v in (*x, y)):
        return Measured(float("nan"), torch.empty(0, dtype=torch.float64), scale="fisher")

    def standardised(v: Tensor) -> Tensor:
        centred = v - v.mean(dim=-1, keepdim=True)
        return centred / centred.square().mean(dim=-1, keepdim=True).sqrt()

    a, b = standardised(x), standardised(y)
    r = (a * b).mean(dim=-1, keepdim=True)
    parts = a * b - r * (a.square() + b.square()) / 2
    mean = parts.mean(dim=0)
    gain = float(mean.std() / parts.std(dim=1).mean()) if len(x) > 1 else 1.0
    least = gain / math.sqrt(len(y) - 3) if len(y) > 3 else 0.0
    return of_parts(float(r.mean()), mean, "fisher", least)


def _rows(weights: Tensor | None, x: Tensor) -> Tensor:
    """The weights; one row of ones where there are none."""
    ones = torch.ones(1, len(x), dtype=torch.float64)
    return (ones if weights is None else weights).to(x.device)


def _as_asked(values: Tensor, weights: Tensor | None) -> Tensor:
    return values[0] if weights is None else values


def _mean_of_pairs(matrix: Tensor, w: Tensor) -> Tensor:
    """Mean `(R,)` of a symmetric matrix over pairs of different samples; nan where there is no such pair."""
    matrix = matrix - torch.diag(torch.diagonal(matrix))
    return ((w @ matrix) * w).sum(1) / (w.sum(1) ** 2 - (w**2).sum(1))
