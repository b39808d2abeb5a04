"""Distances against brute force and closed forms."""

import math

import pytest
import torch

from mfm_lightning.metrics.distances import mean_pairwise_distance, mmd, sliced_wasserstein


def test_mmd_is_the_unbiased_estimate():
    torch.manual_seed(0)
    x, y = torch.randn(7, 2).double(), torch.randn(9, 2).double() + 0.5
    width = torch.pdist(y).median()
    k = lambda a, b: torch.exp(-0.5 * torch.cdist(a, b) ** 2 / width**2)  # noqa: E731
    within = sum((k(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y))
    assert mmd(x, y, scales=[1.0]) == pytest.approx(float(within - 2 * k(x, y).mean()), abs=1e-12)
    # its mean over pairs of samples of one distribution is 0: z-test at 4.5 standard errors
    null = torch.tensor([mmd(torch.randn(50, 2), torch.randn(50, 2)) for _ in range(200)])
    assert abs(null.mean()) < 4.5 * null.std() / math.sqrt(200)
    assert null.min() < 0
    assert mmd(torch.randn(50, 2) + 1, torch.randn(50, 2)) > null.max()


def test_sliced_wasserstein_of_a_shift():
    """Shifted by m, each direction d gives |m . d|: the root of its mean square is |m| / sqrt(D)."""
    x, shift = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 0.0, 4.0])
    found = sliced_wasserstein(x, x + shift, 20_000, torch.Generator().manual_seed(1))
    assert found.item() == pytest.approx(5 / math.sqrt(3), rel=0.02)
    with pytest.raises(ValueError, match="must be equal in shape"):
        sliced_wasserstein(x, x[:50])


def test_diversity_is_within_classes():
    x = torch.tensor([[0.0], [2.0], [10.0], [14.0], [99.0]])
    assert mean_pairwise_distance(x[:4], torch.tensor([0, 0, 1, 1])) == pytest.approx(3.0)
    assert mean_pairwise_distance(x[:2]) == pytest.approx(2.0)
    assert mean_pairwise_distance(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(3.0)  # one alone says nothing
