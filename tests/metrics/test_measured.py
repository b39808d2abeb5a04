"""The bootstrap: what its intervals promise, and what is said of them."""

import math

import pytest
import torch
from scipy.stats import binom

from mfm_benchmarks.claims import change, verdict
from mfm_lightning.metrics.distances import pairwise_distance
from mfm_lightning.metrics.measured import Measured, mean, mean_of, of_runs, ratio_of_runs, resampled, weights


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
    x = samples(400)
    found = mean_of(x, 2000)
    assert found.value == pytest.approx(float(x.mean()), abs=1e-6)
    assert found.error == pytest.approx(float(x.std(correction=0)) / 20, rel=0.08)  # 5 standard errors of 2,000
    assert found.high - found.value == pytest.approx(1.96 * found.error, rel=1e-4)


def test_without_resampling_there_is_a_number_and_no_interval():
    x = samples(20, 3)
    found = resampled(pairwise_distance, x, replicates=0)
    assert found.value == float(pairwise_distance(x))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(Measured(0.5, torch.empty(0), percentile=True).low)
    assert found.sign == 0


def test_intervals_cover_the_mean_and_the_mean_of_seeds():
    """95 % intervals of 300 independent data sets; false alarm below 1e-3 for a coverage of 92 % or more, which is what
    the bootstrap's small-sample error leaves at n = 60 (and 100 % would be as wrong)."""
    num, hits, hits_seeds = 300, 0, 0
    for i in range(num):
        data = samples(2, 60, seed=100 + i).exp()
        parts = [mean_of(part, 200) for part in data]
        truth = float(torch.tensor(0.5).exp())
        hits += parts[0].low < truth < parts[0].high
        both = mean(parts)
        hits_seeds += both.low < truth < both.high
    for count in (hits, hits_seeds):
        assert binom.ppf(0.0005, num, 0.88) < count <= binom.ppf(0.9995, num, 0.97)
    # two independent seeds make the error smaller by the root of two
    assert both.error == pytest.approx((parts[0].error ** 2 + parts[1].error ** 2) ** 0.5 / 2, rel=0.2)


def test_runs_have_students_interval():
    from scipy.stats import t as student

    runs = [1.0, 1.4, 0.9, 1.1]
    found, numbers = of_runs(runs), torch.tensor(runs, dtype=torch.float64)
    low, high = student.interval(0.95, 3, float(numbers.mean()), float(numbers.std()) / 2)
    assert (found.value, found.low, found.high) == pytest.approx((float(numbers.mean()), low, high), rel=1e-6)
    assert ratio_of_runs([2.0, 3.0], [1.0, 2.0]).value == pytest.approx(1.75)
    assert math.isnan(of_runs([1.0]).low)


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
