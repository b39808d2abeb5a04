"""The log-likelihood of a noisy linear measurement: the reward of Bayesian inverse problems (paper, F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class LinearGaussianLikelihood:
    """r(x1) = log N(y; A x1, noise_std^2 I).

    Args:
        operator: A, `(M, D)` or `(D,)`.
        observation: y, `(M,)` or a number.
        noise_std: standard deviation of the measurement noise, positive.
    """

    def __init__(self, operator: Sequence, observation: float | Sequence, noise_std: float) -> None:
        if noise_std <= 0:
            raise ValueError(f"noise_std {noise_std} must be positive")
        self.operator = torch.atleast_2d(torch.as_tensor(operator, dtype=torch.float32))
        self.observation = torch.atleast_1d(torch.as_tensor(observation, dtype=torch.float32))
        if len(self.operator) != len(self.observation):
            raise ValueError(f"{len(self.operator)} measurements but {len(self.observation)} observations")
        self.noise_std = noise_std

    def __call__(self, x: Tensor) -> Tensor:
        """Rewards `(B,)` of states `(B, *shape)`."""
        residual = (self.observation.to(x) - x.flatten(1) @ self.operator.to(x).T) / self.noise_std
        constant = len(self.observation) * math.log(self.noise_std * math.sqrt(2 * math.pi))
        return -0.5 * residual.square().sum(dim=1) - constant
