"""Sentences of a report that intervals decide: "higher" or "closer" is said only where an interval shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mfm_lightning.metrics.measured import Measured

NO_INTERVAL = "not comparable, without an interval, with"
TIMES = "\u00d7"  # after a factor


def verdict(
    mine: Measured,
    others: Mapping[str, Measured],
    above: str = "higher than",
    below: str = "lower than",
    gap: Callable[[Measured], str] | None = None,
) -> str:
    """`mine` against each of the others, by the intervals of the paired differences. Without an interval, as of
    a single run of particles, nothing is decided, and that is said.

    Args:
        above: words for a difference above zero.
        below: words for a difference below zero.
        gap: says how large a difference is, after the name; nothing where None.
    """
    said = {1: [], -1: [], 0: [], None: []}
    for name, other in others.items():
        difference = mine - other
        sign = None if math.isnan(difference.low) else difference.sign
        said[sign].append(f"{name}{gap(difference)}" if sign and gap else name)
    words = ((1, above), (-1, below), (0, "not significantly different from"), (None, NO_INTERVAL))
    return "; ".join(f"{text} {listed(said[sign])}" for sign, text in words if said[sign])


def change(name: str, what: str, values: Mapping[int, Measured], letter: str = "N") -> str:
    """How a number changes from the smallest to the largest N."""
    few, many = min(values), max(values)
    sign = (values[many] - values[few]).sign
    ends = f"{values[few].text()} with {letter} = {few}", f"{values[many].text()} with {letter} = {many}"
    if not sign:
        return f"{name}: {what} does not differ significantly between {ends[0]} and {ends[1]}."
    return f"{name}: {what} {'rises' if sign > 0 else 'falls'} from {ends[0]} to {ends[1]}."


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names with commas between them, and a word before the last."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
