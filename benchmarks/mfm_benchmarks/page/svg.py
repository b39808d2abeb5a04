"""Charts as SVG that a page contains: readable on a phone, in the page's colours, with the numbers on each mark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape

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
from mfm_benchmarks.page.axes import DIGIT, Axis, beyond, tick_label, x_limits, y_limits
from mfm_lightning.metrics.measured import rounded

WIDTH, HEIGHT = 360, 262  # of a panel's drawing, in units that are pixels on a phone
TOP, RIGHT, BOTTOM = 26, 14, 40


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
