"""GLASS against float64 and exact posteriors; oracles against quadrature and Monte Carlo."""

import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from mfm_lightning.conditions import Conditions
from mfm_lightning.glass import glass_velocity
from mfm_lightning.interpolant import diffusion, interpolate, sample_generators, score
from mfm_lightning.oracles import EmpiricalDistribution, GaussianMixture
from mfm_lightning.samplers import sample_ode, sample_posterior_glass, sample_sde
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood

MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)
SKEWED = GaussianMixture([[-1.0], [2.0]], [[[0.2]], [[0.7]]], [0.3, 0.7])


def test_glass_is_accurate_in_float32_for_all_times():
    torch.manual_seed(0)
    edge = torch.tensor([0.0, 1e-7, 1e-4, 0.01, 0.3, 0.5, 0.9, 0.99, 1 - 1e-4, 1 - 2**-23, 1.0])
    s, t = (m.flatten() for m in torch.meshgrid(edge, edge, indexing="ij"))
    x1, x0, eps = (torch.randn(len(s), 2) for _ in range(3))
    x_t, x_s = interpolate(t, x0, x1), interpolate(s, eps, x1)
    smooth = lambda time, x: torch.sin(x) + time[:, None] * x  # noqa: E731
    ours = glass_velocity(smooth, s, x_s, t, x_t)
    exact = glass_velocity(smooth, s.double(), x_s.double(), t.double(), x_t.double())
    assert ours.isfinite().all()
    assert exact.isfinite().all()
    scale = 1 + exact.abs().amax(1)
    assert ((ours - exact).abs().amax(1) / scale).max() < 1e-5
    # and the float64 values against the definition, where that is well conditioned
    inside = (s > 0.005) & (s < 0.995) & (t > 0.005) & (t < 0.995)
    S, T, XS, XT = (v[inside].double() for v in (s, t, x_s, x_t))
    a = T**2 / (1 - T) ** 2 + S**2 / (1 - S) ** 2
    star = a.sqrt() / (1 + a.sqrt())
    x_star = (star / a)[:, None] * ((T / (1 - T) ** 2)[:, None] * XT + (S / (1 - S) ** 2)[:, None] * XS)
    denoised = x_star + (1 - star)[:, None] * smooth(star, x_star)
    torch.testing.assert_close(exact[inside], (denoised - XS) / (1 - S)[:, None], atol=1e-9, rtol=1e-9)


def energy_z(x: torch.Tensor, y: torch.Tensor, permutations: int = 199) -> float:
    """p-value of the permutation test of the energy distance between samples `(N, D)`."""
    both = torch.cat([x, y]).double()
    distances = torch.cdist(both, both)
    n = len(x)

    def statistic(order):
        a, b = order[:n], order[n:]
        return 2 * distances[a][:, b].mean() - distances[a][:, a].mean() - distances[b][:, b].mean()

    observed = statistic(torch.arange(len(both)))
    null = [statistic(torch.randperm(len(both))) for _ in range(permutations)]
    return (1 + sum(float(v >= observed) for v in null)) / (1 + permutations)


@pytest.mark.parametrize("t", [0.1, 0.4])
@pytest.mark.slow
def test_glass_with_the_exact_drift_gives_the_mixture_posterior(t):
    # Permutation test; fails for p <= 1/200, so a false-alarm rate of 0.5 % were the seed not fixed.
    torch.manual_seed(1)
    x_t = interpolate(torch.full((1,), t), torch.randn(1, 2), MIXTURE.sample(1, torch.Generator().manual_seed(3)))
    draws = sample_posterior_glass(MIXTURE.drift, x_t, t, num_samples=500, steps=200, method="heun")[0]
    assert energy_z(draws, MIXTURE.sample_posterior(x_t, t, 500)[0]) > 1 / 200
    shifted = draws + 0.5  # the test has power
    assert energy_z(shifted, MIXTURE.sample_posterior(x_t, t, 500)[0]) <= 1 / 200


def test_glass_with_the_exact_drift_gives_the_digits_posterior():
    # 64 dimensions; draws end near data points, whose frequencies a chi-square test compares, false-alarm rate 1e-4.
    torch.manual_seed(0)
    points = torch.tensor(load_digits().images[:300], dtype=torch.float64).flatten(1) / 8 - 1
    data, t, N = EmpiricalDistribution(points), 0.12, 1000
    x_t = interpolate(torch.full((1,), t, dtype=torch.float64), torch.randn(1, 64, dtype=torch.float64), points[:1])
    draws = sample_posterior_glass(data.drift, x_t, t, num_samples=N, steps=150, method="heun")[0]
    distance, nearest = torch.cdist(draws, points).min(dim=1)
    assert distance.median() < 0.05
    probability = next(data._log_weights(torch.full((1,), t, dtype=torch.float64), x_t, None)).softmax(1)[0]
    big = probability * N >= 5
    observed, expected = nearest.bincount(minlength=300)[big], (probability * N)[big]
    assert big.sum() >= 5
    rest = torch.stack([N - observed.sum(), N - expected.sum()]).double()
    chi2 = ((observed - expected) ** 2 / expected).sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp_min(1)
    k = int(big.sum())  # Wilson-Hilferty: chi2 / k to a normal; 3.72 standard deviations is 1e-4
    z = ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert z < 3.72


def quadrature(oracle, t: float, x: float, functions):
    """E[f(x1) | I_t = x] for one-dimensional data by a fine grid."""
    grid = torch.linspace(-8, 9, 200_001, dtype=torch.float64)[:, None]
    weight = (oracle.log_prob(1.0, grid) - (x - t * grid[:, 0]) ** 2 / (2 * (1 - t) ** 2)).softmax(0)
    return [(weight * f(grid)).sum().item() for f in functions]


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_mixture_against_quadrature(t):
    reward = LinearGaussianLikelihood([1.5], 0.7, 0.4)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    functions = [lambda g: g[:, 0], lambda g: reward(g).exp(), lambda g: g[:, 0] ** 2]
    mean, tilt, second = quadrature(SKEWED, t, 0.3, functions)
    drift = SKEWED.drift(t, x).item()
    assert drift == pytest.approx((mean - 0.3) / (1 - t), rel=1e-6)
    assert SKEWED.value(x, t, reward).item() == pytest.approx(math.log(tilt), rel=1e-6)
    h = 1e-4
    up, down = (math.log(quadrature(SKEWED, t, 0.3 + d, functions)[1]) for d in (h, -h))
    assert SKEWED.value_gradient(x, t, reward).item() == pytest.approx((up - down) / (2 * h), rel=1e-5)
    draws = SKEWED.sample_posterior(x, t, 100_000, generator=torch.Generator().manual_seed(0))[0, :, 0]
    deviation = math.sqrt(second - mean**2)
    assert abs(draws.mean().item() - mean) < 4.5 * deviation / math.sqrt(100_000)


def test_mixture_drift_at_both_ends():
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(MIXTURE.drift(0.0, x), torch.zeros(2, dtype=torch.float64) - x)  # E[x1] - x
    assert MIXTURE.drift(1.0, x).isfinite().all()


def test_empirical_against_brute_force():
    torch.manual_seed(0)
    points, label = torch.randn(50, 1, 2, 2, dtype=torch.float64), torch.randint(0, 3, (50,))
    data = EmpiricalDistribution(points, label, num_classes=3, max_elements=120)  # two rows at a time
    reward = lambda x: x.flatten(1).pow(3).sum(1)  # noqa: E731
    x, t = torch.randn(7, 1, 2, 2, dtype=torch.float64).requires_grad_(), 0.6
    wanted = torch.tensor([0, 1, 2, 3, 3, 0, 1])  # 3: the null label
    given = Conditions(label=wanted)
    logits = -(x[:, None] - t * points).flatten(2).square().sum(2) / (2 * (1 - t) ** 2)
    logits = logits.masked_fill((wanted[:, None] != 3) & (label != wanted[:, None]), -math.inf)
    mean = torch.einsum("bm,mchw->bchw", logits.softmax(1), points)
    value = (logits.log_softmax(1) + reward(points)).logsumexp(1)
    torch.testing.assert_close(data.drift(t, x, given), (mean - x) / (1 - t))
    torch.testing.assert_close(data.value(x, t, reward, given), value)
    gradient = torch.autograd.grad(value.sum(), x)[0]
    torch.testing.assert_close(data.value_gradient(x.detach(), t, reward, given), gradient)
    draws = data.sample_posterior(x.detach(), t, 2000, given)
    assert abs((draws[3].mean(0) - mean[3]).abs().max()) < 4.5 * points.std() / 2000**0.5 * 2


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_empirical_in_float32_is_exact_in_thousands_of_dimensions(t):
    """64 points in 4,096 dimensions, so near to each other that most of them count at each t: drift, value, its
    gradient and the draws' frequencies against direct distances in float64.

    In float32, by |x|^2 - 2 xy + |y|^2, V is off by 2e-4, 2e-3 and 0.05. Frequencies: chi-square of 4,000 draws over
    the points whose expected number is at least 5, of five states and by each kind of generators, against its 1 - 1e-6
    quantile: a false-alarm rate of 1.5e-5, were the seeds not fixed.
    """
    g, N = torch.Generator().manual_seed(0), 4000
    points = 1 + 0.5 * (1 - t) / t / 64 * torch.randn(64, 4096, generator=g)
    data = EmpiricalDistribution(points, max_elements=200)  # three states at a time
    x = t * points[:5] + (1 - t) * torch.randn(5, 4096, generator=g)

    def reward(x1):
        return 2000 * t * (x1[:, 0] - 1)

    exact, centre = points.double(), x.double()
    logits = -(centre[:, None] - t * exact).square().sum(2) / (2 * (1 - t) ** 2)
    weight, r = logits.softmax(1), reward(points)
    assert (1 / weight.square().sum(1)).min() > 30
    mean, tilted = weight @ exact, (logits + r).softmax(1) @ exact
    value, gradient = data.value(x, t, reward), data.value_gradient(x, t, reward)
    drift = data.drift(t, x)
    assert value.dtype == gradient.dtype == drift.dtype == torch.float32
    assert (value - (weight.log() + r).logsumexp(1)).abs().max() < 1e-5
    wanted = t / (1 - t) ** 2 * (tilted - mean)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()
    wanted = (mean - centre) / (1 - t)
    assert (drift - wanted).abs().max() < 1e-5
    index = EmpiricalDistribution(torch.arange(64.0)[:, None])  # the same weights, points that are small
    index._log_weights = lambda *_: iter([weight[:3].log(), weight[3:].log()])
    # the generator of all; of each state; of each draw
    kinds = [g, [torch.Generator().manual_seed(i) for i in range(5)], sample_generators(7, range(5 * N))]
    for generator in kinds:
        for draws, expected in zip(index.sample_posterior(x, t, N, generator=generator), N * weight, strict=True):
            counts = draws[:, 0].long().bincount(minlength=64)
            big = expected >= 5
            chi2 = float(((counts - expected)[big].square() / expected[big]).sum())
            assert chi2 < stats.chi2.isf(1e-6, int(big.sum()))
    draws = data.sample_posterior(x[:1], t, 4, generator=g)[0]
    assert all((points == draw).all(dim=1).any() for draw in draws)


def test_mixture_value_refuses_other_rewards():
    with pytest.raises(TypeError, match="no closed form"):
        MIXTURE.value(torch.zeros(1, 2), 0.5, lambda x: x.sum(1))


@pytest.mark.parametrize("sampler", ["ode", "sde"])
@pytest.mark.slow
def test_base_samplers_reach_the_data(sampler):
    # Mean and variance of the mixture's first coordinate: 0 and 6.5; z-tests at 4.5 standard errors.
    torch.manual_seed(0)
    x0 = torch.randn(20_000, 2)
    x = sample_ode(MIXTURE.drift, x0, 100, "heun") if sampler == "ode" else sample_sde(MIXTURE.drift, x0, 400)
    assert abs(x[:, 0].mean()) < 4.5 * math.sqrt(6.5 / 20_000) + 0.02
    assert x[:, 0].var() == pytest.approx(6.5, rel=0.05)


def test_score_and_diffusion():
    x, t = torch.randn(6, 2, dtype=torch.float64).requires_grad_(), torch.full((6,), 0.35, dtype=torch.float64)
    exact = torch.autograd.grad(MIXTURE.log_prob(t, x).sum(), x)[0]
    torch.testing.assert_close(score(t, x, MIXTURE.drift(t, x)), exact)
    assert diffusion(torch.tensor([0.0, 0.01, 0.5, 1.0])).tolist() == [25.0, 25.0, 1.0, 0.0]


def test_the_tilted_mixture_is_the_reweighted_one():
    # moments of 400,000 exact draws against importance weights on as many; tolerance above 5 standard errors of both
    reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.4)
    points = MIXTURE.sample(400_000, torch.Generator().manual_seed(0)).double()
    weight = reward(points).softmax(0)
    mean = weight @ points
    covariance = (weight[:, None] * (points - mean)).T @ (points - mean)
    draws = MIXTURE.tilted(reward).sample(400_000, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(draws.T.cov(), covariance, rtol=0.03, atol=0.05)
    # the density is p e^r / Z with Z = e^{V_0}
    x = torch.randn(5, 2, dtype=torch.float64)
    log_normaliser = MIXTURE.value(torch.zeros(1, 2, dtype=torch.float64), 0.0, reward)
    wanted = MIXTURE.log_prob(1.0, x) + reward(x) - log_normaliser
    torch.testing.assert_close(MIXTURE.tilted(reward).log_prob(1.0, x), wanted, rtol=1e-6, atol=1e-6)
