"""Weighted Diamond Maps against closed forms: the weights, the value and its gradient from a plain exact flow map.

On a line, the flow map of any density is monotone and carries quantiles: X_{s,u}(x) = F_u^-1(F_s(x)), written here.
"""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from mfm_lightning.alignment import DiamondGradient, DiamondGradientFree, DiamondPosterior, Steering, Target, TimeGrid
from mfm_lightning.alignment.diamond import renoising, weighted_draws
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.oracles import GaussianMixture
from tests.noise import seeded

MEANS, VARIANCES, SHARES = (torch.tensor(v).double() for v in ([-1.2, 0.4, 1.6], [0.15, 0.1, 0.3], [0.3, 0.3, 0.4]))
TILT = 1.3


def parts_of(t, x):
    """Mean, deviation and weighted density of the components of p_t at x `(B,)`, each `(B, 3)`."""
    t, x = t[:, None], x[:, None]
    mean, deviation = t * MEANS, (t**2 * VARIANCES + (1 - t) ** 2).sqrt()
    return mean, deviation, SHARES * torch.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * math.sqrt(math.tau))


def below(t, x):
    """The distribution function of p_t at x."""
    mean, deviation, _ = parts_of(t, x)
    return (SHARES * torch.special.ndtr((x[:, None] - mean) / deviation)).sum(1)


class Line(nn.Module):
    """v_{s,u} of the mixture on a line, at t = 0: the quantile map by bisection, its derivative p_s(x) / p_u(X)."""

    state_shape, num_classes, guidance_scales = (1,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()).double(), requires_grad=False)

    def forward(self, s, u, x, t, x_t, conditions):
        assert (t == 0).all()
        assert (x_t == 0).all()  # the plain flow map
        s, u, start = s.double(), u.double(), x[:, 0].detach().double()
        if bool((s == u).all()):
            mean, deviation, density = parts_of(s, start)
            moved = s[:, None] * VARIANCES - (1 - s[:, None])
            inside = MEANS + moved / deviation**2 * (start[:, None] - mean)
            return ((density * inside).sum(1) / density.sum(1))[:, None].to(x)
        wanted, low, high = below(s, start), torch.full_like(start, -12), torch.full_like(start, 12)
        for _ in range(60):
            middle = (low + high) / 2
            less = below(u, middle) < wanted
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        end = (low + high) / 2
        slope = parts_of(s, start)[2].sum(1) / parts_of(u, end)[2].sum(1)
        end = end[:, None] + slope[:, None] * (x - x.detach())
        return (end - x) / (u - s)[:, None]


LINE = MetaFlowMap(Line())


def exact(t, x, reward):
    """V_t(x), its derivative and (sigma^2/2) V' by quadrature."""
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    posterior = parts_of(torch.ones(1).double(), grid)[2].sum(1).log() - (x - t * grid) ** 2 / (2 * (1 - t) ** 2)
    tilted = posterior + reward(grid[:, None])
    value = tilted.logsumexp(0) - posterior.logsumexp(0)
    product = (tilted.softmax(0) - posterior.softmax(0)) @ grid / (1 - t)
    return value.item(), (t / (1 - t) * product).item(), product.item()


def reward(x1):
    return (TILT * torch.sin(2 * x1[:, 0]) + x1[:, 0]).to(x1)


def within(estimates, wanted, false_alarm=5e-7):
    """Mean of independent estimates within t's quantile of their standard errors."""
    n = len(estimates)
    error = estimates.double().std() / n**0.5
    z = (estimates.double().mean() - wanted).abs() / error
    return bool(z < stats.t.isf(false_alarm / 2, n - 1)), float(z)


@pytest.mark.parametrize("snr_factor", [None, 3.0])
@pytest.mark.parametrize("t", [0.0, 0.15, 0.5, 0.8])
def test_value_and_gradient_converge_to_the_exact_ones(t, snr_factor):
    """32 estimates of one state from 2,048 draws each, 12 nodes; their mean is compared with quadrature, in its
    standard errors (t, 31 degrees of freedom): value, gradient and product of two estimators in 8 cases, at 5e-7 each:
    false alarms below 3e-5. The bias of normalised weights is of order 1/N, an eighth of a standard error."""
    x = torch.full((32, 1), 0.4 * t + 0.3).double()
    target = Target(LINE, reward)
    value, slope, product = exact(t, x[0, 0], reward)
    for kind in (DiamondGradientFree, DiamondGradient):
        found = kind(2048, snr_factor, nodes=12)(target, t, x, seeded(1))
        numbers = {"value": (found.value, value), "steering": (found.steering[:, 0], product)}
        if t > 0:
            numbers["gradient"] = (found.gradient[:, 0], slope)
        for what, (estimates, wanted) in numbers.items():
            assert within(estimates, wanted)[0], (kind, what, within(estimates, wanted)[1])
            assert estimates.std() < 0.15 * (1 + abs(wanted)), (kind, what)
        assert ((found.posterior_ess > 100) & (found.posterior_ess <= 2048.01)).all()
        assert (found.ess > 100).all()


def test_the_gradient_is_that_of_the_value():
    """Of the estimate with its noise fixed, by central differences, with nodes enough that the integral is exact."""
    target, x, eps = Target(LINE, reward), torch.tensor([[0.1], [0.7], [-0.9]]).double(), 1e-4
    estimator = DiamondGradient(8, nodes=40)
    found = estimator(target, 0.4, x, seeded(2)).gradient

    def value(state):
        times = torch.full((3,), 0.4).double()
        noise = torch.randn(3, 8, 1, generator=seeded(2), dtype=torch.float64)
        x1, log_weights = weighted_draws(target, times, state, noise, None, 40)
        r = reward(x1.flatten(0, 1)).reshape(3, 8)
        return (log_weights + r).logsumexp(1) - log_weights.logsumexp(1)

    slope = (value(x + eps) - value(x - eps)) / (2 * eps)
    torch.testing.assert_close(found[:, 0], slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("snr_factor", [None, 2.0, 7.0])
def test_the_weights_are_those_of_the_densities(snr_factor):
    """Differences of log p_t'(z) + log N(x_t; t x1, (1-t)^2) - log q(z | x_t), each density written out."""
    t, x = torch.tensor([0.0, 0.2, 0.7]).double(), torch.tensor([[0.5], [-0.4], [1.1]]).double()
    eps = torch.randn(3, 6, 1, generator=seeded(), dtype=torch.float64)
    x1, log_weights = weighted_draws(Target(LINE, reward), t, x, eps, snr_factor, 40)
    odds = t / (1 - t)
    factor = 2 + 1 / odds**2 if snr_factor is None else torch.full_like(t, snr_factor)
    lower = odds / factor.sqrt()
    time = lower / (1 + lower)  # t'
    a = (1 - time) / ((1 - t) * factor.sqrt())  # t'/t
    variance = (1 - time) ** 2 - a**2 * (1 - t) ** 2  # of the noising process from t to t'
    found = renoising(t, snr_factor)
    torch.testing.assert_close(found[0], time)
    torch.testing.assert_close(found[1], a)
    torch.testing.assert_close(found[2], variance.sqrt())
    z = a[:, None] * x + variance.sqrt()[:, None] * eps[..., 0]
    for i in range(3):
        p = parts_of(time[[i]].expand(6), z[i])[2].sum(1).log()
        q = torch.distributions.Normal(a[i] * x[i], variance[i].sqrt()).log_prob(z[i])
        likelihood = torch.distributions.Normal(t[i] * x1[i, :, 0], 1 - t[i]).log_prob(x[i])
        wanted = p + likelihood - q
        torch.testing.assert_close(below(torch.ones(6).double(), x1[i, :, 0]), below(time[[i]].expand(6), z[i]))
        torch.testing.assert_close(log_weights[i] - log_weights[i].mean(), wanted - wanted.mean(), rtol=1e-5, atol=1e-6)


class Isotropic(nn.Module):
    """The flow of N(0, I) in eight dimensions: X_{s,u}(x) = S_u/S_s x, S_t^2 = t^2 + (1-t)^2."""

    state_shape, num_classes, guidance_scales = (8,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, s, u, x, t, x_t, conditions):
        s, u = s[:, None], u[:, None]
        S_s, S_u = ((w**2 + (1 - w) ** 2).sqrt() for w in (s, u))
        return x * 2 * (u + s - 1) / (S_s * (S_u + S_s))


def test_all_weights_are_equal_for_standard_normal_data():
    """With the default factor the proposal is the posterior: N(t x/S^2, (1-t)^2/S^2)."""
    x, eps = torch.randn(5, 8, generator=seeded()).double(), torch.randn(5, 32, 8, generator=seeded(1)).double()
    t = torch.tensor([0.0, 0.1, 0.4, 0.8, 0.97]).double()
    x1, log_weights = weighted_draws(Target(MetaFlowMap(Isotropic()), reward), t, x, eps)
    assert (log_weights - log_weights.mean(1, keepdim=True)).abs().max() < 1e-9
    squared = (t**2 + (1 - t) ** 2)[:, None, None]
    wanted = t[:, None, None] / squared * x[:, None] + (1 - t)[:, None, None] / squared.sqrt() * eps
    torch.testing.assert_close(x1, wanted)
    found = DiamondGradientFree(32)(Target(MetaFlowMap(Isotropic()), reward), t, x, seeded())
    torch.testing.assert_close(found.posterior_ess, torch.full((5,), 32.0))


@pytest.mark.parametrize("t", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_the_default_factor_leaves_most_draws_in_use(t):
    """Of 64 draws of 200 noised samples, with one node; a fixed factor of 5 wastes a third late. The figures are in
    docs/lookahead.md."""
    k = torch.multinomial(SHARES, 200, True, generator=seeded(7))
    x1 = MEANS[k] + VARIANCES[k].sqrt() * torch.randn(200, generator=seeded(8)).double()
    x = (t * x1 + (1 - t) * torch.randn(200, generator=seeded(9)).double())[:, None]
    used, fixed = (
        DiamondGradientFree(64, factor)(Target(LINE, reward), t, x, seeded(1)).posterior_ess.mean() / 64
        for factor in (None, 5.0)
    )
    assert used > 0.93
    assert fixed < 0.72 or t < 0.95


def test_a_constant_reward_has_no_gradient():
    target = Target(LINE, lambda x1: 0 * x1[:, 0] + 2.5)
    for kind in (DiamondGradient, DiamondGradientFree):
        found = kind(5)(target, 0.4, torch.randn(7, 1, generator=seeded()).double(), seeded(1))
        torch.testing.assert_close(found.value, torch.full((7,), 2.5))
        assert found.gradient.abs().max() < 1e-6
        assert found.steering.abs().max() < 1e-6
        torch.testing.assert_close(found.ess, found.posterior_ess)


class Integrated(nn.Module):
    """A mixture's flow map as its ODE with many steps (Runge-Kutta, fourth order)."""

    state_shape, num_classes, guidance_scales = (2,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self, oracle, steps=24):
        super().__init__()
        self.oracle, self.steps = oracle, steps
        self.one = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, s, u, x, t, x_t, conditions):
        if bool((s == u).all()):
            return self.oracle.drift(s, x)
        step, end = (u - s) / self.steps, x
        for k in range(self.steps):
            now, h = s + k * step, step[:, None]
            k1 = self.oracle.drift(now, end)
            k2 = self.oracle.drift(now + step / 2, end + h / 2 * k1)
            k3 = self.oracle.drift(now + step / 2, end + h / 2 * k2)
            k4 = self.oracle.drift(now + step, end + h * k3)
            end = end + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (end - x) / (u - s)[:, None]


def test_value_and_gradient_in_the_plane():
    """Three Gaussians in two dimensions, and a reward a x1, which moves and weighs the posterior's components
    N(m_k, v I): e^V = sum_k w_k e^{a m_k + v |a|^2/2}. 48 estimates of 512 draws; value and two coordinates of the
    product at 5e-7 each."""
    means, variance, t = torch.tensor([[-1.5, 0.5], [0.0, -1.0], [1.2, 0.8]]).double(), 0.2, 0.45
    a, x = torch.tensor([0.8, -0.6]).double(), torch.tensor([0.1, 0.2]).double()
    noisy = t**2 * variance + (1 - t) ** 2
    logits = -(x - t * means).square().sum(1) / (2 * noisy)
    centres, v = means + t * variance / noisy * (x - t * means), (1 - t) ** 2 * variance / noisy
    tilted = logits + centres @ a + v * a @ a / 2
    value = tilted.logsumexp(0) - logits.logsumexp(0)
    product = (tilted.softmax(0) @ (centres + v * a) - logits.softmax(0) @ centres) / (1 - t)
    model = MetaFlowMap(Integrated(GaussianMixture(means, variance)))
    target = Target(model, lambda x1: x1 @ a.to(x1))
    found = DiamondGradientFree(512, nodes=10)(target, t, x.expand(48, 2), seeded(3))
    assert within(found.value, value)[0]
    for i in range(2):
        assert within(found.steering[:, i], product[i])[0]
    assert found.steering.std(0).max() < 0.3


def test_draws_by_resampling_have_the_posteriors_distribution():
    """n = 3,000 draws of one state, each of 48 proposals, by Kolmogorov and Smirnov at 1e-6, against the posterior's
    distribution function, by quadrature. With 2 proposals they are refused."""
    t, x = 0.6, torch.full((1, 1), 0.9).double()
    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    density = parts_of(torch.ones(1).double(), grid)[2].sum(1) * torch.exp(
        -((x[0] - t * grid) ** 2) / (2 * (1 - t) ** 2)
    )
    cumulative = density.cumsum(0) / density.sum()

    def p_value(num_proposals):
        source = DiamondPosterior(num_proposals, snr_factor=20.0, nodes=8)
        noise = torch.randn(1, 3000, 1, generator=seeded(4), dtype=torch.float64)
        draws = source(Target(LINE, reward), t, x, noise)[0, :, 0]
        below_draw = cumulative[torch.searchsorted(grid, draws).clamp_max(100_000)]
        return stats.kstest(below_draw.numpy(), "uniform").pvalue

    assert p_value(48) > 1e-6
    assert p_value(2) < 1e-6


def test_draws_in_parts_are_those_of_one_batch():
    x, target = torch.randn(7, 1, generator=seeded()).double(), Target(LINE, reward)
    for kind in (DiamondGradient, DiamondGradientFree):
        whole, part = (kind(5, max_rows=rows)(target, 0.4, x, seeded(1)) for rows in (None, 11))
        for name in ("gradient", "value", "ess", "steering", "posterior_ess"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name))
        torch.testing.assert_close(part.best.states, whole.best.states)


def test_evaluations_are_those_of_the_formula():
    """K steps of N draws: the map and the nodes of each; where gradients come back, twice the map and the reward, and
    the score at each draw; and the drift of each step."""
    x0, K, N, J = torch.randn(3, 1, generator=seeded()).double(), 4, 5, 2
    for kind, network, rewards in ((DiamondGradientFree, J + 1, 1), (DiamondGradient, J + 3, 2)):
        result = Steering(kind(N, nodes=J, max_rows=6), TimeGrid(K))(Target(LINE, reward), x0, seeded(1))
        assert result.nfe.network == 3 * K * (1 + N * network)
        assert result.nfe.reward == 3 * K * N * rewards
        assert all(1 <= step["posterior_ess"] <= N for step in result.trace)


def test_what_does_not_fit_is_refused():
    for make, message in (
        (lambda: DiamondGradient(1), "num_draws 1 must be at least 2"),
        (lambda: DiamondGradientFree(4, snr_factor=1.0), "snr_factor 1.0 must be a number above 1"),
        (lambda: DiamondGradient(4, nodes=0), "nodes 0 must be at least 1"),
        (lambda: DiamondGradient(4, max_rows=3), "max_rows 3 is below num_draws 4"),
        (lambda: DiamondPosterior(1), "num_proposals 1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    oracle = GaussianMixture([[0.0, 0.0]], 1.0)
    with pytest.raises(TypeError, match="a GaussianMixture has no flow map"):
        Steering(DiamondGradientFree(4))(Target(oracle, reward), torch.zeros(2, 2))
    x = torch.zeros(2, 1, requires_grad=True)
    with pytest.raises(TypeError, match="draws of a DiamondPosterior have no gradient"):
        DiamondPosterior()(Target(LINE, reward), 0.5, x, torch.zeros(2, 3, 1))
