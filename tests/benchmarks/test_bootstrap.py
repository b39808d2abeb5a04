"""The bootstrap of benchmarks against independent computations, and what its intervals promise."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import binom, pearsonr

from mfm_benchmarks import bootstrap
from mfm_benchmarks.bootstrap import Measured, RealFeatures
from mfm_benchmarks.claims import change, verdict
from mfm_lightning.metrics import distances


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frechet_reference(fake, real):
    a, b = fake.double().numpy(), real.double().numpy()
    c, d = np.cov(a.T), np.cov(b.T)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)


@pytest.mark.parametrize("num", [20, 60])  # fewer samples than features, and more
def test_frechet_is_that_of_scipy(num):
    real = samples(300, 30) * torch.linspace(0.5, 2, 30)
    fake = samples(num, 30, seed=1) + 0.3
    found = bootstrap.frechet(fake, RealFeatures(real), replicates=3)
    assert found.value == pytest.approx(frechet_reference(fake, real), rel=1e-6)
    # a replicate is the distance of the resampled set
    weights = bootstrap.weights(num, 3)[2].long()
    again = fake.repeat_interleave(weights, dim=0)
    assert found.replicates[1].item() == pytest.approx(frechet_reference(again, real), rel=1e-6)


def test_distances_are_those_of_the_metrics():
    x, y = samples(64, 2) * 0.8 + 0.1, samples(192, 2, seed=1)
    mmd = bootstrap.maximum_mean_discrepancy(x, y, replicates=2)
    assert mmd.value == pytest.approx(distances.mmd(x, y), abs=1e-9)
    # W2 to three times as many samples is that to each of ours taken three times
    wanted = distances.sliced_wasserstein(
        x.double().repeat_interleave(3, dim=0), y.double(), 4096, torch.Generator().manual_seed(0)
    )
    found = bootstrap.sliced_wasserstein(x, y, 4096, replicates=2)
    assert found.value == pytest.approx(wanted.item(), rel=1e-6)
    weights = bootstrap.weights(64, 2)[1].long()
    again = bootstrap.sliced_wasserstein(x.repeat_interleave(weights, dim=0), y, 4096, replicates=2)
    assert found.replicates[0].item() == pytest.approx(again.value, rel=1e-6)
    assert bootstrap.pairwise_distance(x, 2).value == pytest.approx(distances.mean_pairwise_distance(x), rel=1e-6)
    with pytest.raises(ValueError, match="100 reference samples for 64"):
        bootstrap.sliced_wasserstein(x, samples(100, 2))


def test_correlation_and_frequencies():
    y = samples(40)
    x = torch.stack([y + samples(40, seed=k) for k in (1, 2)])
    found = bootstrap.correlation(x, y)
    assert found.value == pytest.approx(np.mean([pearsonr(row, y).statistic for row in x]), abs=1e-6)
    assert -1 <= found.low < found.value < found.high <= 1
    classes = torch.tensor([0, 0, 1, 2])
    assert bootstrap.frequency_distance(classes, torch.tensor([0.5, 0.25, 0.25])).value == pytest.approx(0, abs=1e-12)
    assert bootstrap.frequency_distance(classes, torch.tensor([1.0, 0, 0])).value == pytest.approx(0.375**0.5)


def test_intervals_cover_the_mean_and_the_mean_of_seeds():
    """95 % intervals of 300 independent data sets; false alarm below 1e-3 for a coverage of 92 % or more, which is what
    the bootstrap's small-sample error leaves at n = 60 (and 100 % would be as wrong)."""
    num, hits, hits_seeds = 300, 0, 0
    for i in range(num):
        data = samples(2, 60, seed=100 + i).exp()
        parts = [bootstrap.mean_of(part, 200) for part in data]
        truth = float(torch.tensor(0.5).exp())
        hits += parts[0].low < truth < parts[0].high
        both = bootstrap.mean(parts)
        hits_seeds += both.low < truth < both.high
    for count in (hits, hits_seeds):
        assert binom.ppf(0.0005, num, 0.88) < count <= binom.ppf(0.9995, num, 0.97)
    # two independent seeds make the error smaller by the root of two
    assert both.error == pytest.approx((parts[0].error ** 2 + parts[1].error ** 2) ** 0.5 / 2, rel=0.2)


def test_differences_are_paired_and_claims_follow_them():
    base = samples(100)
    a, b = bootstrap.mean_of(base + 0.1), bootstrap.mean_of(base)
    c = bootstrap.mean_of(samples(100, seed=5))
    # the same samples shifted: the difference is known exactly, though the intervals overlap widely
    assert (a - b).error < 1e-7
    assert (a - b).sign == 1
    assert a.low < b.value
    assert (a - c).error == pytest.approx((a.error**2 + c.error**2) ** 0.5, rel=0.15)
    words = verdict(
        a, {"b": b, "c": c, "d": Measured(a.value + 1, a.replicates + 1)}, gap=lambda d: f" by {d.value:.1f}"
    )
    assert words == "higher than b by 0.1; lower than d by -1.0; not told apart from c"
    assert change("X", "W2", {1: a, 8: b}) == f"X: W2 falls from {a.text()} with N = 1 to {b.text()} with N = 8."
    assert "is not told apart" in change("X", "W2", {1: a, 8: c})
