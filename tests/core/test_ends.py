"""The ends of samplers, on finite and narrow data: the last step of SDE and Heun, and what is left to do at t = 1."""

import math

import pytest
import torch

from mfm_lightning.interpolant import diffusion
from mfm_lightning.samplers import euler_maruyama, sample_ode, sample_posterior_glass, sample_sde
from tests.finite_data import FiniteData
from tests.noise import seeded

# of range 2 in four dimensions, of unequal probabilities
DATA = FiniteData(
    [[1, 1, 1, 1], [-1, -1, 1, 1], [1, -1, -1, 1], [-1, 1, -1, -1], [1, -1, 1, -1], [0, 0, 0, 0]],
    [0.3, 0.2, 0.2, 0.1, 0.1, 0.1],
)
NARROW = FiniteData(DATA.points, DATA.probability, deviation=0.02)


def noise(num, dim=4):
    return torch.randn(num, dim, generator=seeded(), dtype=torch.float64)


@pytest.mark.parametrize("steps", [20, 50])
def test_the_sde_ends_on_finite_data(steps):
    """Without the denoiser as the last step the rms distance to the data is 0.11 at 20 steps, 0.041 at 50."""
    x = sample_sde(DATA.drift, noise(1000), steps, generator=seeded(1))
    assert DATA.rms_distance(x) < 1e-3


def test_a_grid_that_ends_before_1_is_a_plain_step():
    """x + dt (2b - x/t) with its noise; the step to 1 is the denoiser."""
    x, now, then = noise(5), 0.9, 0.95
    half = diffusion(torch.full((5,), now, dtype=torch.float64))
    mean, deviation = euler_maruyama(now, then, x, DATA.drift(now, x), half)
    torch.testing.assert_close(mean, x + (then - now) * (2 * DATA.drift(now, x) - x / now))
    torch.testing.assert_close(deviation, torch.full((5, 1), (2 * (0.1 / 0.9) * 0.05) ** 0.5, dtype=torch.float64))
    mean, deviation = euler_maruyama(now, 1.0, x, DATA.drift(now, x), half)
    torch.testing.assert_close(mean, DATA.denoiser(now, x))
    assert deviation is None


def test_the_sde_has_the_probabilities_of_finite_data():
    """Pearson's chi-square of n = 4,000 independent ends against the data's; 1e-5 false alarms."""
    x = sample_sde(DATA.drift, noise(4000), 200, generator=seeded(1))
    assert DATA.chi_square(x) > 1e-5


def test_the_sde_has_the_law_of_a_narrow_mixture():
    """Modes of deviation 0.02, 200 steps. Weights by Pearson's test, n = 4,000, 1e-5 false alarms. The deviation
    within modes, of 16,000 numbers, has a standard error of 0.56 % and 1.1 % from the steps: 4 % is 5 errors away."""
    x = sample_sde(NARROW.drift, noise(4000), 200, generator=seeded(1))
    assert DATA.chi_square(x) > 1e-5
    assert DATA.rms_distance(x) == pytest.approx(0.02, rel=0.04)


def test_from_1_there_is_no_step():
    x = noise(3)
    assert torch.equal(sample_sde(DATA.drift, x, 8, t_start=1.0), x)
    near = sample_sde(NARROW.drift, x, 8, t_start=1 - 1e-7)
    torch.testing.assert_close(near, x, rtol=0, atol=1e-5)


def gaussian_draws(c, t, x_t, eps, steps):
    """GLASS with Heun for data N(0.5, c), and the exact posterior's mean and deviation, all `(B,)`."""

    def drift(time, x):
        time = time[:, None]
        return 0.5 + (time * c - (1 - time)) / (time**2 * c + (1 - time) ** 2) * (x - time * 0.5)

    draws = sample_posterior_glass(drift, x_t[:, None], t, steps=steps, method="heun", noise=eps[:, None, None])
    total = (1 - t) ** 2 + c * t**2
    return draws[:, 0, 0], (0.5 * (1 - t) ** 2 + c * t * x_t) / total, (c / total) ** 0.5 * (1 - t)


@pytest.mark.parametrize("steps", [8, 32])
@pytest.mark.parametrize("c", [1.0, 0.25, 0.01])
def test_glass_by_heun_is_the_posterior_of_a_gaussian_also_near_1(c, steps):
    """Draws are linear in eps, so that eps = 0 gives their mean and eps = 1 their deviation. A corrector at s = 1 makes
    the deviation 6 times too large at t = 0.99, and 62 times at 0.999, with 8 steps; an Euler step at the end, 5 % too
    small at t = 0.7. Near t = 1, where the deviation is far below a step, draws stay within one of the mean."""
    t = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999], dtype=torch.float64)
    x_t = 0.5 * t + (t**2 * c + (1 - t) ** 2).sqrt()
    centre, mean, deviation = gaussian_draws(c, t, x_t, 0 * t, steps)
    upper = gaussian_draws(c, t, x_t, 0 * t + 1, steps)[0]
    torch.testing.assert_close(centre / deviation, mean / deviation, rtol=0, atol=1e-6)
    ratio = (upper - centre) / deviation
    assert (ratio[:5] - 1).abs().max() < 0.025
    assert (ratio[:7] - 1).abs().max() < (0.21 if steps == 8 else 0.04)
    assert 0 < ratio.min() <= ratio.max() < 1.05


@pytest.mark.parametrize("t", [0.3, 0.9, 0.99, 0.999])
def test_glass_by_heun_ends_on_finite_data(t):
    """The drift is not asked for at 1. A corrector there leaves 0.06 a coordinate with 8 steps, at any t."""
    x_t = t * DATA.points + (1 - t) * noise(6)
    draws = sample_posterior_glass(DATA.drift, x_t, t, 50, 8, "heun", generator=seeded(1))
    assert DATA.rms_distance(draws.flatten(0, 1)) < 1e-3
    if t >= 0.9:  # the posterior is the point that x_t came from
        torch.testing.assert_close(draws, DATA.points[:, None].expand(6, 50, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_glass_at_1_is_the_state_whatever_the_drift(method):
    """Rows of other times are not touched by it."""
    x = noise(3)
    t = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    draws = sample_posterior_glass(lambda time, y: 1e3 + 0 * y, x, t, 2, 8, method, generator=seeded(1))
    torch.testing.assert_close(draws[[0, 2]], x[[0, 2], None].expand(2, 2, 4))
    assert (draws[1] - x[1]).abs().min() > 1


def test_the_ode_by_heun_ends_on_finite_data():
    """With two evaluations a step."""
    times = []

    def drift(t, x):
        times.append(t[0].item())
        return DATA.drift(t, x)

    assert DATA.rms_distance(sample_ode(drift, noise(1000), 20, "heun")) < 1e-3
    assert len(times) == 40
    assert max(times) < 1


def test_heun_is_of_second_order():
    """On dx/dt = x e^t, from 1: halving the steps makes the error four times smaller."""
    one = torch.ones(1, 1, dtype=torch.float64)
    error = [
        sample_ode(lambda t, x: x * t.exp()[:, None], one, steps, "heun").item() - math.exp(math.e - 1)
        for steps in (20, 40, 80)
    ]
    assert error[0] / error[1] == pytest.approx(4, rel=0.15)
    assert error[1] / error[2] == pytest.approx(4, rel=0.08)
