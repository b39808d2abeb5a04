"""Finite data, and narrow modes, with closed forms written out in float64; the package's oracles are not used."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from mfm_lightning.alignment.values import Estimate, GradientEstimator


class FiniteData:
    """Points `(M, D)` of the given probabilities; rewards `(M,)` tilt them. A model for methods that need a drift.

    With weights w_k(t, x) = softmax_k [log p_k - |x - t x1_k|^2 / (2 (1-t)^2)]: the denoiser is sum_k w_k x1_k, the
    drift (denoiser - x) / (1-t), and with e^{r_k} in the weights the denoiser is the tilted one. With a `deviation`
    the points are the means of Gaussian modes N(x1_k, c I): t^2 c + (1-t)^2 in place of (1-t)^2, and a mode's mean
    x1_k + t c / (t^2 c + (1-t)^2) (x - t x1_k) in place of x1_k.
    """

    def __init__(self, points, probability=None, rewards=None, deviation=0.0):
        self.variance = deviation**2
        self.points = torch.as_tensor(points, dtype=torch.float64)
        M = len(self.points)
        self.probability = torch.full((M,), 1 / M).double() if probability is None else torch.as_tensor(probability)
        self.rewards = torch.zeros(M).double() if rewards is None else torch.as_tensor(rewards).double()
        self.tilted_probability = (self.probability.log() + self.rewards).softmax(0)

    @property
    def state_shape(self):
        return (self.points.shape[1],)

    def denoiser(self, t, x, tilted=False) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))[:, None]
        total = t**2 * self.variance + (1 - t) ** 2
        centred = x[:, None] - t[..., None] * self.points
        weights = (self.probability.log() + tilted * self.rewards - centred.square().sum(2) / (2 * total)).softmax(1)
        means = self.points + (t * self.variance / total)[..., None] * centred
        return (weights[..., None] * means).sum(1)

    def drift(self, t, x, conditions=None) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
        assert (t < 1).all(), "the drift of points has no limit at 1 off the data"
        return (self.denoiser(t, x) - x) / (1 - t)[:, None]

    def reward(self, x) -> Tensor:
        """That of the nearest point."""
        return self.rewards[torch.cdist(x.double(), self.points).argmin(1)]

    def rms_distance(self, x) -> float:
        """To the nearest point, a coordinate."""
        nearest = torch.cdist(x.double(), self.points).min(1).values
        return (nearest.square().mean() / x.shape[1]).sqrt().item()

    def chi_square(self, x, tilted=False) -> float:
        """p-value of Pearson's test that the points nearest to independent x have the (tilted) probabilities."""
        counts = torch.cdist(x.double(), self.points).argmin(1).bincount(minlength=len(self.points))
        expected = len(x) * (self.tilted_probability if tilted else self.probability)
        assert expected.min() > 5
        return float(stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1))


class FiniteGradient(GradientEstimator):
    """grad V = t/(1-t)^2 (E'[x1 | x] - E[x1 | x]), E' under the tilted posterior."""

    def __init__(self, data: FiniteData):
        self.data = data

    def __call__(self, target, t, x, generator=None):
        shift = self.data.denoiser(t, x, tilted=True) - self.data.denoiser(t, x)
        t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))[:, None]
        ones = torch.ones(len(x))
        return Estimate(t / (1 - t) ** 2 * shift, 0 * ones, ones)
