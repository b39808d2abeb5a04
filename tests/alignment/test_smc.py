"""Sequential Monte Carlo against closed forms: resampling, bridge, the normaliser and the tilted mixture."""

import pytest
import torch

from mfm_lightning.alignment import FeynmanKac, TimeGrid, TwistedSMC
from mfm_lightning.alignment.particles import systematic_resample
from mfm_lightning.alignment.posteriors import OraclePosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.transitions import bridge
from mfm_lightning.alignment.values import (
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    DrawValue,
    ExactGradient,
)
from mfm_lightning.metrics.distances import sliced_wasserstein
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards import Reward, RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.noise import seeded

MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)
LIKELIHOOD = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.2)
# of a width that particles moved by the base process can reach
MILD = LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0)


def tilted(num, reward, seed=0):
    """Exact samples of p(x) e^{r(x)} / Z, by resampling a large sample of p."""
    x = MIXTURE.sample(200 * num, seeded(seed))
    r = reward(x)
    pick = torch.multinomial(r.softmax(0), num, generator=seeded(seed + 1))
    return x[pick]


def log_normaliser():
    return float(MIXTURE.value(torch.zeros(1, 2), 0.0, MILD))


def test_systematic_resampling_rounds_the_expected_counts():
    w = torch.rand(5, 64, generator=seeded()).square()
    index = systematic_resample(w.log() + 7, seeded(1))
    counts = torch.stack([row.bincount(minlength=64) for row in index]).double()
    expected = 64 * w.double() / w.double().sum(1, keepdim=True)
    assert (counts >= expected.floor() - 1e-9).all()
    assert (counts <= expected.ceil() + 1e-9).all()
    many = torch.stack([systematic_resample(w[:1].log(), seeded(i))[0].bincount(minlength=64) for i in range(2000)])
    # a count is Bernoulli around its mean: 4.5 standard errors, 64 comparisons, false alarms below 5e-4
    assert ((many.double().mean(0) - expected[0]).abs() < 4.5 * 0.5 / 2000**0.5).all()
    none = torch.full((1, 4), -torch.inf)
    none[0, 2] = 0
    assert systematic_resample(none, seeded()).tolist() == [[2, 2, 2, 2]]


@pytest.mark.parametrize(("now", "then"), [(0.0, 0.3), (0.2, 0.25), (0.5, 0.9), (0.7, 1.0)])
def test_the_bridge_has_the_interpolants_marginals(now, then):
    """x_now = now x1 + (1-now) z, then the bridge: x_then must be N(then x1, (1-then)^2) given x1."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    from_x1, variance = bridge(now, then, zero, one)
    from_x, _ = bridge(now, then, one, zero)
    assert (from_x1 + now * from_x).item() == pytest.approx(then, abs=1e-12)
    assert variance + (from_x.item() * (1 - now)) ** 2 == pytest.approx((1 - then) ** 2, abs=1e-12)


METHODS = {
    # GLASS transitions with exact draws have no discretisation error: few steps do
    "glass": FeynmanKac(
        grid=TimeGrid(20, 0.0), transition="glass", posterior=OraclePosterior(MIXTURE, seeded(9)), num_particles=128
    ),
    "sde": FeynmanKac(grid=TimeGrid(150), num_particles=128),
    "draws": FeynmanKac(DrawValue(4, OraclePosterior(MIXTURE, seeded(8))), grid=TimeGrid(150), num_particles=128),
    "tds": TwistedSMC(DPSGradient(), clip=1, grid=TimeGrid(150), num_particles=128),
    "optimal twist": TwistedSMC(ExactGradient(MIXTURE), grid=TimeGrid(150), num_particles=128),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_normaliser_is_estimated_without_bias(method):
    B = 16
    result = METHODS[method](Target(MIXTURE, MILD), torch.randn(B, 2, generator=seeded(2)), seeded(3))
    assert result.states.shape == (B, 2)
    assert result.log_normaliser.shape == (B,)
    ratio = (result.log_normaliser - log_normaliser()).exp()
    error = ratio.std() / B**0.5
    # 4 standard errors, and 5 % for the Euler steps
    assert (ratio.mean() - 1).abs() < 4 * error + 0.05, (ratio.mean(), error)
    assert error < 0.25
    if method == "optimal twist":  # its weights hardly vary
        assert min(step["ess"] for step in result.trace) > 0.5 * 128


@pytest.mark.slow
@pytest.mark.parametrize(("method", "reward"), [("sde", MILD), ("tds", LIKELIHOOD)], ids=["sde", "tds"])
def test_4096_particles_sample_the_tilted_mixture(method, reward):
    options = dict(num_particles=4096, grid=TimeGrid(200), keep="all")
    smc = FeynmanKac(**options) if method == "sde" else TwistedSMC(ExactGradient(MIXTURE), **options)
    result = smc(Target(MIXTURE, reward), torch.randn(1, 2, generator=seeded(4)), seeded(5))
    exact = [tilted(4096, reward, seed) for seed in (10, 20)]
    distance = [float(sliced_wasserstein(x, exact[1], 128, seeded(6))) for x in (result.states, exact[0])]
    base = float(sliced_wasserstein(MIXTURE.sample(4096, seeded(7)), exact[1], 128, seeded(6)))
    # resampled particles repeat, so that they count for fewer: thrice the distance of two exact samples
    assert distance[0] < 3 * distance[1] + 0.02, distance
    assert distance[0] < base / 4, (distance, base)


def test_a_constant_reward_leaves_the_base_process_alone():
    class Constant(Reward):
        def forward(self, x):
            return torch.full((len(x),), 1.5)

    x0, smc = torch.randn(4, 2, generator=seeded()), FeynmanKac(num_particles=16, grid=TimeGrid(10))
    result = smc(Target(MIXTURE, Constant()), x0, seeded(1))
    assert torch.allclose(result.log_normaliser, torch.full((4,), 1.5), atol=1e-6)
    assert all(step.get("resampled", 0) == 0 for step in result.trace)
    assert result.nfe.network == 64 * 10
    assert result.nfe.reward == 64 * 11


def test_what_does_not_fit_is_refused():
    class BlackBox(Reward):
        differentiable = False

        def forward(self, x):
            return x.detach()[:, 0].round()

    x0, small = torch.randn(2, 2, generator=seeded()), FeynmanKac(num_particles=4, grid=TimeGrid(5), keep="best")
    target = Target(MIXTURE, BlackBox())
    with pytest.raises(RewardError, match="not differentiable"):
        TwistedSMC()(target, x0)
    assert target.meter.total == 0
    assert small(target, x0).states.shape == (2, 2)
    for options, message in (
        ({"transition": "ode"}, "sde, glass"),
        ({"keep": "most"}, "sample, best, all"),
        ({"ess_threshold": 2.0}, r"\[0, 1\]"),
        ({"num_particles": 0}, "at least 1"),
        ({"grid": TimeGrid(2, 0.1, 0.5)}, "end at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FeynmanKac(**options)

    class Broken(Reward):
        def forward(self, x):
            return torch.where(torch.arange(len(x)) == 5, torch.nan, x[:, 0])

    with pytest.raises(RewardError, match=r"feynman_kac, step 1 of 5.*5") as failure:
        FeynmanKac(num_particles=4, grid=TimeGrid(5))(Target(MIXTURE, Broken()), x0)
    assert failure.value.states.shape == (8, 2)


@pytest.mark.parametrize(
    "estimator", [DPSGradient, DrawGradient, DrawGradientFree, DrawValue], ids=lambda e: e.__name__
)
def test_particles_in_chunks_keep_the_conditions_of_their_samples(estimator):
    """Three samples of four particles each, cut across samples: the same as all at once."""

    class Labelled(Reward):
        needs = ("images", "prompts", "labels")

        def forward(self, images, prompts, labels):
            return images.sum(dim=1) * (1.0 + labels) + torch.tensor([float(len(p)) for p in prompts])

    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 8, 1, num_classes=3))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    target = Target(model.requires_grad_(False), Labelled(), label=torch.tensor([2, 0, 1]), prompts=["a", "bbb", "cc"])
    x = torch.randn(12, 2, generator=seeded())
    draws = {} if estimator is DPSGradient else {"num_draws": 2}
    whole = estimator(**draws)(target, 0.4, x, seeded(1))
    parts = estimator(**draws, max_rows=5)(target, 0.4, x, seeded(1))
    torch.testing.assert_close(parts.value, whole.value)
    if whole.gradient is not None:
        torch.testing.assert_close(parts.gradient, whole.gradient)
    # and the first sample's particles are those of a target for it alone
    alone = Target(model, Labelled(), label=torch.tensor([2]), prompts=["a"])
    if estimator is DPSGradient:
        torch.testing.assert_close(estimator()(alone, 0.4, x[:4]).value, whole.value[:4])
