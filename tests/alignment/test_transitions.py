"""GLASS transitions by the correlation of their noises: moments on a Gaussian in closed form, at every correlation."""

import math

import pytest
import torch
from scipy import stats

from mfm_lightning.alignment import FeynmanKac, Search, Target, TimeGrid
from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.transitions import bridge, correlation_of
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.noise import seeded

MEAN, VARIANCE = 0.8, 0.3
GAUSSIAN = GaussianMixture([[MEAN] * 4], VARIANCE)
REWARD = LinearGaussianLikelihood([1.0, -1.0, 0.5, 0.0], 0.3, 1.0)


class ExactGaussian(Posterior):
    """Draws of the posterior of N(m, c I): N(m + t c/n (x - t m), (1-t)^2 c/n I), n = t^2 c + (1-t)^2."""

    def __call__(self, target, t, x_t, noise):
        mean, variance = posterior(float(t), x_t)
        return mean[:, None] + math.sqrt(variance) * noise


def posterior(t, x):
    noisy = t**2 * VARIANCE + (1 - t) ** 2
    return MEAN + t * VARIANCE / noisy * (x - t * MEAN), (1 - t) ** 2 * VARIANCE / noisy


def within(x, mean, variance):
    """Of `(N, 4)` numbers: each coordinate's mean by its z, and variance by chi-square, two-sided at 1e-7 each: false
    alarms of 8e-7 in all."""
    n = len(x)
    z = (x.double().mean(0) - mean).abs() / math.sqrt(variance / n)
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], n - 1) / (n - 1)
    ratio = x.double().var(0) / variance
    return bool((z < stats.norm.isf(5e-8)).all() and (ratio > low).all() and (ratio < high).all())


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.4, 1.0, "markov"])
@pytest.mark.parametrize(("now", "then"), [(0.2, 0.5), (0.5, 0.6), (0.5, 1.0)])
def test_the_transitions_moments_on_a_gaussian(correlation, now, then):
    """x_t' given x_t is N(t' m + rho g (x - t m), (t' - rho g t)^2 v + (1-t')^2 (1 - rho^2)), g = (1-t')/(1-t) and m, v
    the posterior's; and of states of p_t it is p_t', whatever rho. 20,000 particles; 15 cases of two tests each, false
    alarms below 3e-5 in all."""
    method = FeynmanKac(
        transition="glass", posterior=ExactGaussian(), correlation=correlation, num_particles=2, grid=TimeGrid(2)
    )
    rho = now * (1 - then) / (then * (1 - now)) if correlation == "markov" else correlation
    one = torch.tensor([[0.4, -0.3, 1.0, 0.0]])
    x = one.repeat(20_000, 1)
    moved, log_ratio = method.move(Target(GAUSSIAN, REWARD), (now, then), x, None, seeded())
    mean, variance = posterior(now, one[0].double())
    g = (1 - then) / (1 - now)
    expected = then * mean + rho * g * (one[0] - now * mean)
    spread = (then - rho * g * now) ** 2 * variance + (1 - then) ** 2 * (1 - rho**2)
    assert within(moved, expected, spread)
    assert (log_ratio == 0).all()
    wrong = 0.5 if abs(rho) < 0.3 else 0.0  # there is power: another correlation is refused, but at t' = 1
    other = (then - wrong * g * now) ** 2 * variance + (1 - then) ** 2 * (1 - wrong**2)
    assert then == 1 or not within(moved, then * mean + wrong * g * (one[0] - now * mean), other)

    noisy = now * MEAN + math.sqrt(now**2 * VARIANCE + (1 - now) ** 2) * torch.randn(20_000, 4, generator=seeded(1))
    moved, _ = method.move(Target(GAUSSIAN, REWARD), (now, then), noisy, None, seeded(2))
    assert within(moved, then * MEAN, then**2 * VARIANCE + (1 - then) ** 2)


def test_the_markov_correlation_is_the_base_sdes():
    """At rho = t (1-t') / (t' (1-t)) a number gives the transition that "markov" gives; and that is Markov: x_t given
    x_t' is N((t/t') x_t', .) whatever x1, so cov(x_t, x_t' | x1) = (t/t') var(x_t' | x1)."""
    x, x1 = torch.randn(2, 5, 3, generator=seeded(), dtype=torch.float64)
    for now, then in [(0.0, 0.3), (0.2, 0.25), (0.5, 0.9), (0.7, 1.0)]:
        rho = correlation_of("markov", now, then)
        assert rho * (1 - now) * (1 - then) == pytest.approx(now / then * (1 - then) ** 2, abs=1e-14)
        markov, number = bridge(now, then, x, x1), bridge(now, then, x, x1, rho)
        torch.testing.assert_close(markov[0], number[0])
        assert markov[1] == pytest.approx(number[1], abs=1e-14)


@pytest.mark.parametrize("correlation", [0.0, 0.6, "markov"])
def test_the_normaliser_has_no_bias_at_any_correlation(correlation):
    """Data N(m, c I), reward log N(y; a x1, s^2): E[e^r] = N(y; a m, s^2 + c |a|^2). 32 populations of 128 particles
    with exact draws: their mean over the exact value within 5 standard errors, 1e-6 false alarms by the normal
    distribution, and those errors below 10 %."""
    method = FeynmanKac(
        transition="glass",
        posterior=ExactGaussian(),
        correlation=correlation,
        num_particles=128,
        grid=TimeGrid(8, 0.0),
    )
    found = method(Target(GAUSSIAN, REWARD), torch.randn(32, 4, generator=seeded(3)), seeded(4)).log_normaliser
    a = REWARD.operator[0]
    evidence = torch.distributions.Normal(float(a.sum()) * MEAN, math.sqrt(1 + VARIANCE * float(a @ a)))
    ratio = (found - evidence.log_prob(torch.tensor(0.3))).exp()
    error = ratio.std() / 32**0.5
    assert (ratio.mean() - 1).abs() < 5 * error < 0.5


class Fixed(Posterior):
    """Draws around 1, recorded with their time and state."""

    def __init__(self):
        self.calls = []

    def __call__(self, target, t, x_t, noise):
        drawn = 1 + 0.1 * noise
        self.calls.append((float(t), x_t.clone(), drawn.clone()))
        return drawn


class Still:
    state_shape = (256,)

    def drift(self, t, x, conditions=None):
        return 0 * x


@pytest.mark.parametrize("correlation", [-0.7, 0.0, 0.6, 1.0, "markov"])
def test_search_renoises_by_the_correlation(correlation):
    """z' = (x' - t' c)/(1-t') less rho z, with z = (x - t c)/(1-t), is sqrt(1 - rho^2) times n = 2,048 standard normal
    numbers: their squares are chi-square with n degrees of freedom, and their product with z is normal. 15 steps, each
    at 1e-6: false alarms below 2e-5."""
    posterior = Fixed()
    method = Search(2, 3, 4, posterior=posterior, correlation=correlation)
    method(Target(Still(), lambda x: x[:, 0]), torch.randn(4, 256, generator=seeded()), seeded(1))
    for (t, x, draws), (then, following, _) in zip(posterior.calls, posterior.calls[1:], strict=False):
        grouped = draws.reshape(4, 6, 256)
        c = torch.stack([group[group[:, 0].argmax()] for group in grouped]).repeat_interleave(2, dim=0)
        z, following = (x - t * c) / (1 - t), (following - then * c) / (1 - then)
        rho = t * (1 - then) / (then * (1 - t)) if correlation == "markov" else correlation
        rest = following - rho * z
        if rho == 1:
            assert rest.abs().max() < 1e-4
            continue
        fresh = rest / math.sqrt(1 - rho**2)
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], fresh.numel())
        assert low < fresh.square().sum() < high
        assert (fresh * z).sum().abs() / z.norm() < stats.norm.isf(5e-7)


def test_the_defaults_of_search_are_0_and_1():
    def states(**options):
        x0 = torch.randn(4, 256, generator=seeded())
        method = Search(2, 3, 4, posterior=Fixed(), **options)
        return method(Target(Still(), lambda x: x[:, 0] * x[:, 1]), x0, seeded(1)).states

    assert torch.equal(states(correlation=0.0), states())
    assert torch.equal(states(correlation=1.0), states(stochastic=False))


def test_what_is_no_correlation_is_refused():
    for make, message in (
        (lambda: FeynmanKac(transition="glass", correlation=1.5), r"correlation 1.5 must be a number in \[-1, 1\]"),
        (lambda: FeynmanKac(transition="glass", correlation="ddim"), "correlation 'ddim' must be .* 'markov'"),
        (lambda: FeynmanKac(correlation=0.5), "correlation 0.5 is for GLASS transitions"),
        (lambda: Search(correlation=float("nan")), "correlation nan must be"),
        (lambda: Search(correlation=0.5, stochastic=False), "stochastic false, which is a correlation of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
