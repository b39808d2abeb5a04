"""The ends of steered SDEs, rollouts and particle methods, on finite data with closed forms written out."""

import pytest
import torch

from mfm_lightning.alignment import (
    FeynmanKac,
    GlassPosterior,
    OraclePosterior,
    RolloutPosterior,
    Steering,
    Target,
    TimeGrid,
    TwistedSMC,
)
from mfm_lightning.oracles import EmpiricalDistribution, GaussianMixture
from tests.finite_data import FiniteData, FiniteGradient
from tests.noise import seeded

DATA = FiniteData(
    [[1, 1, 1, 1], [-1, -1, 1, 1], [1, -1, -1, 1], [-1, 1, -1, -1], [1, -1, 1, -1], [0, 0, 0, 0]],
    [0.3, 0.2, 0.2, 0.1, 0.1, 0.1],
    rewards=[0.0, 1.0, -1.0, 0.5, 0.0, 1.5],
)
GRADIENT = FiniteGradient(DATA)


def noise(num):
    return torch.randn(num, 4, generator=seeded(), dtype=torch.float64)


def target():
    return Target(DATA, DATA.reward)


def test_the_steered_step_to_1_is_the_tilted_denoiser():
    """Of states between the points, where base and tilted denoiser differ; half the strength is half the way."""
    x = 0.2 * noise(50) + 0.1
    base, tilted = DATA.denoiser(0.5, x), DATA.denoiser(0.5, x, tilted=True)
    assert (tilted - base).abs().max() > 0.3
    for strength, wanted in ((1.0, tilted), (0.5, (base + tilted) / 2), (0.0, base)):
        method = Steering(GRADIENT, TimeGrid(1, 0.5), "sde", strength=strength)
        torch.testing.assert_close(method(target(), x).states, wanted)


@pytest.mark.parametrize("steps", [20, 50])
def test_steered_and_particle_methods_end_on_finite_data(steps):
    """With the plain last step the rms distance to the data is 0.11 at 20 steps, 0.041 at 50."""
    smc = {"num_particles": 4, "grid": TimeGrid(steps)}
    for method in (
        Steering(GRADIENT, TimeGrid(steps), "sde"),
        Steering(GRADIENT, TimeGrid(steps), "sde", strength=0.0),
        FeynmanKac(**smc),
        TwistedSMC(GRADIENT, **smc),
    ):
        assert DATA.rms_distance(method(target(), noise(200), seeded(1)).states) < 1e-3, method


def test_the_steered_sde_has_the_tilted_probabilities():
    """Pearson's chi-square of n = 4,000 independent ends against the tilted data's, 5 degrees of freedom; 1e-5 false
    alarms. The base's probabilities are refused."""
    method = Steering(GRADIENT, TimeGrid(200, 0.002), "sde", max_diffusion=500.0)
    x = method(target(), noise(4000), seeded(1)).states
    assert DATA.chi_square(x, tilted=True) > 1e-5
    assert DATA.chi_square(x) < 1e-5


def test_rollouts_end_on_the_data_and_start_there_too():
    x_t = noise(3) * 0.7 + 0.3 * DATA.points[:3]
    draws = RolloutPosterior(20, generator=seeded(1))(target(), 0.3, x_t, torch.empty(3, 200, 4))
    assert DATA.rms_distance(draws.flatten(0, 1)) < 1e-3
    draws = RolloutPosterior(20)(target(), 1.0, x_t, torch.empty(3, 2, 4))
    assert torch.equal(draws, x_t[:, None].expand(3, 2, 4))


def test_draws_at_1_are_the_state():
    """Of the data, for an oracle that is a finite data set."""
    mixture = GaussianMixture(DATA.points, 0.04)
    sources = [RolloutPosterior(8), GlassPosterior(8), GlassPosterior(8, "heun"), OraclePosterior(mixture)]
    for source in [*sources, OraclePosterior(EmpiricalDistribution(DATA.points))]:
        draws = source(Target(mixture, DATA.reward), 1.0, DATA.points, torch.randn(6, 3, 4, dtype=torch.float64))
        torch.testing.assert_close(draws, DATA.points[:, None].expand(6, 3, 4))


def test_transitions_by_glass_keep_the_variance_within_modes():
    """Modes of deviation 0.2 in eight dimensions; ten transitions by the default draws, no reward. The ratio of the
    variance within modes to the exact one, from n = 40,000 numbers, has a standard error of 0.71 %. The draws add 2.8 %
    (docs/design.md): 6.5 % is 5 errors away, 1e-6 false alarms. 4 Euler steps lose 46 %, 8 33 %, 4 Heun steps 9.6 %.
    Frequencies by Pearson's chi-square of 5,000 particles, at 1e-6; the draws' own error of them (0.1039 for 0.1, in
    30,000) makes that false alarms of 5e-5."""
    points = [
        [1, 1, 1, 1, 1, -1, 1, -1],
        [-1, -1, 1, 1, -1, 1, 1, -1],
        [1, -1, -1, -1, 1, 1, -1, 1],
        [-1, 1, -1, 1] * 2,
    ]
    modes = FiniteData(points, [0.4, 0.3, 0.2, 0.1], deviation=0.2)
    method = FeynmanKac(num_particles=5000, keep="all", ess_threshold=0.0, transition="glass", grid=TimeGrid(10))
    x0 = torch.randn(1, 8, generator=seeded(), dtype=torch.float64)
    x = method(Target(modes, modes.reward), x0, seeded(1)).states
    assert (modes.rms_distance(x) / 0.2) ** 2 == pytest.approx(1, abs=0.065)
    assert modes.chi_square(x) > 1e-6
