"""The bootstrap: what its intervals promise, and what is said of them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_ind, ttest_rel

from mfm_benchmarks.claims import change, verdict
from mfm_lightning.metrics.distances import pairwise_distance
from mfm_lightning.metrics.measured import (
    Measured,
    mean,
    mean_of,
    mean_of_groups,
    of_runs,
    ratio_of_runs,
    resampled,
    weights,
)


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_resampling_draws_as_many_samples_with_replacement():
    found = weights(10, 500)
    assert found.shape == (501, 10)
    assert (found[0] == 1).all()
    assert (found.sum(dim=1) == 10).all()
    assert found[1:].var().item() == pytest.approx(0.9, rel=0.1)  # of a binomial of 10 draws at 1/10
    assert torch.equal(found, weights(10, 500))
    assert not torch.equal(found, weights(10, 500, seed=1))


def test_the_standard_error_is_that_of_the_mean():
    """s / n^(1/2) for a mean, and the same from replicates of any measure (5 standard errors of a deviation of 400)."""
    x = samples(400)
    found, again = mean_of(x), resampled(lambda x, weights: weights @ x.double() / len(x), x)
    assert found.value == pytest.approx(float(x.mean()), abs=1e-6)
    assert found.error == pytest.approx(float(x.std()) / 20, rel=1e-6)
    assert again.error == pytest.approx(found.error, rel=5 / 800**0.5)
    assert again.high - again.value == pytest.approx(float(student.ppf(0.975, 399)) * again.error, rel=1e-9)
    assert torch.allclose(found.replicates, again.replicates)


def test_an_interval_of_a_mean_is_the_further_of_students_and_bootstrap_t():
    """Both from their formulas, with the resampled sets drawn one by one."""
    x = samples(24).double().exp()
    s = float(x.std()) / 24**0.5
    t = []
    for row in weights(24)[1:].long():
        drawn = x.repeat_interleave(row)
        t.append((float(drawn.mean() - x.mean())) / (float(drawn.var(correction=0)) / 23) ** 0.5)
    low, high = np.quantile(t, [0.025, 0.975])
    factor = float(student.ppf(0.975, 23))
    assert max(factor, high) == factor  # of a skew sample one end is Student's, the other one bootstrap-t's
    assert -low > factor
    found = mean_of(x)
    assert (found.low, found.high) == pytest.approx((found.value - factor * s, found.value - low * s), rel=1e-6)
    assert resampled(lambda x, weights: weights @ x / len(x), x).studentised().std().item() == pytest.approx(1)


def test_without_resampling_there_is_a_number_and_no_interval():
    x = samples(20, 3)
    found = resampled(pairwise_distance, x, replicates=0)
    assert found.value == float(pairwise_distance(x))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(Measured(0.5, torch.empty(0), scale="fisher").low)
    assert found.sign == 0


def test_the_mean_of_seeds_is_that_of_all_their_samples():
    data = samples(2, 60).exp()
    parts = [mean_of(part) for part in data]
    both = mean(parts)
    assert (both.value, both.low, both.high) == pytest.approx(
        (float(data.mean()), mean_of(data.flatten()).low, mean_of(data.flatten()).high), rel=1e-6
    )
    # distances have no parts: then the errors of independent seeds add in squares (15 %: 400 replicates)
    parts = [resampled(pairwise_distance, samples(60, 3, seed=k)) for k in (1, 2)]
    both = mean(parts)
    assert both.error == pytest.approx((parts[0].error ** 2 + parts[1].error ** 2) ** 0.5 / 2, rel=0.15)
    assert both.samples == 120


def test_ratios_are_paired_and_have_intervals_of_their_logarithm():
    x, y = samples(50, 3), samples(50, 3, seed=1)
    a, b = resampled(pairwise_distance, 2 * x), resampled(pairwise_distance, x)
    exact, found = a.over(b), resampled(pairwise_distance, y).over(b)
    assert (exact.value, exact.low, exact.high) == pytest.approx((2, 2, 2))
    width = float(student.ppf(0.975, 49)) * float((found.replicates).log().std()) * (50 / 49) ** 0.5
    assert math.log(found.high) == pytest.approx(math.log(found.value) + width)
    assert math.log(found.low) == pytest.approx(math.log(found.value) - width)
    assert (found.side(0.1), found.side(found.value), found.side(10)) == (1, 0, -1)
    with pytest.raises(ValueError, match="expected as many"):
        a.over(resampled(pairwise_distance, x[:40]))


def test_runs_have_students_interval():
    runs = [1.0, 1.4, 0.9, 1.1]
    found, numbers = of_runs(runs), torch.tensor(runs, dtype=torch.float64)
    low, high = student.interval(0.95, 3, float(numbers.mean()), float(numbers.std()) / 2)
    assert (found.value, found.low, found.high) == pytest.approx((float(numbers.mean()), low, high), rel=1e-6)
    ratio = ratio_of_runs([2.0, 3.0], [1.0, 2.0])
    assert ratio.value == pytest.approx(3**0.5)  # geometric: which of the two is divided by the other does not matter
    assert ratio.low == pytest.approx(1 / ratio_of_runs([1.0, 2.0], [2.0, 3.0]).high)
    assert math.isnan(of_runs([1.0]).low)


def test_differences_of_runs_are_paired_t_intervals_or_welchs():
    a, b = [1.0, 1.4, 0.9, 1.1], [0.7, 1.3, 0.8, 0.6]
    found, theirs = of_runs(a) - of_runs(b), ttest_rel(a, b).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)
    b = [2.0, 3.5, 2.9, 1.1, 4.0, 2.2]
    found, theirs = of_runs(a) - of_runs(b), ttest_ind(a, b, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-6)


def test_a_single_run_leaves_a_difference_without_an_interval():
    # as `mfm benchmark gmm --quick` has: one run of particles, which has no spread, against resampled samples
    single, many = of_runs([1.5]), mean_of(torch.arange(12.0, dtype=torch.float64))
    for difference, value in ((single - many, 1.5 - 5.5), (many - single, 5.5 - 1.5)):
        assert difference.value == value
        assert math.isnan(difference.error)
        assert math.isnan(difference.low)
        assert difference.sign == 0
    assert math.isnan(Measured(1.0, torch.tensor([0.9, 1.1]), samples=1).error)


def test_differences_are_paired_and_claims_follow_them():
    base = samples(100)
    a, b = mean_of(base + 0.1), mean_of(base)
    c = mean_of(samples(100, seed=5))
    # the same samples shifted: the difference is known exactly, though the intervals overlap widely
    assert (a - b).error < 1e-7
    assert (a - b).sign == 1
    assert a.low < b.value
    assert (a - c).error == pytest.approx((a.error**2 + c.error**2) ** 0.5, rel=0.15)
    words = verdict(
        a, {"b": b, "c": c, "d": Measured(a.value + 1, a.replicates + 1)}, gap=lambda d: f" by {d.value:.1f}"
    )
    assert words == "higher than b by 0.1; lower than d by -1.0; not significantly different from c"
    assert change("X", "W2", {1: a, 8: b}) == f"X: W2 falls from {a.text()} with N = 1 to {b.text()} with N = 8."
    assert "does not differ significantly" in change("X", "W2", {1: a, 8: c})


def test_a_group_counts_once_whatever_its_size():
    """By hand: groups 2, 5 and 9 with 1, 3 and 2 numbers; differences are paired by group."""
    x, group = torch.tensor([4.0, 1.0, 2.0, 6.0, 10.0, 2.0]), torch.tensor([5, 2, 5, 5, 9, 9])
    found = mean_of_groups(x, group)
    assert found.parts.tolist() == [1.0, 4.0, 6.0]
    assert (found.value, found.samples) == (pytest.approx(11 / 3), 3)
    assert found.error == pytest.approx(np.std([1.0, 4.0, 6.0], ddof=1) / 3**0.5)
    order = torch.tensor([3, 0, 5, 4, 2, 1])
    assert mean_of_groups(x[order] + 1, group[order]).__sub__(found).error == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"numbers of shape \(2,\) in groups of shape \(3,\)"):
        mean_of_groups(torch.ones(2), torch.ones(3))
