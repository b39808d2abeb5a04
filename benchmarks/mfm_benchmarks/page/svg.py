"""Charts as SVG that a page contains: readable on a phone, in the page's colours, with the numbers on each mark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

from mfm_benchmarks.charts import (
    BarChart,
    BarPanel,
    Cloud,
    CloudChart,
    Interval,
    Line,
    LineChart,
    Look,
    Panel,
    level_dash,
    looks,
)
from mfm_lightning.metrics.measured import rounded
from mfm_lightning.utils.figures import round_numbers

WIDTH, HEIGHT = 360, 262  # of a panel's drawing, in units that are pixels on a phone
TOP, RIGHT, BOTTOM = 26, 14, 40
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


def line_panels(chart: LineChart, like: LineChart | None = None) -> list[tuple[str, str]]:
    """Title and SVG of each panel.

    Args:
        like: another chart, which the axes of panels of the same title must hold as well.
    """
    others = {panel.title: panel for panel in like.panels} if like else {}
    drawn = looks(chart.names(), chart.ours, chart.baselines)
    found = []
    for panel in chart.panels:
        beside = [panel, *([others[panel.title]] if panel.title in others else [])]
        together = [*chart.panels, *others.values()] if chart.same_y else beside
        found.append(
            (panel.title, _line_panel(chart, panel, drawn, x_limits(chart, beside), y_limits(chart, together)))
        )
    return found


def _line_panel(
    chart: LineChart,
    panel: Panel,
    drawn: dict[str, Look],
    of_x: tuple[float, float],
    of_y: tuple[float, float],
) -> str:
    vertical = Axis(chart.yscale, *of_y, HEIGHT - BOTTOM, TOP, chart.threshold)
    labels = [(vertical(v), tick_label(v)) for v in vertical.ticks(6)]
    left = 12 + DIGIT * max([len(text) for _, text in labels], default=1)
    across = Axis(chart.xscale, *of_x, left, WIDTH - RIGHT)
    points = sorted({x for line in panel.lines if not line.level for x, _ in line.points})
    marked = points if chart.ticks_at_points and len(points) < 12 else ()
    parts = [f'<text class="name" x="2" y="13">{escape(chart.ylabel)}</text>']
    for place, text in labels:
        parts.append(f'<path class="grid" d="M{left:.1f} {place:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    for value in across.ticks(5, marked):
        parts.append(f'<path class="grid" d="M{across(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick_label(value)}</text>'
        )
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.xlabel)}</text>'
    )
    order = sorted(panel.lines, key=lambda line: (drawn[line.name].is_strong, line.name in chart.baselines))
    parts += [_line(line, drawn[line.name], across, vertical) for line in order]
    if outside := beyond(panel, of_y):
        for k, text in enumerate(["beyond the axis:", *outside]):
            place = f'x="{WIDTH - RIGHT - 4}" y="{TOP + 14 + 15 * k}"'
            parts.append(f'<text class="beyond" {place} text-anchor="end">{escape(text)}</text>')
    said = "; ".join(_said(line) for line in panel.lines)
    about = f"{panel.title or chart.ylabel}: {chart.ylabel} by {chart.xlabel}. {said}"
    return _svg(parts, about, chart.xlabel, chart.ylabel, HEIGHT)


def _svg(parts: Iterable[str], about: str, xlabel: str, ylabel: str, height: float, kind: str = "lines") -> str:
    names = f'data-x="{escape(xlabel)}" data-y="{escape(ylabel)}"'
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(about)}" {names}>'
        f"{''.join(parts)}</svg>"
    )


def _said(line: Line) -> str:
    if not line.points:
        return f"{line.name}: no point"
    first, last = line.points[0], line.points[-1]
    if line.level or first is last:
        return f"{line.name}: {rounded(first[1].value)}"
    return f"{line.name}: {rounded(first[1].value)} to {rounded(last[1].value)}"


def _line(line: Line, look: Look, across: Axis, vertical: Axis) -> str:
    parts = []
    if line.level:
        y = line.points[0][1]
        ends = across.start, across.end
        if y.known:
            low, high = vertical(y.low), vertical(y.high)
            parts.append(f'<path class="band" d="M{ends[0]:.1f} {low:.1f}H{ends[1]:.1f}V{high:.1f}H{ends[0]:.1f}Z"/>')
        if arrow := vertical.arrow(y.value):
            parts = [_mark(ends[1], vertical(y.value), arrow, 4.6, math.nan, y)]
        else:
            way = f"M{ends[0]:.1f} {vertical(y.value):.1f}H{ends[1]:.1f}"
            parts.append(f'<path class="way" d="{way}" stroke-dasharray="{_numbers(level_dash(look))}"/>')
            parts.append(_mark(ends[1], vertical(y.value), look.marker, 3.6, math.nan, y))
        return _group(line.name, look, parts)
    places = [(across(x), vertical(y.value)) for x, y in line.points if math.isfinite(y.value)]
    shown = [(x, y) for x, y in line.points if math.isfinite(y.value)]
    if len(shown) > 1:
        if all(y.known for _, y in shown):
            upper = " ".join(f"{across(x):.1f} {vertical(y.high):.1f}" for x, y in shown)
            lower = " ".join(f"{across(x):.1f} {vertical(y.low):.1f}" for x, y in reversed(shown))
            parts.append(f'<path class="band" d="M{upper} {lower}Z"/>')
        dash = f' stroke-dasharray="{_numbers(look.dash)}"' if look.dash else ""
        way = " ".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(f'<path class="way" d="M{way}"{dash}/>')
    elif shown and shown[0][1].known:
        px, y = places[0][0], shown[0][1]
        low, high = vertical(y.low), vertical(y.high)
        parts.append(
            f'<path class="error" d="M{px:.1f} {low:.1f}V{high:.1f}'
            f'M{px - 3:.1f} {low:.1f}h6M{px - 3:.1f} {high:.1f}h6"/>'
        )
    size = 4.6 if look.is_strong else 3.6
    for (px, py), (x, y) in zip(places, shown, strict=True):
        parts.append(_mark(px, py, vertical.arrow(y.value) or look.marker, size, x, y))
    return _group(line.name, look, parts)


def _numbers(dash: Iterable[float]) -> str:
    return " ".join(f"{d:g}" for d in dash)


def _group(name: str, look: Look, parts: Iterable[str]) -> str:
    return f'<g class="line {look.colour}" data-name="{escape(name)}">{"".join(parts)}</g>'


def _mark(px: float, py: float, marker: str, size: float, x: float, y: Interval) -> str:
    """A marker with its numbers, which the page shows when it is pointed at."""
    numbers = f'data-px="{px:.1f}" data-py="{py:.1f}"'
    if math.isfinite(x):
        numbers += f' data-x="{x:,.6g}"' if abs(x) < 1e5 else f' data-x="{x:,.0f}"'
    return f'<path class="mark" d="{marker_path(px, py, marker, size)}" {numbers} data-y="{y.text()}"/>'


def marker_path(x: float, y: float, marker: str, r: float) -> str:
    """The outline of a marker around a point."""
    corners = {
        "s": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "D": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "^": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
        "v": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
        "P": tuple((a / 1, b / 1) for a, b in _plus()),
        "X": tuple(((a - b) * 0.7071, (a + b) * 0.7071) for a, b in _plus()),
        "h": tuple((1.1 * math.sin(k * math.pi / 3), -1.1 * math.cos(k * math.pi / 3)) for k in range(6)),
    }
    if marker == "o":
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0Z"
    return "M" + " ".join(f"{x + r * a:.1f} {y + r * b:.1f}" for a, b in corners[marker]) + "Z"


def _plus(arm: float = 0.42, reach: float = 1.2) -> list[tuple[float, float]]:
    quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
    found = []
    for _ in range(4):
        found += quarter
        quarter = [(-b, a) for a, b in quarter]
    return found


def bar_panels(chart: BarChart) -> list[tuple[str, str]]:
    """Title and SVG of each panel; each bar has its name above it, which needs no room beside it."""
    every = [n for panel in chart.panels for _, y in panel.bars for n in (y.value, y.high) if math.isfinite(n)]
    high = 1.04 * max([*every, *(panel.mark for panel in chart.panels)], default=1.0)
    return [(panel.title, _bar_panel(chart, panel, high)) for panel in chart.panels]


def _bar_panel(chart: BarChart, panel: BarPanel, high: float) -> str:
    step, top, left = 36, 6, 4
    height = top + step * len(panel.bars) + BOTTOM
    across = Axis("linear", 0.0, high, left, WIDTH - RIGHT)
    bottom, parts = height - BOTTOM, []
    for value in across.ticks(5):
        parts.append(f'<path class="grid" d="M{across(value):.1f} {top}V{bottom}"/>')
        anchor = "start" if value == 0 else "middle"
        parts.append(
            f'<text x="{across(value):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{tick_label(value)}</text>'
        )
    for k, (name, y) in enumerate(panel.bars):
        above = top + step * k
        look = Look("ours" if name in chart.ours else "m1", "o", ())
        bar = f'<path class="bar" d="M{left} {above + 17}H{across(y.value):.1f}v13H{left}Z"/>'
        if y.known:
            low, end = across(y.low), across(y.high)
            ends = f"M{low:.1f} {above + 20.5}v6M{end:.1f} {above + 20.5}v6"
            bar += f'<path class="error" d="M{low:.1f} {above + 23.5}H{end:.1f}{ends}"/>'
        numbers = f'data-px="{across(y.value):.1f}" data-py="{above + 23.5}" data-y="{y.text()}"'
        mark = f'<path class="mark none" d="M{across(y.value):.1f} {above + 23.5}h0" {numbers}/>'
        parts.append(
            _group(name, look, [f'<text class="label" x="{left}" y="{above + 13}">{escape(name)}</text>', bar, mark])
        )
    parts.append(f'<path class="rule" d="M{across(panel.mark):.1f} {top}V{bottom}"/>')
    parts.append(
        f'<text class="name" x="{WIDTH / 2}" y="{height - 5}" text-anchor="middle">{escape(chart.xlabel)}</text>'
    )
    said = "; ".join(f"{name}: {rounded(y.value)}" for name, y in panel.bars)
    return _svg(parts, f"{panel.title}: {chart.xlabel}. {said}", "", chart.xlabel, height, "bars")


def cloud_panels(chart: CloudChart) -> list[tuple[str, str]]:
    """Title and SVG of each panel. The background and the contours stand once on the page, and are used in all."""
    return [(panel.name, _cloud_panel(chart, panel)) for panel in chart.panels]


def cloud_symbols(chart: CloudChart, name: str) -> str:
    """What all panels of a chart share, by its name."""
    lines = "".join(f'<path class="contour" d="M{" ".join(_places(chart, line))}"/>' for line in chart.contours)
    background = f'<path class="dots back" d="{_dots(chart, chart.background)}"/>'
    symbol = f'<symbol id="{name}-shared" viewBox="0 0 200 200">{background}{lines}</symbol>'
    return f'<svg class="shared" aria-hidden="true">{symbol}</svg>'


def _cloud_panel(chart: CloudChart, panel: Cloud) -> str:
    kind = "ours" if panel.name in chart.ours else "m1"
    about = f"{panel.name}: {len(panel.points)} samples over the contours of the exact density"
    return (
        f'<svg class="chart cloud {kind}" viewBox="0 0 200 200" role="img" aria-label="{escape(about)}">'
        f'<use href="#SHARED" width="200" height="200"/>'
        f'<path class="dots" d="{_dots(chart, panel.points[:2000])}"/></svg>'
    )


def _places(chart: CloudChart, points: Iterable[tuple[float, float]]) -> Iterator[str]:
    for x, y in points:
        yield f"{100 + 100 * x / chart.limit:.1f} {100 - 100 * y / chart.limit:.1f}"


def _dots(chart: CloudChart, points: Iterable[tuple[float, float]]) -> str:
    inside = [(x, y) for x, y in points if abs(x) <= chart.limit and abs(y) <= chart.limit]
    return "".join(f"M{place}h0" for place in _places(chart, inside))


def legend_mark(look: Look, level: bool = False) -> str:
    """A short piece of a line for the legend."""
    drawn = level_dash(look) if level else look.dash
    dash = f' stroke-dasharray="{_numbers(drawn)}"' if drawn else ""
    return (
        f'<svg class="sample line {look.colour}" viewBox="0 0 34 14" aria-hidden="true">'
        f'<path class="way" d="M1 7H33"{dash}/>'
        f'<path class="mark" d="{marker_path(17, 7, look.marker, 4.2)}"/></svg>'
    )
