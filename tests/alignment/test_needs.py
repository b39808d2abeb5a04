"""What a method asks of its model is known before it runs: posteriors of one step, a flow map, or a drift alone."""

import pytest
import torch

from mfm_lightning.alignment import (
    DiamondGradient,
    DiamondGradientFree,
    DiamondPosterior,
    DPSGradient,
    DrawGradientFree,
    FeynmanKac,
    FlowMapGradient,
    GlassPosterior,
    NoiseOptimisation,
    Search,
    Steering,
    Target,
    TimeGrid,
    TrajectoryTilting,
)
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.oracles import GaussianMixture
from tests.noise import seeded

GRID = TimeGrid(3)


DRIFT_ALONE = {
    "DPS": (Steering(DPSGradient(), GRID), True),
    "Diamond-G": (Steering(DiamondGradient(2), GRID), False),
    "Diamond-GF": (Steering(DiamondGradientFree(2), GRID), False),
    "flow map's end": (Steering(FlowMapGradient(), GRID), False),
    "MFM-GF, GLASS": (Steering(DrawGradientFree(2, GlassPosterior(1)), GRID), True),
    "MFM-GF, Diamond draws": (Steering(DrawGradientFree(2, DiamondPosterior(2)), GRID), False),
    "search, GLASS": (Search(num_particles=2, num_draws=2, steps=2, posterior=GlassPosterior(1)), True),
    "search, Diamond draws": (Search(num_particles=2, num_draws=2, steps=2, posterior=DiamondPosterior(2)), False),
    "FK": (FeynmanKac(num_particles=2, grid=GRID), True),
    "FMTT": (TrajectoryTilting(num_particles=2, grid=GRID), False),
    "noise optimisation": (NoiseOptimisation(iterations=1), False),
}


@pytest.mark.parametrize("name", DRIFT_ALONE)
def test_what_needs_a_flow_map_is_refused_where_there_is_a_drift_alone(model, name):
    """Those, and no others, that fail when they run on an oracle, which has a drift."""
    method, runs = DRIFT_ALONE[name]
    oracle = GaussianMixture(torch.zeros(1, 2), 0.5)
    target, x0 = Target(oracle, lambda x: x[:, 0]), torch.randn(2, 2, generator=seeded())
    if runs:
        method.check(target.reward, oracle)
        assert torch.isfinite(method(target, x0, seeded()).states).all()
    else:
        with pytest.raises(TypeError, match="has no flow map"):
            method(target, x0, seeded())
        with pytest.raises(CheckpointError, match="needs a flow map, and a GaussianMixture has none"):
            method.check(target.reward, oracle)
        method.check(target.reward, model)
    method.check(target.reward)  # of no model yet
