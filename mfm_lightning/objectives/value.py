"""The objective of the amortised value: unbiased with one posterior draw."""

from __future__ import annotations

import math

from torch import Tensor


def amortised_value_loss(value: Tensor, rewards: Tensor, linear_above: float = 10.0) -> Tensor:
    """E[e^{r - V} + V], `(B,)`: in expectation over the draws its minimiser is V = log E[e^r | x_t].

    Args:
        value: V_phi, `(B,)`.
        rewards: of N posterior draws, `(B, N)`.
        linear_above: e^{r - V} is continued by its tangent where r - V is above this, so that neither it nor its
            gradient overflows while V is still far too low. Draws that are so far above the exact V, e^10 times as
            likely under the tilt, count for less.
    """
    gap = rewards - value[:, None]
    inside = gap.clamp_max(linear_above)
    return (inside.exp() + math.exp(linear_above) * (gap - inside)).mean(dim=1) + value
