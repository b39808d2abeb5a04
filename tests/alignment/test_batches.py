"""What a sample becomes depends on its own noise, whatever the batch that it is in, and however the work is cut."""

import math

import pytest
import torch
from scipy import stats

from mfm_lightning.alignment import (
    BestOfN,
    DiamondGradient,
    DiamondGradientFree,
    DiamondPosterior,
    FeynmanKac,
    NoiseOptimisation,
    Search,
    Steering,
    TimeGrid,
    TrajectoryTilting,
    TwistedSMC,
)
from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior, OraclePosterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient, DrawGradient, DrawGradientFree, DrawValue
from mfm_lightning.evaluation.draws import draw, noisy_states
from mfm_lightning.interpolant import own_generators, rand, randn, sample_generators
from mfm_lightning.oracles import EmpiricalDistribution, GaussianMixture
from mfm_lightning.samplers import sample_refinement
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded

REWARD = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.5)
MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)
POINTS = EmpiricalDistribution(torch.randn(20, 2, generator=torch.Generator().manual_seed(5)), max_elements=60)
GRID = TimeGrid(6)


METHODS = {
    "MFM-G, SDE": Steering(DrawGradient(4, antithetic=True), GRID, "sde"),
    "MFM-GF": Steering(DrawGradientFree(4, max_rows=3), GRID),
    "DPS, SDE": Steering(DPSGradient(max_rows=2), GRID, "sde"),
    "Diamond, SDE": Steering(DiamondGradient(4, max_rows=9), GRID, "sde"),
    "Diamond, gradient-free": Steering(DiamondGradientFree(4, max_rows=5), GRID),
    "search": Search(3, 2, 4),
    "search, Diamond": Search(3, 2, 4, posterior=DiamondPosterior(3), correlation=0.5),
    "search, by particle": Search(3, 2, 4, selection="per_particle", posterior=GlassPosterior(2)),
    "Best-of-N": BestOfN(9, 4, max_rows=7),
    "FK, SDE": FeynmanKac(num_particles=4, grid=GRID),
    "FK, GLASS": FeynmanKac(num_particles=4, grid=GRID, transition="glass", keep="all"),
    "FK, rollouts": FeynmanKac(DrawValue(2, RolloutPosterior(3), max_rows=9), num_particles=4, grid=GRID),
    "FK, mixture's draws": FeynmanKac(DrawValue(3, OraclePosterior(MIXTURE), max_rows=4), num_particles=4, grid=GRID),
    "FK, points' draws": FeynmanKac(DrawValue(3, OraclePosterior(POINTS), max_rows=4), num_particles=4, grid=GRID),
    "FMTT": TrajectoryTilting(num_particles=4, grid=GRID, max_rows=5),
    "noise optimisation": NoiseOptimisation(3, 2, 0.1, max_rows=3),
    "TDS": TwistedSMC(num_particles=4, grid=GRID, ess_threshold=0.3),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_is_the_same_in_any_batch(model, name):
    """Seven samples with a generator each: in one batch, one by one, and in threes in another order."""
    x0, target, rounding = torch.randn(7, 2, generator=seeded()), Target(model, REWARD), dict(rtol=1e-4, atol=1e-5)

    def states(rows: list[int]) -> torch.Tensor:
        return METHODS[name](target, x0[rows], sample_generators(3, rows)).states.reshape(len(rows), -1, 2)

    whole = states(list(range(7)))
    for rows in [[i] for i in range(7)] + [[5, 0, 3], [6, 1, 2]]:
        torch.testing.assert_close(states(rows), whole[rows], **rounding)
    assert len(whole[:, 0].unique(dim=0)) == 7
    other = METHODS[name](target, x0, sample_generators(4, range(7))).states.reshape(7, -1, 2)
    # 4 draws of an untrained model are all alike; ascent draws no noise
    if name not in ("MFM-GF", "noise optimisation"):
        assert not torch.allclose(other, whole, **rounding)


def test_some_samples_are_resampled_and_others_not(model):
    """In the particle methods above; else they would not see whether one sample's resampling moves another's noise."""
    x0 = torch.randn(7, 2, generator=seeded())
    for name in ("FK, SDE", "FK, GLASS", "TDS"):
        trace = METHODS[name](Target(model, REWARD), x0, sample_generators(3, range(7))).trace
        assert any(0 < step["resampled"] < 1 for step in trace if "resampled" in step), name


@pytest.mark.parametrize("generator", ["one", "each"])
def test_the_best_of_n_is_the_same_however_it_is_cut(model, generator):
    """`max_rows` and `keep_at` choose nothing; 3 samples, 40 candidates."""
    found = []
    for max_rows in (7, 64, 1024):
        for keep_at in ((), (1,), (4, 10, 17), (39, 40, 50)):
            given = seeded(1) if generator == "one" else sample_generators(1, range(3))
            method = BestOfN(40, 2, max_rows, keep_at)
            found.append(method(Target(model, REWARD), torch.zeros(3, 2), given))
    for result in found[1:]:
        torch.testing.assert_close(result.states, found[0].states, rtol=1e-5, atol=1e-6)
    assert [step["candidates"] for step in found[2].trace] == [4, 10, 17, 40]


POSTERIORS = {
    "flow map": FlowMapPosterior(2),
    "GLASS": GlassPosterior(2),
    "Diamond": DiamondPosterior(3, nodes=2),
    "rollouts": RolloutPosterior(5),
    "mixture": OraclePosterior(MIXTURE),
    "points": OraclePosterior(POINTS),
}


@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_are_the_same_however_they_are_cut(model, name):
    """States and draws in parts of `max_rows`, for estimates and for draws themselves."""
    x, target, source = torch.randn(5, 2, generator=seeded()), Target(model, REWARD), POSTERIORS[name]
    noise = torch.randn(5, 6, 2, generator=seeded(1))
    whole, value = source(target, 0.4, x, noise), DrawValue(6, source)(target, 0.4, x, seeded(2)).value
    free = DrawGradientFree(6, source)(target, 0.4, x, seeded(2)).gradient
    for max_rows in (1, 4, 6, 7, 13, 1000):
        torch.testing.assert_close(draw(source, target, 0.4, x, noise, max_rows), whole)
        found = DrawValue(6, source, max_rows=max_rows)(target, 0.4, x, seeded(2)).value
        torch.testing.assert_close(found, value)
        found = DrawGradientFree(6, source, max_rows=max_rows)(target, 0.4, x, seeded(2)).gradient
        torch.testing.assert_close(found, free, rtol=1e-4, atol=1e-5)
    if name != "points":
        assert len(whole.flatten(0, 1).unique(dim=0)) == 30


@pytest.mark.parametrize("source", [RolloutPosterior(60), OraclePosterior(GaussianMixture([MEAN], VARIANCE))])
def test_noise_that_follows_from_noise_is_noise(source):
    """Draws of a Gaussian's posterior, N(m + t c/n (x - t m), (1-t)^2 c/n I) with n = t^2 c + (1-t)^2, at t = 0.6.

    4,000 draws of 2 coordinates: z of the mean and chi-square of the variance, two-sided at 1e-6 each; rollouts may be
    off by the Euler steps' 5 % of a deviation, and 10 % of the variance. The draws are not correlated with the inner
    noise that they follow from: Fisher's z, four of them, at 1e-6. Rate of false alarms: below 1e-5.
    """
    N, t, x_t = 4000, 0.6, torch.tensor([[0.3, -0.2]])
    noise = torch.randn(1, N, 2, generator=seeded())
    draws = source(Target(gaussian_model().requires_grad_(False), REWARD), t, x_t, noise)[0].double()
    noisy = t**2 * VARIANCE + (1 - t) ** 2
    mean = torch.tensor(MEAN) + t * VARIANCE / noisy * (x_t[0] - t * torch.tensor(MEAN))
    variance = (1 - t) ** 2 * VARIANCE / noisy
    slack = 1.0 if isinstance(source, RolloutPosterior) else 0.0
    cut = stats.norm.isf(5e-7)
    z = (draws.mean(0) - mean).abs() / math.sqrt(variance)
    assert (z < cut / math.sqrt(N) + 0.05 * slack).all(), z
    ratio = draws.var(0) / variance
    low, high = (stats.chi2.ppf(q, N - 1) / (N - 1) for q in (5e-7, 1 - 5e-7))
    assert ((ratio > low - 0.1 * slack) & (ratio < high + 0.1 * slack)).all(), ratio
    r = torch.cat([draws, noise[0].double()], dim=1).T.corrcoef()[:2, 2:]
    assert (r.atanh().abs() * math.sqrt(N - 3) < cut).all(), r


def test_rows_of_a_sample_are_drawn_from_its_generator():
    like = torch.zeros(1, dtype=torch.float64)
    found = randn((6, 3), like, [seeded(1), seeded(2)])
    assert torch.equal(found[:3], torch.randn(3, 3, generator=seeded(1), dtype=torch.float64))
    assert torch.equal(found[3:], torch.randn(3, 3, generator=seeded(2), dtype=torch.float64))
    uniform = rand(4, like, [seeded(1), seeded(2)])
    assert torch.equal(uniform[2:], torch.rand(2, generator=seeded(2), dtype=torch.float64))
    with pytest.raises(ValueError, match="4 generators for 6 rows of noise"):
        randn((6, 3), like, [seeded()] * 4)
    # one makes one for each sample, all of them different; it moves on, so that the next ones are others
    generator = seeded()
    first, second = (own_generators(generator, 3) for _ in range(2))
    drawn = [torch.rand(1, generator=g).item() for g in (*first, *second)]
    assert len(set(drawn)) == 6
    # what else is drawn for the same sample is other noise
    seeds = {g.initial_seed() for seed in (0, (0, 1), (0, 2), (1, 1)) for g in sample_generators(seed, range(1000))}
    assert len(seeds) == 4000


def test_refinement_and_noisy_states_are_the_samples_own(model):
    x0 = torch.randn(4, 2, generator=seeded())
    whole = sample_refinement(model, x0, 3, generator=sample_generators(1, range(4)))
    parts = [sample_refinement(model, x0[[i]], 3, generator=sample_generators(1, [i])) for i in (3, 1)]
    torch.testing.assert_close(torch.cat(parts), whole[[3, 1]])
    noisy = noisy_states(x0, 0.3, sample_generators(1, range(4)))
    assert torch.equal(noisy_states(x0[[2]], 0.3, sample_generators(1, [2])), noisy[[2]])
    draws = model.sample_posterior(x0, 0.3, 3, generator=sample_generators(1, range(4)))
    torch.testing.assert_close(model.sample_posterior(x0[[2]], 0.3, 3, generator=sample_generators(1, [2])), draws[[2]])


@pytest.mark.parametrize("states_at_once", [1, 2, 3, 100])
def test_an_oracles_draws_are_the_samples_own_however_the_states_are_cut(states_at_once):
    """7 states with a generator each, 5 points: the memory for weights holds so many states at once."""
    points = torch.randn(5, 2, generator=seeded())
    whole = EmpiricalDistribution(points)
    cut = EmpiricalDistribution(points, max_elements=5 * states_at_once)
    x_t = torch.randn(7, 2, generator=seeded(1))
    expected = torch.cat([whole.sample_posterior(x_t[[i]], 0.1, 40, None, sample_generators(3, [i])) for i in range(7)])
    found = cut.sample_posterior(x_t, 0.1, 40, None, sample_generators(3, range(7)))
    assert torch.equal(found, expected)
    assert len(expected.flatten(1).unique(dim=0)) == 7
