"""GLASS: the inner drift of the posterior p_{1|t}(. | x_t) from a base flow, with no retraining.

Paper, Eq. 32; Holderrieth et al., "GLASS Flows" (arXiv 2509.25170).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfm_lightning.interpolant import as_times, expand

BaseDrift = Callable[[Tensor, Tensor], Tensor]


class SufficientStatistic(NamedTuple):
    """What (s, x_s) and (t, x_t) together say about x1: as one noisy state `x` at time `time`."""

    time: Tensor
    x: Tensor


class _Weights(NamedTuple):
    cos: Tensor  # share of the outer state: p / hypot(p, q)
    sin: Tensor  # share of the inner state
    h: Tensor
    p: Tensor
    q: Tensor
    d: Tensor
    total: Tensor  # h + d


def _weights(s: Tensor, t: Tensor) -> _Weights:
    # With p = t(1-s), q = s(1-t), d = (1-s)(1-t): sqrt(a) = hypot(p, q) / d. Nothing here divides by 1-s or 1-t.
    p, q, d = t * (1 - s), s * (1 - t), (1 - s) * (1 - t)
    h = torch.hypot(p, q)
    empty = h == 0  # s = t = 0 or s = t = 1; the inner state alone decides
    safe = torch.where(empty, 1.0, h)
    cos = torch.where(empty, 0.0, p / safe)
    sin = torch.where(empty, 1.0, q / safe)
    return _Weights(cos, sin, h, p, q, d, h + d)


def _combine(w: _Weights, s: Tensor, x_s: Tensor, t: Tensor, x_t: Tensor) -> SufficientStatistic:
    """(t*, x*) with p(x1 | x_s, x_t) = p_{1|t*}(x1 | x*): both views combined by precision (Eq. 32)."""
    corner = w.total == 0  # s = t = 1
    safe = torch.where(corner, 1.0, w.total)
    outer = torch.where(corner, 0.0, w.cos * (1 - s) / safe)
    inner = torch.where(corner, 1.0, w.sin * (1 - t) / safe)
    time = torch.where(corner, 1.0, w.h / safe)
    return SufficientStatistic(time, expand(outer, x_t) * x_t + expand(inner, x_s) * x_s)


def glass_velocity(base_drift: BaseDrift, s: Tensor | float, x_s: Tensor, t: Tensor | float, x_t: Tensor) -> Tensor:
    """The drift of the inner flow that carries N(0, I) at s=0 to p_{1|t}(. | x_t) at s=1 (Eq. 32).

    v_s(x_s; t, x_t) = (D_{t*}(x*) - x_s) / (1-s), with the division carried out by hand, so that it is finite and
    accurate for all s, t in [0, 1]. At t = 1 the posterior is a point and v = (x_t - x_s) / (1-s); at s = 1 it is
    b_1(x_s); where both are 1, the latter.

    Args:
        base_drift: `base_drift(t, x) -> b_t(x)`, times `(B,)`, states `(B, *shape)`.
        s: inner times, `(B,)` or a number.
        t: outer times, `(B,)` or a number.
        x_s: inner states `(B, *shape)`.
        x_t: outer states `(B, *shape)`.
    """
    s, t = as_times(s, x_s), as_times(t, x_s)
    w = _weights(s, t)
    star = _combine(w, s, x_s, t, x_t)
    drift = base_drift(star.time, star.x)

    corner = w.total == 0
    total = torch.where(corner, 1.0, w.total)
    # (x* - x_s)/(1-s) = cos/(h+d) [(x_t - x_s) + k x_s] with k = 1 - t (1 + d/(h+q)), rewritten so that no two nearly
    # equal numbers are subtracted but x_t and x_s, and that exactly;  (1-t*)/(1-s) = (1-t)/(h+d).
    product = (w.h + w.p) * (w.h + w.q)
    k = (1 - t) * w.q * (w.h + w.p + w.q) / torch.where(product == 0, 1.0, product)
    pull = expand(w.cos / total, x_t) * ((x_t - x_s) + expand(k, x_s) * x_s)
    return pull + expand(torch.where(corner, 1.0, (1 - t) / total), x_s) * drift
