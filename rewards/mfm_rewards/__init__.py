"""Rewards: what generation is aligned to. `register`, `build` and `available` are the registry; one file a reward.

This package depends on torch only, never on mfm_lightning.
"""

from mfm_rewards import (  # noqa: F401  (they register)
    aesthetic,
    classifier,
    clip_score,
    composition,
    diversity,
    hpsv2,
    image_reward,
    jpeg,
    linear_gaussian,
    pickscore,
    remote,
    statistics,
    symmetry,
    vlm_judge,
)
from mfm_rewards.protocol import Reward, RewardError, as_reward, evaluate
from mfm_rewards.registry import available, build, register

__all__ = ["Reward", "RewardError", "as_reward", "available", "build", "evaluate", "register"]
