"""Rewards: what generation is aligned to. `register`, `build` and `available` are the registry; one file a reward.

This package depends on torch only, never on mfm_lightning.
"""

from rewards import classifier, composition, jpeg, linear_gaussian, statistics, symmetry  # noqa: F401  (they register)
from rewards.protocol import Reward, RewardError, as_reward, evaluate
from rewards.registry import available, build, register

__all__ = ["Reward", "RewardError", "as_reward", "available", "build", "evaluate", "register"]
