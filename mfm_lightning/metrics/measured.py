"""Numbers with intervals: `interval` decides all of them, and docs/statistics.md has what they cover in simulations.

A number is known by what each of its n independent samples adds to it (`parts`; a mean is the mean of its parts), or by
what it is on R resampled sets (`replicates`; any measure). All sets of one size are resampled with the same weights, so
that the difference of two numbers, part by part or replicate by replicate, is paired by the noise that both began from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

REPLICATES = 400
FEW = 10  # fewer samples are not resampled: their resampled sets have too few different values

Scale = Literal["plain", "log", "fisher"]


@dataclass
class Measured:
    """A number and what its interval comes from.

    Attributes:
        value: the number.
        replicates: `(R,)`, the number on resampled sets; empty where nothing was resampled.
        parts: `(n,)`, what each independent sample adds; None where that is not known.
        samples: n, the number of independent samples behind it; None where not known, taken for many.
        scale: on which the interval is made: "log" for ratios, "fisher" (atanh) for correlations.
        least: a standard error on that scale below which the interval does not go.
    """

    value: float
    replicates: Tensor
    parts: Tensor | None = None
    samples: float | None = None
    scale: Scale = "plain"
    least: float = 0.0

    @property
    def error(self) -> float:
        """Standard error; nan where there is none."""
        if self.parts is not None:
            n = len(self.parts)
            return float(self.parts.std()) / math.sqrt(n) if n > 1 else math.nan
        if len(self.replicates) < 2 or self.samples == 1:
            return math.nan
        n = self.samples  # resampling n samples varies by (n - 1) / n of what n new samples would
        return float(self.replicates.std()) * (1.0 if n is None else math.sqrt(n / (n - 1)))

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval; nan where there is none."""
        return interval(self)[0]

    @property
    def high(self) -> float:
        """Upper end, likewise."""
        return interval(self)[1]

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below zero, 0 where it holds zero."""
        return self.side(0.0)

    def side(self, bound: float) -> int:
        """1 or -1 where the interval is above or below the bound, 0 where it holds it."""
        low, high = interval(self)
        return int(low > bound) - int(high < bound)

    def __sub__(self, other: Measured) -> Measured:
        """The difference: paired where both have as many samples, else of independent numbers (Welch-Satterthwaite)."""
        value = self.value - other.value
        if self.samples is not None and other.samples is not None and self.samples != other.samples:
            return _independent(value, (self, other))
        if self.parts is not None and other.parts is not None and len(self.parts) == len(other.parts):
            return of_parts(value, self.parts - other.parts)
        samples = self.samples if other.samples is None else other.samples
        return Measured(value, self.replicates - other.replicates, samples=samples)

    def __mul__(self, factor: float) -> Measured:
        """In other units; of a number on the plain scale."""
        parts = None if self.parts is None else self.parts * factor
        return replace(self, value=self.value * factor, replicates=self.replicates * factor, parts=parts)

    def over(self, other: Measured) -> Measured:
        """The ratio of two positive numbers of as many samples, paired, with an interval made of its logarithm.

        Raises:
            ValueError: for different numbers of samples, which cannot be paired.
        """
        if self.samples != other.samples:
            raise ValueError(f"a ratio of {self.samples} samples to {other.samples}: expected as many")
        value = self.value / other.value
        return Measured(value, self.replicates / other.replicates, samples=self.samples, scale="log")

    def unscaled(self) -> Measured:
        """On its own scale: the logarithm of a ratio, Fisher's z of a correlation."""
        if self.scale == "plain":
            return self
        if self.scale == "log":
            slope, value, replicates = 1 / self.value, math.log(self.value), self.replicates.log()
        else:
            r = min(max(self.value, -1 + 1e-12), 1 - 1e-12)
            slope, value = 1 / (1 - r * r), math.atanh(r)
            replicates = self.replicates.clamp(-1 + 1e-12, 1 - 1e-12).atanh()
        parts = None if self.parts is None else self.parts * slope
        return Measured(value, replicates, parts, self.samples, least=self.least)

    def studentised(self) -> Tensor:
        """`(R,)`: (number of a resampled set - number) / standard error of the resampled set.

        Without parts a resampled set has no error of its own: then its distance from the replicates' mean, which takes
        away the bias of resampling, in their standard deviations.
        """
        if self.parts is not None:
            return studentised(self.parts)
        centred = self.replicates - self.replicates.mean()
        return centred / centred.std().clamp_min(torch.finfo(centred.dtype).tiny)

    def text(self, digits: int = 3) -> str:
        """`value (low to high)` with so many significant digits of the value's scale."""
        return f"{rounded(self.value, digits)} ({rounded(self.low, digits)} to {rounded(self.high, digits)})"


def interval(number: Measured) -> tuple[float, float]:
    """Both ends of the 95 % interval of a number, on its own scale value - q s with the standard error s.

    q are the 97.5 and 2.5 % quantiles of Student's t with n - 1 degrees of freedom and, where parts of at least 10
    samples are known, of the studentised replicates (bootstrap-t), which follow a skew distribution: each end is the
    further one of both. Bootstrap-t alone is too narrow for long symmetric tails, Student's t for skew ones. With
    `least`, neither end is nearer than 1.96 times that.

    Returns:
        (low, high); (nan, nan) where there is no standard error.
    """
    number, scale = number.unscaled(), number.scale
    s = number.error
    if math.isnan(s):
        return math.nan, math.nan
    below = above = student(0.975, number.samples) * s
    if number.parts is not None:
        below, above = (float(width) for width in widths(number.parts))
    least = student(0.975, None) * number.least
    below, above = max(below, least), max(above, least)
    back = {"plain": float, "log": math.exp, "fisher": math.tanh}[scale]
    return back(number.value - below), back(number.value + above)


def widths(parts: Tensor) -> tuple[Tensor, Tensor]:
    """How far the interval of a mean reaches below and above it, of parts `(..., n)`, both `(...)`; for `interval`."""
    n = parts.shape[-1]
    s = parts.std(dim=-1) / math.sqrt(n)
    factor = torch.full_like(s, student(0.975, n))
    if n < FEW:
        return factor * s, factor * s
    low, high = studentised(parts).quantile(torch.tensor([0.025, 0.975], dtype=parts.dtype), dim=-1)
    return torch.maximum(factor, high) * s, torch.maximum(factor, -low) * s


def studentised(parts: Tensor) -> Tensor:
    """`(..., R)`: (mean of a resampled set - mean) / standard error of that set, of float64 parts `(..., n)`."""
    n = parts.shape[-1]
    drawn, centred = weights(n)[1:].T / n, parts - parts.mean(dim=-1, keepdim=True)
    mean, square = centred @ drawn, centred.square()
    variance = (square @ drawn - mean.square()) / (n - 1)
    # a set that drew the same value all the time has no spread, and says nothing
    known = variance > 1e-12 * square.mean(dim=-1, keepdim=True)
    return torch.where(known, mean / variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt(), 0.0)


def simultaneous(numbers: Sequence[Measured], level: float = 0.95) -> float:
    """c such that all true numbers are above value - c s at once, with a probability of `level`: max-t.

    c is the quantile of the largest studentised replicate over the numbers, whose replicates are of the same resampled
    sets. As in `interval`, it is not below that of replicates which share one standard error, with Student's factor.

    Raises:
        ValueError: for numbers of different sample sizes, whose replicates are not of the same sets.
    """
    numbers = [unscaled for number in numbers if (unscaled := number.unscaled()).error > 0]
    if not numbers:
        return student(level, None)
    n = numbers[0].samples
    if any(number.samples != n for number in numbers):
        raise ValueError(f"numbers of {[number.samples for number in numbers]} samples: expected as many in all")
    linear = torch.stack(
        [(number.replicates - number.replicates.mean()) / number.replicates.std() for number in numbers]
    )
    factor = student(level, n) / student(level, None)
    found = [student(level, n), factor * float(linear.max(dim=0).values.quantile(level))]
    if n is None or n >= FEW:
        largest = torch.stack([number.studentised() for number in numbers]).max(dim=0).values
        found.append(float(largest.quantile(level)))
    return max(found)


@lru_cache(maxsize=256)
def student(level: float, samples: float | None) -> float:
    """Quantile of Student's t with one degree of freedom less than samples; of the normal distribution for None."""
    from scipy.stats import norm, t

    return float(norm.ppf(level) if samples is None else t.ppf(level, samples - 1))


def rounded(number: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, and no exponent where one can do without."""
    if number != number:
        return "n/a"
    text = f"{number:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text and abs(number) >= 1 else text


def mean(numbers: Sequence[Measured]) -> Measured:
    """The mean of independent numbers, such as those of several seeds."""
    if len(numbers) == 1:
        return numbers[0]
    value = sum(number.value for number in numbers) / len(numbers)
    parts = [number.parts for number in numbers if number.parts is not None]
    if len(parts) == len(numbers) and len({len(p) for p in parts}) == 1:
        return of_parts(value, torch.cat(parts))
    replicates = torch.stack([number.replicates for number in numbers])
    # the seeds share their resampling weights; shuffle, since their samples are independent
    order = torch.stack(
        [torch.randperm(replicates.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(len(numbers))]
    )
    samples = [number.samples for number in numbers]
    total = None if None in samples else float(sum(n for n in samples if n is not None))
    return Measured(value, replicates.gather(1, order).mean(dim=0), samples=total)


def of_runs(values: Sequence[float]) -> Measured:
    """The mean of whole runs whose samples depend on each other (the particles of one population), by the runs alone.

    The interval of fewer than 10 is Student's; that of a difference is of the runs' differences where both have as
    many, since runs of one number share their seed. One run has no interval.
    """
    runs = torch.tensor(values, dtype=torch.float64)
    return of_parts(float(runs.mean()), runs)


def ratio_of_runs(above: Sequence[float], below: Sequence[float]) -> Measured:
    """The geometric mean of the ratios of runs that were made side by side, as `of_runs` of their logarithms."""
    logs = torch.tensor([math.log(a / b) for a, b in zip(above, below, strict=True)], dtype=torch.float64)
    value = math.exp(float(logs.mean()))
    return of_parts(value, value * logs, "log")


@lru_cache(maxsize=16)
def weights(num: int, replicates: int = REPLICATES, seed: int = 0) -> Tensor:
    """`(1 + R, num)` weights of samples, each row of mean 1: first the sample itself, then R resamplings of it.

    The same tensor for the same arguments: not to be changed in place.
    """
    generator = torch.Generator().manual_seed(1000 * seed + num)
    drawn = torch.randint(num, (replicates, num), generator=generator)
    counts = torch.zeros(replicates, num, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(replicates, num, dtype=torch.float64)
    )
    return torch.cat([torch.ones(1, num, dtype=torch.float64), counts])


def resampled(measure: Callable[..., Tensor], x: Tensor, *others: object, replicates: int = REPLICATES) -> Measured:
    """`measure(x, *others)` with the bootstrap of its samples `x` `(N, ...)`; the others stay as they are.

    Its interval is Student's around the value, with the replicates' deviation: resampling biases distances between sets
    of samples upwards, which would shift the replicates' own quantiles.

    Args:
        measure: a function of `mfm_lightning.metrics`; with `weights=` `(R, N)` it gives `(R,)` numbers.
    """
    values = measure(x, *others, weights=weights(len(x), replicates))
    return Measured(float(values[0]), values[1:].clone().cpu(), samples=len(x))


def mean_of(x: Tensor) -> Measured:
    """The mean of independent numbers `(B,)`."""
    return of_parts(float(x.double().mean()), x)


def mean_of_groups(x: Tensor, group: Tensor) -> Measured:
    """The mean over groups of each group's mean: of numbers that depend on each other within a group, such as those of
    the images of one prompt. The samples of the interval are the groups, in the order of their numbers.

    Args:
        x: `(B,)`.
        group: whole numbers `(B,)`, which group each is of; groups may differ in size, and count alike.

    Raises:
        ValueError: for no numbers, or not as many groups as numbers.
    """
    if not len(x) or group.shape != x.shape:
        raise ValueError(f"numbers of shape {tuple(x.shape)} in groups of shape {tuple(group.shape)}: expected (B,)")
    _, place, sizes = group.cpu().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, x.double().cpu())
    return mean_of(sums / sizes)


def of_parts(value: float, parts: Tensor, scale: Scale = "plain", least: float = 0.0) -> Measured:
    """A number that moves with its samples as the mean of its parts `(n,)` does, to first order."""
    parts = parts.double().cpu()
    replicates = value + weights(len(parts))[1:] @ (parts - parts.mean()) / len(parts)
    return Measured(value, replicates, parts, len(parts), scale, least)


def _independent(value: float, numbers: Sequence[Measured]) -> Measured:
    """A sum or difference of independent numbers: Welch and Satterthwaite's degrees of freedom, normal replicates; one
    of them without a standard error, such as of a single run, leaves the result without one."""
    if any(math.isnan(number.error) for number in numbers):
        return Measured(value, torch.empty(0, dtype=torch.float64))
    squares = [number.error**2 for number in numbers]
    degrees = [(number.samples or math.inf) - 1 for number in numbers]
    total, rest = sum(squares), sum(s * s / d for s, d in zip(squares, degrees, strict=True))
    samples = 1 + total * total / rest if rest > 0 else None
    scores = torch.special.ndtri((torch.arange(REPLICATES, dtype=torch.float64) + 0.5) / REPLICATES)
    spread = math.sqrt(total if samples is None else total * (samples - 1) / samples)  # as if resampled: see `error`
    return Measured(value, value + spread * scores / scores.std(), samples=samples)
