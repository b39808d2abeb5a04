"""Alignment at inference time: steering, search, and the baselines that they must beat, with one kind of result.

A `Target` says what is aligned to what. A method is an object with its settings as fields, called as
`method(target, x0, generator)`; estimators of the value and posteriors are parts of it.
"""

from mfm_lightning.alignment.best_of_n import BestOfN, best_of_n
from mfm_lightning.alignment.diamond import DiamondGradient, DiamondGradientFree, DiamondPosterior
from mfm_lightning.alignment.method import AlignmentMethod, TimeGrid
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.noise_optimisation import NoiseOptimisation, optimise_noise
from mfm_lightning.alignment.policy import PolicySampling
from mfm_lightning.alignment.posteriors import (
    FlowMapPosterior,
    GlassPosterior,
    OraclePosterior,
    Posterior,
    RolloutPosterior,
)
from mfm_lightning.alignment.result import AlignmentResult
from mfm_lightning.alignment.search import Search, search
from mfm_lightning.alignment.smc import FeynmanKac, ParticleMethod, TwistedSMC, sequential_monte_carlo
from mfm_lightning.alignment.steering import Steering, steer
from mfm_lightning.alignment.target import LoadedTarget, Target, TargetSettings
from mfm_lightning.alignment.tilting import TrajectoryTilting, tilt_trajectories
from mfm_lightning.alignment.values import (
    DenoisedValue,
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    DrawValue,
    Estimate,
    ExactGradient,
    FlowMapGradient,
    GradientEstimator,
    NetworkGradient,
    ValueEstimator,
)

__all__ = [
    "AlignmentMethod",
    "AlignmentResult",
    "BestOfN",
    "DPSGradient",
    "DenoisedValue",
    "DiamondGradient",
    "DiamondGradientFree",
    "DiamondPosterior",
    "DrawGradient",
    "DrawGradientFree",
    "DrawValue",
    "Estimate",
    "ExactGradient",
    "FeynmanKac",
    "FlowMapGradient",
    "FlowMapPosterior",
    "GlassPosterior",
    "GradientEstimator",
    "LoadedTarget",
    "Meter",
    "NetworkGradient",
    "NoiseOptimisation",
    "OraclePosterior",
    "ParticleMethod",
    "PolicySampling",
    "Posterior",
    "RolloutPosterior",
    "Search",
    "Steering",
    "Target",
    "TargetSettings",
    "TimeGrid",
    "TrajectoryTilting",
    "TwistedSMC",
    "ValueEstimator",
    "best_of_n",
    "optimise_noise",
    "search",
    "sequential_monte_carlo",
    "steer",
    "tilt_trajectories",
]
