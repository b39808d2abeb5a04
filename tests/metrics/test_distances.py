"""Measures against brute force, scipy and closed forms, plain and resampled."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, wasserstein_distance

from mfm_lightning.metrics.distances import (
    correlation,
    frequency_distance,
    mmd,
    pairwise_distance,
    sliced_wasserstein,
)
from mfm_lightning.metrics.measured import resampled, weights
from tests.noise import seeded


def samples(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def resampled_set(x, row):
    """The set that a row of weights stands for."""
    return x.repeat_interleave(row.long(), dim=0)


# sliced W2


def sorted_distance(x, y, num_projections, seed):
    """W2 by quantiles of both sides, projection by projection."""
    directions = torch.randn(x.shape[1], num_projections, generator=seeded(seed), dtype=x.dtype)
    total, L = 0.0, math.lcm(len(x), len(y))
    for d in directions.T:
        a, b = (np.sort((z @ (d / d.norm())).numpy()).repeat(L // len(z)) for z in (x, y))
        total += ((a - b) ** 2).mean()
    return (total / num_projections) ** 0.5


def test_sliced_wasserstein_of_a_shift():
    """Shifted by m, each direction d gives |m . d|: the root of its mean square is |m| / sqrt(D)."""
    x, shift = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 0.0, 4.0])
    found = sliced_wasserstein(x, x + shift, 20_000, torch.Generator().manual_seed(1))
    assert found.item() == pytest.approx(5 / math.sqrt(3), rel=0.02)
    with pytest.raises(ValueError, match="must be equal in shape"):
        sliced_wasserstein(x, x[:50])


def test_sliced_wasserstein_is_that_of_sorted_projections():
    x, y = samples(64, 2).double() * 0.8 + 0.1, samples(192, 2, seed=1).double()
    for reference in (y[:64], y):  # as many, and three times as many
        found = sliced_wasserstein(x, reference, 32, seeded(3))
        assert found.item() == pytest.approx(sorted_distance(x, reference, 32, 3), rel=1e-9)
    # points that only move by one number: in one dimension W1, W2 and the shift are the same
    assert sliced_wasserstein(x[:, :1], x[:, :1] + 0.7, 1).item() == pytest.approx(
        wasserstein_distance(x[:, 0], x[:, 0] + 0.7), rel=1e-9
    )
    with pytest.raises(ValueError, match="100 reference samples for 64"):
        sliced_wasserstein(x, samples(100, 2).double())


def test_sliced_wasserstein_of_several_problems_at_once():
    x, y = samples(3, 2, 40, 2), samples(3, 2, 80, 2, seed=1)
    found = sliced_wasserstein(x, y, 16, seeded())
    assert found.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        assert found[i, j].item() == pytest.approx(sliced_wasserstein(x[i, j], y[i, j], 16, seeded()).item(), rel=1e-5)


def test_sliced_wasserstein_of_a_reference_of_several_times_as_many():
    x, y = samples(64, 2) * 0.8 + 0.1, samples(192, 2, seed=1)
    # W2 to three times as many samples is that to each of ours taken three times
    wanted = sliced_wasserstein(x.double().repeat_interleave(3, dim=0), y.double(), 4096, seeded())
    found = resampled(sliced_wasserstein, x.double(), y.double(), 4096, seeded(), replicates=2)
    assert found.value == pytest.approx(wanted.item(), rel=1e-6)
    again = sliced_wasserstein(resampled_set(x.double(), weights(64, 2)[1]), y.double(), 4096, seeded())
    assert found.replicates[0].item() == pytest.approx(again.item(), rel=1e-6)


# MMD


def test_mmd_is_the_unbiased_estimate():
    torch.manual_seed(0)
    x, y = torch.randn(7, 2).double(), torch.randn(9, 2).double() + 0.5
    width = torch.pdist(y).median()
    k = lambda a, b: torch.exp(-0.5 * torch.cdist(a, b) ** 2 / width**2)  # noqa: E731
    within = sum((k(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y))
    assert mmd(x, y, scales=[1.0]).item() == pytest.approx(float(within - 2 * k(x, y).mean()), abs=1e-12)
    # its mean over pairs of samples of one distribution is 0: z-test at 4.5 standard errors
    null = torch.stack([mmd(torch.randn(50, 2), torch.randn(50, 2)) for _ in range(200)])
    assert abs(null.mean()) < 4.5 * null.std() / math.sqrt(200)
    assert null.min() < 0
    assert mmd(torch.randn(50, 2) + 1, torch.randn(50, 2)) > null.max()


def naive_mmd(x, y, scales, own=None):
    """Two loops over samples; `own[i]`: which sample of x each is, so that one drawn twice is no pair."""
    x, y = x.double().numpy(), y.double().numpy()
    own = range(len(x)) if own is None else own
    median = np.sort([np.linalg.norm(a - b) for a, b in itertools.combinations(y, 2)])
    median = median[(len(median) - 1) // 2]

    def kernel(a, b):
        return np.mean([np.exp(-0.5 * (np.linalg.norm(a - b) / (s * median)) ** 2) for s in scales])

    within = np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if own[i] != own[j]])
    reference = np.mean([kernel(a, b) for a, b in itertools.combinations(y, 2)])
    return within + reference - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_mmd_is_that_of_two_loops():
    x, y, scales = samples(12, 3) + 0.3, samples(20, 3, seed=1), (0.25, 0.5, 1.0, 2.0, 4.0)
    found = resampled(mmd, x, y, replicates=2)
    assert found.value == pytest.approx(naive_mmd(x, y, scales), abs=1e-9)
    assert found.value == pytest.approx(mmd(x, y).item(), abs=1e-9)
    row = weights(12, 2)[1]
    own = torch.arange(12).repeat_interleave(row.long()).tolist()
    assert found.replicates[0].item() == pytest.approx(naive_mmd(resampled_set(x, row), y, scales, own), abs=1e-9)


# diversity


def test_diversity_is_within_classes():
    x = torch.tensor([[0.0], [2.0], [10.0], [14.0], [99.0]])
    assert pairwise_distance(x[:4], torch.tensor([0, 0, 1, 1])).item() == pytest.approx(3.0)
    assert pairwise_distance(x[:2]).item() == pytest.approx(2.0)
    one_alone = torch.tensor([0, 0, 1, 1, 2])
    assert pairwise_distance(x, one_alone).item() == pytest.approx(3.0)  # one alone says nothing


def test_pairwise_distance_is_that_of_two_loops():
    x, label = samples(20, 2, 3), torch.arange(20) % 3
    naive = lambda x: np.mean([float((a - b).norm()) for a, b in itertools.combinations(x, 2)])  # noqa: E731
    assert pairwise_distance(x).item() == pytest.approx(naive(x), rel=1e-6)
    assert pairwise_distance(x, label).item() == pytest.approx(
        np.mean([naive(x[label == c]) for c in range(3)]), rel=1e-6
    )
    found, row = resampled(pairwise_distance, x, label, replicates=2), weights(20, 2)[1]
    drawn = torch.arange(20).repeat_interleave(row.long())
    by_class = [
        np.mean([float((x[i] - x[j]).norm()) for i, j in itertools.combinations(drawn[label[drawn] == c], 2) if i != j])
        for c in range(3)
    ]
    assert found.replicates[0].item() == pytest.approx(np.mean(by_class), rel=1e-6)


# correlation and frequencies


def test_correlation_and_frequencies():
    y = samples(40)
    x = torch.stack([y + samples(40, seed=k) for k in (1, 2)])
    found = correlation(x, y)
    assert found.value == pytest.approx(np.mean([pearsonr(row, y).statistic for row in x]), abs=1e-6)
    assert -1 <= found.low < found.value < found.high <= 1
    classes = torch.tensor([0, 0, 1, 2])
    assert frequency_distance(classes, torch.tensor([0.5, 0.25, 0.25])).item() == pytest.approx(0, abs=1e-12)
    assert frequency_distance(classes, torch.tensor([1.0, 0, 0])).item() == pytest.approx(0.375**0.5)
    shares, row = resampled(frequency_distance, classes, torch.tensor([1.0, 0, 0]), replicates=2), weights(4, 2)[1]
    counts = np.bincount(resampled_set(classes, row), minlength=3) / 4
    assert shares.replicates[0].item() == pytest.approx(np.linalg.norm(counts - [1, 0, 0]))


def test_the_interval_of_a_correlation_is_fishers_or_wider():
    """Of pairs as scattered as a normal distribution's, tanh(atanh r +- 1.96 / (n - 3)^(1/2)) and not much more."""
    x, y = samples(400), samples(400, seed=1)
    found, z = correlation(x + y, y), math.atanh(pearsonr(x + y, y).statistic)
    fisher = math.tanh(z - 1.96 / 397**0.5), math.tanh(z + 1.96 / 397**0.5)
    assert fisher[0] - 0.02 < found.low <= fisher[0] + 1e-6
    assert fisher[1] - 1e-6 <= found.high < fisher[1] + 0.02


def test_the_parts_of_a_correlation_are_those_of_leaving_one_out():
    """Jackknife: n r - (n - 1) r without the i-th pair is r + its part, to first order in 1/n."""
    x, y = samples(300), samples(300, seed=1)
    x = torch.stack([x + y, x - y])
    r = lambda keep: np.mean([pearsonr(row[keep], y[keep]).statistic for row in x])  # noqa: E731
    index = torch.arange(300)
    left = torch.tensor([300 * r(index >= 0) - 299 * r(index != i) for i in range(20)], dtype=torch.float64)
    found = correlation(x, y)
    assert torch.allclose(left - found.value, found.parts[:20], atol=0.05 * float(found.parts.std()))


@pytest.mark.parametrize("level", [0.1, 0.0, 1e9])
def test_there_is_no_correlation_with_what_does_not_vary(level):
    y = samples(30)
    for found in (correlation(torch.full((30,), level), y), correlation(y, torch.full((30,), level))):
        assert math.isnan(found.value)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert math.isnan(correlation(torch.stack([y, torch.full((30,), level)]), y).value)


def test_no_interval_of_a_correlation_is_narrower_than_fishers():
    """Of 100 samples of 12 pairs, of which the resampled error alone is smaller for many."""
    generator, narrow = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        x, noise = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        found = correlation(0.9 * x + 0.4 * noise, x)
        z, fishers = math.atanh(found.value), 1.959964 / math.sqrt(12 - 3)
        assert z - math.atanh(found.low) >= fishers - 1e-6
        assert math.atanh(found.high) - z >= fishers - 1e-6
        narrow += 1.96 * found.unscaled().error < fishers
    assert narrow > 20
