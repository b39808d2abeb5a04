"""Samplers against what they integrate: orders of convergence, times of each state, noise of each step."""

import math

import pytest
import torch

from mfm_lightning.interpolant import sample_generators
from mfm_lightning.oracles import GaussianMixture
from mfm_lightning.samplers import integrate, sample_posterior_glass, sample_refinement

MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_orders_of_the_integrators(method, order):
    """dx/dt = 2 t x from 1 has x(1) = e, on a grid of steps that grow: the error of twice the steps is 2^-order."""

    def error(steps: int) -> float:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5
        x = integrate(lambda t, x: 2 * t[:, None] * x, torch.ones(1, 1, dtype=torch.float64), times, method)
        return abs(x.item() - math.e)

    assert error(200) < 4e-2**order
    assert math.log2(error(100) / error(200)) == pytest.approx(order, abs=0.1)


def test_glass_draws_of_states_at_their_own_times():
    times, x_t = torch.tensor([0.2, 0.7, 0.9]), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    whole = sample_posterior_glass(MIXTURE.drift, x_t, times, steps=5, noise=noise)
    for i in range(3):
        alone = sample_posterior_glass(MIXTURE.drift, x_t[[i]], times[i].item(), steps=5, noise=noise[[i]])
        torch.testing.assert_close(whole[[i]], alone)


def test_refinement_renoises_to_the_next_time():
    """A model whose every draw is 10: the state at t is 10 t + (1-t) z, with z from the sample's own generator."""
    seen = []

    class Ten:
        def flow_map(self, s, u, eps, t, x_t, conditions):
            seen.append((s, u, eps, t, x_t))
            return torch.full_like(x_t, 10.0)

    x0 = torch.randn(3, 2)
    assert (sample_refinement(Ten(), x0, generator=sample_generators(0, range(3)), times=[0.0, 0.3, 0.8]) == 10).all()
    drawn = [torch.stack([torch.randn(2, generator=g) for _ in range(5)]) for g in sample_generators(0, range(3))]
    drawn = torch.stack(drawn, dim=1)  # eps and z in turn, of each sample
    assert [(s, u, t) for s, u, _, t, _ in seen] == [(0.0, 1.0, 0.0), (0.0, 1.0, 0.3), (0.0, 1.0, 0.8)]
    for k, (_, _, eps, t, x_t) in enumerate(seen):
        assert torch.equal(eps, drawn[2 * k])
        torch.testing.assert_close(x_t, 10 * t + (1 - t) * drawn[2 * k - 1] if k else x0)
