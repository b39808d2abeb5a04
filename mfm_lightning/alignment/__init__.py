"""Alignment at inference time: steering, search, and the baselines that they must beat, with one kind of result."""

from mfm_lightning.alignment.best_of_n import best_of_n
from mfm_lightning.alignment.methods import (
    AlignmentMethod,
    BestOfN,
    FeynmanKac,
    PolicySampling,
    Search,
    Steering,
    TimeGrid,
    TwistedSMC,
)
from mfm_lightning.alignment.result import AlignmentResult
from mfm_lightning.alignment.search import search, search_times
from mfm_lightning.alignment.smc import feynman_kac, twisted_smc
from mfm_lightning.alignment.steering import steer, time_grid

__all__ = [
    "AlignmentMethod",
    "AlignmentResult",
    "BestOfN",
    "FeynmanKac",
    "PolicySampling",
    "Search",
    "Steering",
    "TimeGrid",
    "TwistedSMC",
    "best_of_n",
    "feynman_kac",
    "search",
    "search_times",
    "steer",
    "time_grid",
    "twisted_smc",
]
