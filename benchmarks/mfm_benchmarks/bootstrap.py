"""Bootstrap of what sets of samples are judged by: every number comes with replicates, and so with an interval.

All methods of a suite are resampled with the same weights, so that the difference of two methods, taken replicate by
replicate, is paired by the noise that both began from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

from mfm_lightning.metrics.distances import multiscale_kernel

REPLICATES = 400
_Z = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass
class Measured:
    """A number with its bootstrap replicates `(R,)`.

    The 95 % interval is the normal one, value +- 1.96 standard deviations of the replicates: resampling biases
    distances between sets of samples upwards, which would shift a percentile interval. For what is not biased so and
    has an end, such as a correlation, `percentile` takes the replicates' own quantiles.
    """

    value: float
    replicates: Tensor
    percentile: bool = False

    @property
    def error(self) -> float:
        """Standard error."""
        return float(self.replicates.std()) if len(self.replicates) > 1 else float("nan")

    @property
    def low(self) -> float:
        return float(self.replicates.quantile(0.025)) if self.percentile else self.value - _Z * self.error

    @property
    def high(self) -> float:
        return float(self.replicates.quantile(0.975)) if self.percentile else self.value + _Z * self.error

    def __sub__(self, other: Measured) -> Measured:
        """The difference, paired replicate by replicate."""
        return Measured(self.value - other.value, self.replicates - other.replicates)

    def __mul__(self, factor: float) -> Measured:
        """In other units."""
        return Measured(self.value * factor, self.replicates * factor, self.percentile)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below zero, 0 where it holds zero."""
        return int(self.low > 0) - int(self.high < 0)

    def text(self, digits: int = 3) -> str:
        """`value (low to high)` with so many significant digits of the value's scale."""
        return f"{rounded(self.value, digits)} ({rounded(self.low, digits)} to {rounded(self.high, digits)})"


def rounded(number: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, and no exponent where one can do without."""
    if number != number:
        return "n/a"
    text = f"{number:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text and abs(number) >= 1 else text


def mean(parts: Sequence[Measured]) -> Measured:
    """The mean of independent numbers, such as those of several seeds."""
    replicates = torch.stack([part.replicates for part in parts])
    if len(parts) > 1:  # the seeds share their resampling weights; shuffle, since their samples are independent
        order = torch.stack(
            [torch.randperm(replicates.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(len(parts))]
        )
        replicates = replicates.gather(1, order)
    return Measured(sum(part.value for part in parts) / len(parts), replicates.mean(dim=0))


def of_runs(values: Sequence[float], replicates: int = REPLICATES, seed: int = 0) -> Measured:
    """The mean of whole runs whose samples depend on each other (the particles of one population), by the runs alone.

    Its replicates are normal noise as wide as Student's t interval of so few runs. One run has no interval.
    """
    runs = torch.tensor(values, dtype=torch.float64)
    k, centre = len(runs), float(runs.mean())
    if k < 2:
        return Measured(centre, torch.full((replicates,), torch.nan, dtype=torch.float64))
    width = float(student.ppf(0.975, k - 1)) / _Z * float(runs.std()) / k**0.5
    noise = torch.randn(replicates, generator=torch.Generator().manual_seed(7_000 + seed), dtype=torch.float64)
    return Measured(centre, centre + width * (noise - noise.mean()) / noise.std())


def ratio_of_runs(above: Sequence[float], below: Sequence[float]) -> Measured:
    """The mean of the ratios of runs that were made side by side, as `of_runs`."""
    return of_runs([a / b for a, b in zip(above, below, strict=True)])


def weights(num: int, replicates: int = REPLICATES, seed: int = 0) -> Tensor:
    """`(1 + R, num)` weights of samples, each row of mean 1: first the sample itself, then R resamplings of it."""
    generator = torch.Generator().manual_seed(1000 * seed + num)
    drawn = torch.randint(num, (replicates, num), generator=generator)
    counts = torch.zeros(replicates, num, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(replicates, num, dtype=torch.float64)
    )
    return torch.cat([torch.ones(1, num, dtype=torch.float64), counts])


def _measured(values: Tensor) -> Measured:
    return Measured(float(values[0]), values[1:].clone())


def mean_of(x: Tensor, replicates: int = REPLICATES) -> Measured:
    """The mean of numbers `(B,)`."""
    return _measured(weights(len(x), replicates) @ x.double() / len(x))


def correlation(x: Tensor, y: Tensor, replicates: int = REPLICATES) -> Measured:
    """Pearson r of `x` `(B,)` or `(k, B)` (then the mean of k correlations) with `y` `(B,)`, over resampled pairs."""
    w = weights(len(y), replicates) / len(y)
    x, y = x.double().reshape(-1, len(y)), y.double()

    def centred(v: Tensor) -> Tensor:
        return v - (w @ v)[:, None]

    b = centred(y)
    found = []
    for row in x:
        a = centred(row)
        found.append((w * a * b).sum(1) / ((w * a * a).sum(1) * (w * b * b).sum(1)).sqrt())
    values = torch.stack(found).mean(dim=0)
    kept = values[1:][values[1:].isfinite()]
    if not len(kept):  # no correlation with what does not vary
        return Measured(float("nan"), torch.full((2,), torch.nan, dtype=torch.float64))
    return Measured(float(values[0]), kept, percentile=True)


def pairwise_distance(x: Tensor, replicates: int = REPLICATES) -> Measured:
    """Mean Euclidean distance between different samples `(B, *shape)`: diversity."""
    flat = x.double().flatten(1)
    return _pairs(torch.cdist(flat, flat), weights(len(x), replicates))


def _pairs(matrix: Tensor, w: Tensor) -> Measured:
    """Mean of a symmetric matrix over pairs of different samples."""
    matrix = matrix - torch.diag(torch.diagonal(matrix))
    total = w.sum(1) ** 2 - (w**2).sum(1)
    return _measured(((w @ matrix) * w).sum(1) / total)


def maximum_mean_discrepancy(x: Tensor, y: Tensor, replicates: int = REPLICATES) -> Measured:
    """`metrics.distances.mmd` of `x` `(N, D)` to `y` `(M, D)`, x resampled."""
    x, y = x.double(), y.double()
    kernel = multiscale_kernel(y)
    w, M = weights(len(x), replicates), len(y)
    within = _pairs(kernel(torch.cdist(x, x)), w)
    cross = _measured(w @ kernel(torch.cdist(x, y)).mean(dim=1) / len(x))
    own = float(2 * kernel(torch.pdist(y)).sum() / (M * (M - 1)))
    return Measured(within.value + own - 2 * cross.value, within.replicates + own - 2 * cross.replicates)


def sliced_wasserstein(
    x: Tensor, y: Tensor, num_projections: int = 128, replicates: int = REPLICATES, seed: int = 0
) -> Measured:
    """Sliced 2-Wasserstein distance of `x` `(N, D)` to `y` `(kN, D)`, x resampled.

    Raises:
        ValueError: unless y has a multiple of x's samples.
    """
    N, k = len(x), len(y) // len(x)
    if len(y) != k * N or not k:
        raise ValueError(f"{len(y)} reference samples for {N}: expected a multiple")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], num_projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    # W2^2 to k sorted values a sample: the distance to their mean, and their variance
    blocks = (y.double() @ directions).sort(dim=0).values.reshape(N, k, num_projections)
    means, spread = blocks.mean(dim=1), blocks.var(dim=1, correction=0).mean()
    projected, order = (x.double() @ directions).sort(dim=0)
    values = []
    for w in weights(N, replicates).long():
        rows = torch.repeat_interleave(w[order].T.flatten())  # the same number for each projection: N
        columns = projected.T.flatten()[rows].reshape(num_projections, N).T
        values.append(((columns - means).square().mean() + spread).sqrt())
    return _measured(torch.stack(values))


class RealFeatures:
    """A Gaussian fitted to features `(M, F)` of real images, for `frechet`."""

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        eigenvalues, axes = torch.linalg.eigh(torch.cov(features.T))
        eigenvalues = eigenvalues.clamp_min(0)
        self.mean, self.variance = features.mean(dim=0), eigenvalues.sum()
        self.root = axes * eigenvalues.sqrt() @ axes.T


def frechet(fake: Tensor, real: RealFeatures, replicates: int = REPLICATES) -> Measured:
    """Fréchet distance of a Gaussian fitted to features `(B, F)` to that of real ones, the former resampled.

    The trace of the covariances' geometric mean is the nuclear norm of (centred fake) (covariance of real)^(1/2), which
    is taken on the smaller side, so that few samples of many features are cheap.
    """
    fake, n = fake.double(), len(fake)
    y, values = fake @ real.root, []
    for w in weights(n, replicates):
        share = w / n
        centre = share @ fake
        scale = (w / (n - 1)).sqrt()[:, None]
        centred, projected = scale * (fake - centre), scale * (y - share @ y)
        gram = projected @ projected.T if n < fake.shape[1] else projected.T @ projected
        nuclear = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()
        values.append((centre - real.mean).square().sum() + centred.square().sum() + real.variance - 2 * nuclear)
    return _measured(torch.stack(values))


def frequency_distance(classes: Tensor, wanted: Tensor, replicates: int = REPLICATES) -> Measured:
    """L2 between the frequencies of `classes` `(B,)` and the probabilities `wanted` `(C,)` (paper, 7.1.2)."""
    one_hot = torch.nn.functional.one_hot(classes, len(wanted)).double()
    frequencies = weights(len(classes), replicates) @ one_hot / len(classes)
    return _measured((frequencies - wanted.double()).norm(dim=1))
