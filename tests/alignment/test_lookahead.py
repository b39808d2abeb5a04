"""The best look-ahead: what was scored on the way, beside an endpoint that does not change."""

import pytest
import torch

from mfm_lightning.alignment import FeynmanKac, Search, Steering, Target, TimeGrid, TwistedSMC
from mfm_lightning.alignment.values import (
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    DrawValue,
    ExactGradient,
)
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.oracles import GaussianMixture
from tests.noise import seeded

GRID = TimeGrid(5)


class Recorded:
    """A reward with its highest value inside, and all that it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        values = torch.sin(3 * x).sum(dim=1)
        self.calls.append((x.detach().clone(), values.detach().clone()))
        return values


METHODS = {
    "MFM-G": lambda best: Steering(DrawGradient(4), GRID, return_best=best),
    "MFM-G in parts": lambda best: Steering(DrawGradient(4, max_rows=3), GRID, "sde", return_best=best),
    "MFM-GF": lambda best: Steering(DrawGradientFree(4, max_rows=5), GRID, return_best=best),
    "DPS": lambda best: Steering(DPSGradient(max_rows=1), GRID, return_best=best),
    "MFM-G, some steps": lambda best: Steering(DrawGradient(2), GRID, steer_from=0.3, steer_to=0.7, return_best=best),
    "FK": lambda best: FeynmanKac(num_particles=4, grid=GRID, return_best=best),
    "FK, draws": lambda best: FeynmanKac(DrawValue(2), num_particles=4, grid=GRID, keep="all", return_best=best),
    "TDS": lambda best: TwistedSMC(num_particles=4, grid=GRID, ess_threshold=1.0, return_best=best),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_best_look_ahead_costs_nothing_and_changes_nothing(model, name):
    """Of one sample: the highest of all rewards that were taken on the way, and the state that it is of."""
    x0 = torch.randn(1, 2, generator=seeded(3))
    plain = METHODS[name](False)(Target(model, Recorded()), x0, seeded(1))
    reward = Recorded()
    found = METHODS[name](True)(Target(model, reward), x0, seeded(1))
    assert torch.equal(found.states, plain.states)
    assert torch.equal(found.rewards, plain.rewards)
    assert found.trace == plain.trace
    assert (found.nfe.network, found.nfe.reward) == (plain.nfe.network, plain.nfe.reward)
    assert plain.best_states is None
    assert "best_rewards" not in plain.summary()
    on_the_way = reward.calls[:-2]  # the last two judge the endpoint and the best
    states, values = (torch.cat(parts) for parts in zip(*on_the_way, strict=True))
    assert torch.equal(found.best_rewards, values.max()[None])
    assert torch.equal(found.best_states, states[values.argmax()][None])
    assert torch.equal(found.best_images, found.best_states)
    assert found.summary()["best_rewards"] == found.best_rewards.tolist()


@pytest.mark.parametrize("name", METHODS)
def test_each_sample_has_its_own_best(model, name):
    x0 = torch.randn(5, 2, generator=seeded())
    whole = METHODS[name](True)(Target(model, Recorded()), x0, sample_generators(3, range(5)))
    assert whole.best_states.shape == x0.shape
    for i in range(5):
        alone = METHODS[name](True)(Target(model, Recorded()), x0[[i]], sample_generators(3, [i]))
        torch.testing.assert_close(alone.best_states, whole.best_states[[i]], rtol=1e-4, atol=1e-5)


def test_search_returns_the_best_anyway(model, tmp_path):
    result = Search(3, 2, 3)(Target(model, Recorded()), torch.randn(4, 2, generator=seeded()), seeded(1))
    assert torch.equal(result.best_states, result.states)
    assert torch.equal(result.best_rewards, result.rewards)
    assert result.save(tmp_path).is_file()


def test_there_must_be_something_to_return():
    exact = ExactGradient(GaussianMixture([[0.0, 0.0]], 1.0))
    for make in (
        lambda: Steering(exact, return_best=True),
        lambda: TwistedSMC(exact, return_best=True),
    ):
        with pytest.raises(ValueError, match="return_best: a ExactGradient scores no clean states"):
            make()
    for options in ({"strength": 0.0}, {"steer_from": 0.995}):
        with pytest.raises(ValueError, match="return_best: nothing is looked ahead at without steering"):
            Steering(DrawGradient(2), return_best=True, **options)
