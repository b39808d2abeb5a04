"""The objective of the amortised value: unbiased with one posterior draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def amortised_value_loss(value: Tensor, rewards: Tensor, linear_above: float = 10.0) -> Tensor:
    """E[e^{r - V} + V], `(B,)`: in expectation over the draws its minimiser is V = log E[e^r | x_t].

    Args:
        value: V_phi, `(B,)`.
        rewards: of N posterior draws, `(B, N)`.
        linear_above: e^{r - V} is continued by its tangent where r - V is above this, so that neither it nor its
            gradient overflows while V is still far too low. Draws that are so far above the exact V, e^10 times as
            likely under the tilt, count for less. For rewards N(0, s^2) the minimiser is below V by less than 1e-4 for
            s up to 2, by 0.02 for s = 3, 0.30 for s = 4, 1.2 for s = 5.

    A higher tangent does not pay: what an optimiser that scales or clips gradients makes of rare draws limits it first.
    A single V trained by Adam with batches of 256 (20,000 steps, 32 runs) reaches the same for tangents at 10, 20 and
    30: 4.34 for s = 3 (exact 4.50), 7.31 for s = 4 (8.00); with the gradient clipped to norm 1 (tangents at 10 and
    20), 4.14 and 6.60. Where the rewards of a posterior are that wide, take a smaller reward scale, or more draws.
    """
    gap = rewards - value[:, None]
    # relu has no gradient below: e^10 - e^10 in its place would leave one of rounding
    beyond = torch.relu(gap - linear_above)
    return (gap.clamp_max(linear_above).exp() + math.exp(linear_above) * beyond).mean(dim=1) + value
