"""Gaussian transitions to a next time, given the present state and a draw of x1, by the correlation of their noises.

GLASS Flows (Holderrieth et al., arXiv 2509.25170): x_t = t x1 + (1-t) z and x_t' = t' x1 + (1-t') z', where z and z'
are standard normal with correlation rho. With x1 drawn from the posterior of x_t, every rho leaves the marginals as
they are: states at t' have the distribution p_t'. The base SDE, a Markov process, has rho = t (1-t') / (t' (1-t)).
"""

from __future__ import annotations

from torch import Tensor

MARKOV = "markov"
Correlation = float | str  # a number in [-1, 1], or MARKOV


def check_correlation(value: Correlation) -> None:
    """Raise ValueError unless it is a number in [-1, 1] or "markov"."""
    if value != MARKOV and (isinstance(value, str) or not -1 <= value <= 1):
        raise ValueError(f"correlation {value!r} must be a number in [-1, 1], or {MARKOV!r}")


def correlation_of(value: Correlation, now: float, then: float) -> float:
    """rho of the step from `now` to `then`, for now <= then <= 1, now < 1 and then > 0."""
    return now * (1 - then) / (then * (1 - now)) if isinstance(value, str) else value


def bridge(now: float, then: float, x: Tensor, x1: Tensor, correlation: Correlation = MARKOV) -> tuple[Tensor, float]:
    """Mean `(B, *shape)` and variance of p(x_then | x_now, x1), for now <= then <= 1 and now < 1.

    With "markov" the process is that of the base SDE: x_now given x_then is N((now/then) x_then, .), whatever x1.
    With a number rho: mean then x1 + rho (1-then) (x - now x1) / (1-now), variance (1-then)^2 (1 - rho^2).
    """
    if not isinstance(correlation, str):
        mean = then * x1 + (correlation * (1 - then) / (1 - now)) * (x - now * x1)
        return mean, (1 - then) ** 2 * (1 - correlation**2)
    ratio = now / then
    gap = (then - now) / then * (1 - now + ratio * (1 - then))  # (1-now)^2 - ratio^2 (1-then)^2, nothing cancels
    total = (1 - now) ** 2
    mean = (then * gap / total) * x1 + (ratio * (1 - then) ** 2 / total) * x
    return mean, (1 - then) ** 2 * gap / total
