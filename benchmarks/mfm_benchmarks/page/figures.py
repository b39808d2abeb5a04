"""Figures as files: PNG and SVG to look at, and PDF at the width of a paper's column, a page for each panel."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from mfm_benchmarks.charts import (
    COLOURS,
    BarChart,
    BarPanel,
    Cloud,
    CloudChart,
    Gallery,
    Interval,
    LineChart,
    Look,
    Panel,
    level_dash,
    looks,
)
from mfm_benchmarks.page.axes import beyond, limits, x_limits, y_limits
from mfm_benchmarks.page.stored import decoded
from mfm_lightning.utils.figures import log_ticks, page, place

COLUMN = 3.25  # inches
FONT = 8  # points, in a column
IMAGES, ROWS, CLOUDS = 6, 10, 8  # of a page of a column: images of a row, rows, panels of samples
logging.getLogger("fontTools").setLevel(logging.WARNING)  # which tells of each table of each font
Chart = LineChart | BarChart | CloudChart | Gallery


def write_figures(plot: Chart | Figure, path: Path) -> None:
    """Write `path` with the endings .png, .svg and .pdf; the same chart gives the same files.

    A matplotlib figure of a suite of your own keeps its size in all of them.
    """
    with matplotlib.rc_context({"svg.hashsalt": path.name, "pdf.fonttype": 42}):
        figure = plot if isinstance(plot, Figure) else _wide(plot)
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), dpi=130, metadata={"Date": None})
    small: dict[Any, Any] = {"font.size": FONT, "axes.titlesize": FONT, "axes.labelsize": FONT, "legend.fontsize": FONT}
    small |= {"xtick.labelsize": FONT, "ytick.labelsize": FONT, "pdf.fonttype": 42, "axes.linewidth": 0.6}
    with (
        matplotlib.rc_context(small),
        PdfPages(path.with_suffix(".pdf"), metadata={"CreationDate": None, "ModDate": None}) as pages,
    ):
        for sheet in [plot] if isinstance(plot, Figure) else _column(plot):
            pages.savefig(sheet, dpi=300)


def _wide(chart: Chart) -> Figure:
    """All panels in one figure."""
    if isinstance(chart, LineChart):
        return _wide_lines(chart)
    if isinstance(chart, BarChart):
        return _bars(chart, chart.panels, 8.5)
    if isinstance(chart, CloudChart):
        return _clouds(chart, chart.panels, 4, 2.7)
    return _gallery(chart, 0, len(chart.rows), chart.columns, chart.size)


def _column(chart: Chart) -> list[Figure]:
    """Pages of the width of a column."""
    if isinstance(chart, LineChart):
        return [_column_lines(chart, panel) for panel in chart.panels]
    if isinstance(chart, BarChart):
        return [_bars(chart, [panel], COLUMN) for panel in chart.panels]
    if isinstance(chart, CloudChart):
        pages = [chart.panels[k : k + CLOUDS] for k in range(0, len(chart.panels), CLOUDS)]
        return [_clouds(chart, panels, 2, COLUMN / 2) for panels in pages]
    columns = len(chart.titles) or min(IMAGES, chart.columns)
    return [
        _gallery(chart, k, min(k + ROWS, len(chart.rows)), columns, (COLUMN - 1.0) / columns, COLUMN)
        for k in range(0, len(chart.rows), ROWS)
    ]


# -- lines


def _wide_lines(chart: LineChart) -> Figure:
    number = len(chart.panels)
    columns = min(number, 3)
    rows = math.ceil(number / columns)
    width = 7.2 if number == 1 else 3.7 * columns
    figure = Figure(figsize=(width, 3.2 * rows + 0.22 * math.ceil(len(chart.names()) / 4) + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, chart.panels, strict=False):
        _draw_lines(axis, chart, panel, 4.5, 1.4)
        axis.title.set_fontsize(10)
    for axis in axes[number:]:
        axis.axis("off")
    _legend(figure, list(axes[:number]), chart, min(4, 2 * columns), 9)
    return figure


def _column_lines(chart: LineChart, panel: Panel) -> Figure:
    rows = math.ceil(len(panel.lines) / 2)
    figure = Figure(figsize=(COLUMN, 2.25 + 0.16 * rows), layout="constrained")
    axis = figure.subplots()
    _draw_lines(axis, chart, panel, 3.2, 1.0)
    _legend(figure, [axis], chart, 2, FONT)
    return figure


def _draw_lines(axis: Axes, chart: LineChart, panel: Panel, size: float, width: float) -> None:
    drawn = looks(chart.names(), chart.ours, chart.baselines)
    of_y = y_limits(chart, chart.panels if chart.same_y else [panel])
    for line in sorted(panel.lines, key=lambda line: drawn[line.name].is_strong):
        look = drawn[line.name]
        style = _style(look, size, width)
        if line.level:
            y = line.points[0][1]
            style["linestyle"] = (0, tuple(d / 2 for d in level_dash(look)))
            if not of_y[0] <= y.value <= of_y[1]:  # `_write_beyond` says so; the legend has it
                axis.plot([], [], label=line.name, **style)
                continue
            axis.axhline(y.value, label=line.name, markevery=[1], clip_on=False, **style)
            if y.known:
                axis.axhspan(y.low, y.high, color=style["color"], alpha=0.08, linewidth=0)
            continue
        x, y = [x for x, _ in line.points], [y for _, y in line.points]
        if len(x) == 1:
            style["linestyle"] = "none"
        axis.plot(x, [value.value for value in y], label=line.name, **style)
        if len(x) > 1 and all(value.known for value in y):
            low, high = [value.low for value in y], [value.high for value in y]
            axis.fill_between(x, low, high, color=style["color"], alpha=0.14, linewidth=0)
        elif len(x) == 1 and y[0].known:
            axis.errorbar(x, [y[0].value], yerr=_error(y), color=style["color"], fmt="none", capsize=2)
    axis.set(xscale=chart.xscale, title=panel.title, xlabel=chart.xlabel, ylabel=chart.ylabel)
    axis.set_yscale(chart.yscale, **({"linthresh": chart.threshold} if chart.yscale == "symlog" else {}))
    axis.set(xlim=x_limits(chart, [panel]), ylim=of_y)
    _write_beyond(axis, chart, panel, of_y, size)
    axis.grid(alpha=0.25, linewidth=0.6)
    points = sorted({x for line in panel.lines if not line.level for x, _ in line.points})
    marked = points if chart.ticks_at_points and len(points) < 12 else []
    if chart.xscale == "log":
        log_ticks(axis.xaxis, 6, marked)
    elif marked:
        axis.set_xticks(marked, [f"{x:g}" for x in marked])
    if chart.yscale == "log":
        log_ticks(axis.yaxis, 7)


def _write_beyond(axis: Axes, chart: LineChart, panel: Panel, of_y: tuple[float, float], size: float) -> None:
    """Arrows at the edge for values beyond the axis, and the values in words."""
    drawn = looks(chart.names(), chart.ours, chart.baselines)
    for line in panel.lines:
        for x, y in line.points:
            if of_y[0] <= y.value <= of_y[1] or not math.isfinite(y.value):
                continue
            up, place = y.value > of_y[1], axis.get_xlim()[1] if line.level else x
            axis.plot(
                [place], [of_y[up]], marker="^" if up else "v", markersize=1.4 * size, clip_on=False, zorder=6,
                color=COLOURS[drawn[line.name].colour][0],
            )  # fmt: skip
    if outside := beyond(panel, of_y):
        text, font = "\n".join(["beyond the axis:", *outside]), FONT - 1
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}
        axis.text(0.98, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=font, bbox=box, zorder=7)


def _style(look: Look, size: float, width: float) -> dict[str, Any]:
    strong = 1.7 if look.is_strong else 1.0
    return {
        "color": COLOURS[look.colour][0], "marker": look.marker, "markersize": size * (1.2 if look.is_strong else 1.0),
        "linewidth": width * strong, "linestyle": (0, tuple(d / 2 for d in look.dash)) if look.dash else "-",
        "zorder": 4 if look.is_strong else 3,
    }  # fmt: skip


def _error(values: Sequence[Interval]) -> list[list[float]]:
    return [[y.value - y.low for y in values], [y.high - y.value for y in values]]


def _legend(figure: Figure, axes: Sequence[Axes], chart: LineChart, columns: int, size: float) -> None:
    """One for all axes, under them, in the order of the chart's names."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [name for name in chart.names() if name in handles]
    if not names:
        return
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=size,
        frameon=False, handlelength=2.2, columnspacing=1.0,
    )  # fmt: skip


# -- bars, samples, images


def _bars(chart: BarChart, panels: Sequence[BarPanel], width: float) -> Figure:
    rows, small = [len(panel.bars) for panel in panels], width == COLUMN
    figure = Figure(
        figsize=(width, (0.26 if small else 0.42) * sum(rows) + (0.75 if small else 1.2)), layout="constrained"
    )
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[max(1, n) for n in rows])[:, 0]
    ends = limits([n for panel in chart.panels for _, y in panel.bars for n in (y.value, y.high)], "linear")
    for axis, panel in zip(axes, panels, strict=True):
        values = [y for _, y in panel.bars]
        colours = [COLOURS["ours" if name in chart.ours else "m1"][0] for name, _ in panel.bars]
        spread = _error(values) if all(y.known for y in values) else None
        axis.barh(range(len(values)), [y.value for y in values], xerr=spread, color=colours, height=0.7, capsize=2)
        axis.set_yticks(range(len(values)), [name for name, _ in panel.bars], fontsize=FONT if small else 9)
        axis.invert_yaxis()
        axis.axvline(panel.mark, color=COLOURS["baseline"][0], linewidth=0.9, linestyle="--")
        axis.set_title(panel.title, fontsize=FONT if small else 10, loc="left")
        axis.set_xlim(0, max(ends[1], *(p.mark * 1.05 for p in chart.panels)))
    axes[-1].set_xlabel(chart.xlabel)
    return figure


def _clouds(chart: CloudChart, panels: Sequence[Cloud], columns: int, size: float) -> Figure:
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(size * columns, (size + 0.15) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        if chart.background:
            axis.scatter(*zip(*chart.background, strict=True), s=size, linewidths=0, color="0.86", rasterized=True)
        for line in chart.contours:
            axis.plot(*zip(*line, strict=True), color="0.35", linewidth=0.6)
        colour = COLOURS["ours" if panel.name in chart.ours else "m1"][0]
        if panel.points:
            points = zip(*panel.points[:2000], strict=True)
            axis.scatter(*points, s=1.8 * size, linewidths=0, alpha=0.65, color=colour, rasterized=True, zorder=3)
        axis.set_title(panel.name, fontsize=FONT if size < 2 else 9)
        axis.set(xlim=(-chart.limit, chart.limit), ylim=(-chart.limit, chart.limit), aspect="equal")
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return figure


def _gallery(chart: Gallery, begin: int, end: int, columns: int, size: float, width: float | None = None) -> Figure:
    """Rows of images with their names on the left; `width` of the figure in inches."""
    rows = chart.rows[begin:end]
    columns = max(1, min(columns, *(len(row.images) for row in rows)))
    font, gap = FONT if width else 9, 0.025 * size
    line = 1.2 * font / 72  # inches
    names = [textwrap.fill(row.name, 26 if width is None else 16, max_lines=6) for row in rows]
    names = ["\n".join(text for text in (name, row.note) if text) for name, row in zip(names, rows, strict=True)]
    heights = [max(size, line * (1 + name.count("\n"))) + gap for name in names]
    titles = [str(title) for title in chart.titles[:columns]]
    head = line * max((1 + title.count("\n") for title in titles), default=0) + gap
    longest = max(len(text) for name in names for text in name.split("\n"))
    full = width or size * columns + min(2.0, 0.15 + 0.6 * longest * font / 72)
    figure, axis = page(full, sum(heights) + head)
    left, y = full - size * columns, head
    for j, title in enumerate(titles):
        axis.text(left + (j + 0.5) * size, head - gap, title, fontsize=font - 1, ha="center", va="bottom")
    for name, row, height in zip(names, rows, heights, strict=True):
        images = [decoded(image) if isinstance(image, str) else image for image in row.images[:columns]]
        for j, image in enumerate(images):
            place(axis, image.clamp(0, 1), left + j * size + gap / 2, y + (height - size) / 2, size - gap)
        axis.text(left - 0.06, y + height / 2, name, fontsize=font, ha="right", va="center")
        y += height
    return figure
