"""Numbers with intervals: every measure of a set of samples can be taken again on resampled sets.

All sets of one size are resampled with the same weights, so that the difference of two measures, taken replicate by
replicate, is paired by the noise that both sets began from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """Standard error; nan where nothing was resampled."""
        return float(self.replicates.std()) if len(self.replicates) > 1 else float("nan")

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; nan where nothing was resampled."""
        return self._quantile(0.025) if self.percentile else self.value - _Z * self.error

    @property
    def high(self) -> float:
        """Upper end, likewise."""
        return self._quantile(0.975) if self.percentile else self.value + _Z * self.error

    def _quantile(self, share: float) -> float:
        return float(self.replicates.quantile(share)) if len(self.replicates) else float("nan")

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
    from scipy.stats import t as student

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


def resampled(measure: Callable[..., Tensor], x: Tensor, *others: object, replicates: int = REPLICATES) -> Measured:
    """`measure(x, *others)` with the bootstrap of its samples `x` `(N, ...)`; the others stay as they are.

    Args:
        measure: a function of `mfm_lightning.metrics`; with `weights=` `(R, N)` it gives `(R,)` numbers.
    """
    values = measure(x, *others, weights=weights(len(x), replicates))
    return Measured(float(values[0]), values[1:].clone())


def mean_of(x: Tensor, replicates: int = REPLICATES) -> Measured:
    """The mean of numbers `(B,)`."""
    return resampled(lambda x, weights: weights @ x.double() / len(x), x, replicates=replicates)
