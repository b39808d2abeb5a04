"""Draws and value estimates by name: in parts as at once, on a closed form, and their errors by numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from mfm_lightning.alignment.posteriors import FlowMapPosterior, OraclePosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DenoisedValue, DrawValue
from mfm_lightning.evaluation.draws import (
    DrawSettings,
    ValueErrors,
    draw,
    draw_distance,
    estimate_values,
    noisy_states,
    posteriors,
)
from mfm_lightning.metrics.distances import sliced_wasserstein
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded

ORACLE, REWARD = GaussianMixture([MEAN], VARIANCE), LinearGaussianLikelihood([1.0, 0.5], 0.3, 0.8)


def test_sources_and_estimators_have_names():
    assert list(posteriors([1, 4], [2])) == ["MFM 1", "MFM 4", "GLASS 2"]
    assert posteriors([1, 4], [2])["GLASS 2"].steps == 2
    settings = DrawSettings(num_draws=7, model_steps=[2], glass_steps=[3], max_rows=5)
    found = settings.value_estimators()
    assert list(found) == ["MFM 2", "GLASS 3"]
    assert (found["MFM 2"].num_draws, found["MFM 2"].max_rows, found["MFM 2"].posterior.steps) == (7, 5, 2)


def test_draws_in_parts_are_those_at_once():
    model, x_t = gaussian_model().requires_grad_(False), torch.randn(5, 2, generator=seeded())
    noise = torch.randn(5, 6, 2, generator=seeded(1))
    target = Target(model, REWARD)
    whole = FlowMapPosterior(2)(target, 0.4, x_t, noise)
    for max_rows in (1, 13, 1000):
        torch.testing.assert_close(draw(FlowMapPosterior(2), target, 0.4, x_t, noise, max_rows), whole)


def test_the_distance_is_that_of_each_state():
    x_t = noisy_states(ORACLE.sample(3, seeded()), 0.4, seeded(1))
    assert torch.equal(x_t, noisy_states(ORACLE.sample(3, seeded()), 0.4, seeded(1)))
    a, b = (
        draw(OraclePosterior(ORACLE, seeded(s)), Target(ORACLE, REWARD), 0.4, x_t, torch.empty(3, 50, 2))
        for s in (2, 3)
    )
    found = draw_distance(a, b + torch.tensor([1.0, 0.0]), 64, seed=5)
    wanted = [sliced_wasserstein(a[i], b[i] + torch.tensor([1.0, 0.0]), 64, seeded(5)) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert (draw_distance(a, b, 64, seed=5) < found).all()


def test_estimates_of_exact_draws_are_the_closed_form():
    """4.5 standard errors of 4,000 draws; and evaluations of one value."""
    x = noisy_states(ORACLE.sample(8, seeded()), 0.4, seeded(1))
    target, exact = Target(gaussian_model().requires_grad_(False), REWARD), ORACLE.value(x, 0.4, REWARD).float()
    found = estimate_values(DrawValue(4000, FlowMapPosterior(2)), target, 0.4, x, seeded(2), repeats=3)
    assert found.values.shape == (3, 8)
    assert found.nfe == 4000 * (2 + 1)
    assert 1 < found.ess <= 4000
    spread = found.values.std(dim=0).clamp_min(0.02)
    assert ((found.values - exact).abs() < 4.5 * spread).all()
    assert not torch.equal(found.values[0], found.values[1])
    point = estimate_values(DenoisedValue(), target, 0.4, x, seeded())
    assert (point.values.shape, point.nfe, point.ess) == ((1, 8), 2, 1)


@pytest.mark.parametrize("repeats", [1, 3])
def test_errors_are_those_of_numpy(repeats):
    reference = torch.randn(30, generator=seeded())
    values = reference + 0.5 * torch.randn(repeats, 30, generator=seeded(1)) + 0.2
    found, error = ValueErrors.of(values, reference), (values - reference).numpy().astype(float)
    assert found.r.value == pytest.approx(np.mean([pearsonr(row, reference).statistic for row in values]), abs=1e-6)
    assert found.r.low < found.r.value < found.r.high
    assert found.bias.value == pytest.approx(error.mean(), rel=1e-6)
    assert found.squared.value == pytest.approx((error**2).mean(), rel=1e-6)
    if repeats == 1:  # one estimate does not tell it
        assert found.variance is None
    else:
        assert found.variance == pytest.approx(values.numpy().var(axis=0, ddof=1).mean(), rel=1e-5)
    # over states: repeats of one state are no new evidence
    assert found.bias.error == pytest.approx(error.mean(axis=0).std() / 30**0.5, rel=0.12)
