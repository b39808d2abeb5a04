"""The axes of charts: their limits, ticks and labels, and what lies beyond them; for the page and for figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from mfm_benchmarks.charts import LineChart, Panel
from mfm_lightning.metrics.measured import rounded
from mfm_lightning.utils.figures import round_numbers

DIGIT = 7.2  # width of a digit
MINUS = "\u2212"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Axis:
    """Positions of numbers between two ends of a drawing."""

    scale: str
    low: float
    high: float
    start: float
    end: float
    threshold: float = 1e-3

    def __call__(self, value: float) -> float:
        """Where a number is drawn; what is outside the limits, at the nearest of them."""
        inside = min(max(value, self.low), self.high)
        low, high = self.scaled(self.low), self.scaled(self.high)
        share = (self.scaled(inside) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def scaled(self, value: float) -> float:
        """The number on the axis's scale."""
        if self.scale == "log":
            return math.log10(value)
        if self.scale == "symlog":
            size = abs(value) / self.threshold
            return math.copysign(size if size < 1 else 1 + math.log10(size), value)
        return value

    def arrow(self, value: float) -> str:
        """The marker of a value beyond the axis; empty for others."""
        return "^" if value > self.high else "v" if value < self.low else ""

    def ticks(self, most: int, marked: Sequence[float] = ()) -> list[float]:
        """At most so many round numbers, or those of `marked` that are far enough apart."""
        if marked:
            room, found, last = abs(self.end - self.start) / (most + 1), list[float](), -math.inf
            for value in sorted(marked):
                if (place := abs(self(value) - self.start)) - last >= room or not found:
                    found.append(value)
                    last = place
            return found
        if self.scale == "log":
            return round_numbers(self.low, self.high, most)
        if self.scale == "symlog":
            powers = range(-12, 13)
            around = [sign * self.threshold * 10.0**k for sign in (-1, 1) for k in powers if k >= 0]
            return sorted(v for v in [0.0, *around] if self.low <= v <= self.high)
        return [float(v) for v in MaxNLocator(most).tick_values(self.low, self.high) if self.low <= v <= self.high]


def tick_label(value: float) -> str:
    """A short text for a number on an axis."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        power = math.floor(math.log10(abs(value)) + 1e-9)
        factor = value / 10.0**power
        head = "" if math.isclose(factor, 1) else MINUS if math.isclose(factor, -1) else f"{factor:.3g}·"
        return f"{head}10{str(power).translate(SUPERSCRIPTS)}"
    return f"{value:g}".replace("-", MINUS) if abs(value) < 1000 else f"{value:,.0f}".replace("-", MINUS)


def limits(numbers: Iterable[float], scale: str, room: float = 0.06) -> tuple[float, float]:
    """Ends of an axis that holds all finite numbers, with some room; positive ones alone on a logarithmic axis."""
    found = [n for n in numbers if math.isfinite(n) and (scale != "log" or n > 0)]
    if not found:
        return (0.1, 1.0) if scale == "log" else (0.0, 1.0)
    low, high = min(found), max(found)
    if scale == "log":
        factor = max((high / low) ** room, 1.12)
        return low / factor, high * factor
    if scale == "symlog":
        return min(low, 0.0) * 1.4, max(high, 0.0) * 1.4 or 1.0
    gap = (high - low) * room or abs(high) * room or 0.5
    return low - gap, high + gap


def y_limits(chart: LineChart, panels: Iterable[Panel]) -> tuple[float, float]:
    """Of the panels' values and intervals.

    Values far from all others, such as of a method that diverges, are left out: `beyond` lists them, and each is
    written on the chart. Intervals are cut where they reach further than the values' range on either side.
    """
    points = [y for panel in panels for line in panel.lines for _, y in line.points]
    low, high = _usual([y.value for y in points], Axis(chart.yscale, 0.0, 1.0, 0.0, 1.0, chart.threshold))
    points = [y for y in points if low <= y.value <= high]
    if chart.yscale == "log":
        low, high = limits((y.value for y in points), "log")
        ends = [n for y in points for n in (y.low, y.high) if math.isfinite(n) and n > 0]
        return max(min([low, *ends]), 0.6 * low), min(max([high, *ends]), 1.8 * high)
    values = [y.value for y in points if math.isfinite(y.value)]
    reach = max(values, default=0.0) - min(values, default=0.0) or math.inf
    if chart.yscale == "symlog":
        reach = math.inf
    ends = [min(max(n, min(values) - reach), max(values) + reach) for y in points for n in (y.low, y.high) if n == n]
    return limits([*values, *ends], chart.yscale)


def _usual(values: Sequence[float], axis: Axis) -> tuple[float, float]:
    """The ends between which values are not far from the others, on the axis's own scale.

    Far are those beyond Tukey's outer fences (three times the distance of the quartiles from them) and, besides, beyond
    a gap: of a decade on a logarithmic axis, of twice the others' range on a linear one.
    """
    kept = sorted(v for v in values if math.isfinite(v) and (axis.scale != "log" or v > 0))
    if len(kept) < 8:
        return -math.inf, math.inf
    scaled = [axis.scaled(v) for v in kept]
    first, _, third = statistics.quantiles(scaled, n=4)
    fence = 3 * (third - first)
    inside = [k for k, v in enumerate(scaled) if first - fence <= v <= third + fence]
    low, high = inside[0], inside[-1]
    gap = 2 * (scaled[high] - scaled[low]) if axis.scale == "linear" else 1.0
    if gap <= 0:
        return -math.inf, math.inf
    while high + 1 < len(scaled) and scaled[high + 1] - scaled[high] <= gap:
        high += 1
    while low > 0 and scaled[low] - scaled[low - 1] <= gap:
        low -= 1
    return kept[low], kept[high]


def beyond(panel: Panel, of_y: tuple[float, float]) -> list[str]:
    """For each line with values outside the axis, a text with them, such as `DPS: 398,000`, after an arrow."""
    found = []
    for line in panel.lines:
        for arrow, outside in (
            ("\u2191", [y.value for _, y in line.points if of_y[1] < y.value]),
            ("\u2193", [y.value for _, y in line.points if y.value < of_y[0]]),
        ):
            if outside:
                ends = dict.fromkeys((rounded(min(outside)), rounded(max(outside))))
                found.append(f"{arrow} {line.name}: {' to '.join(ends)}")
    return found


def note(chart: LineChart) -> str:
    """What to say of values beyond the axes, and of intervals that are cut there; empty where there are none."""
    values, ends = [], []
    for panel in chart.panels:
        low, high = y_limits(chart, chart.panels if chart.same_y else [panel])
        points = [y for line in panel.lines for _, y in line.points]
        values += [y for y in points if y.value < low or y.value > high]
        ends += [y for y in points if y.low < low or y.high > high]
    said = "An arrow at the edge marks a value beyond the axis. " if values else ""
    said += "Intervals that reach beyond the axis are cut there. " if ends else ""
    return f"{said}“Numbers of this chart” has them in full." if said else ""


def x_limits(chart: LineChart, panels: Iterable[Panel]) -> tuple[float, float]:
    """Of the points of lines."""
    return limits(
        (x for panel in panels for line in panel.lines if not line.level for x, _ in line.points), chart.xscale
    )
