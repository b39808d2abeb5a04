"""The Fréchet distance against scipy, torch-fidelity and torchmetrics, from features and from statistics."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from mfm_lightning.metrics.fid import RunningStatistics
from mfm_lightning.metrics.frechet import Gaussian, frechet, frechet_of_features
from mfm_lightning.metrics.measured import resampled, weights


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
    found = resampled(frechet_of_features, fake, Gaussian.of_features(real), replicates=3)
    assert found.value == pytest.approx(frechet_reference(fake, real), rel=1e-6)
    # a replicate is the distance of the resampled set
    row = weights(num, 3)[2].long()
    again = fake.repeat_interleave(row, dim=0)
    assert found.replicates[1].item() == pytest.approx(frechet_reference(again, real), rel=1e-6)


def test_frechet_of_known_gaussians():
    """Covariances that commute: (m1 - m2)^2 + (s1 - s2)^2, axis by axis."""
    turn = torch.linalg.qr(samples(5, 5).double()).Q
    a, b = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([1.0, 1.0, 0.0, 1.0, 6.0]).double()
    means = samples(2, 5, seed=1).double()
    gaussians = [Gaussian.of_moments(m, turn @ torch.diag(s**2) @ turn.T) for m, s in zip(means, (a, b), strict=True)]
    wanted = float((means[0] - means[1]).square().sum() + (a - b).square().sum())
    assert frechet(*gaussians) == pytest.approx(wanted, rel=1e-7)
    with pytest.raises(ValueError, match="of 5 and of 4 features cannot be compared"):
        frechet(gaussians[0], Gaussian.of_features(samples(9, 4)))


@pytest.mark.parametrize(("num", "size"), [(40, 32), (300, 32), (12, 96), (40, 96)])
def test_all_routes_and_libraries_agree(num, size):
    """From features, from their statistics, by torch-fidelity and by torchmetrics: to 1e-6 relative."""
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torchmetrics.image.fid import FrechetInceptionDistance

    real = (samples(500, size).double() * torch.linspace(0.2, 2, size)).relu()
    fake = (samples(num, size, seed=1).double() + 0.3).relu()
    both = [RunningStatistics(size) for _ in range(2)]
    for running, x in zip(both, (fake, real), strict=True):
        for part in x.split(7):
            running.update(part)
    a, b = (running.statistics() for running in both)
    assert (a.num_samples, b.num_samples) == (num, 500)
    np.testing.assert_allclose(a.sigma, np.cov(fake.numpy(), rowvar=False), rtol=1e-8, atol=1e-12)
    found = frechet(a.gaussian, b.gaussian)
    assert frechet(b.gaussian, a.gaussian) == pytest.approx(found, rel=1e-9)
    assert frechet_of_features(fake, Gaussian.of_features(real)).item() == pytest.approx(found, rel=1e-6)
    pair = [{"mu": s.mu, "sigma": s.sigma} for s in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-6)

    class Features(torch.nn.Module):
        num_features = size

        def forward(self, x):
            return x.flatten(1)

    metric = FrechetInceptionDistance(Features(), normalize=True)
    metric.update(real[:, :, None, None], real=True)
    metric.update(fake[:, :, None, None], real=False)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)


def test_the_distance_to_itself_is_zero():
    x = samples(10, 40)  # covariances of rank 9
    assert abs(frechet(Gaussian.of_features(x), Gaussian.of_features(x))) < 1e-12 * 40
