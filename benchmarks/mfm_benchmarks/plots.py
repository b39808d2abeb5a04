"""Figures of the reports; each function makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mfm_benchmarks.parts.entry import Entry
from mfm_lightning.metrics.measured import Measured
from mfm_lightning.utils.figures import log_ticks

MARKERS = "osD^vP*Xh<>d"


def style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and marker for each name, by its place."""
    colours = [*matplotlib.color_sequences["tab10"], *matplotlib.color_sequences["Dark2"]]
    return {
        name: {"color": colours[i % len(colours)], "marker": MARKERS[i % len(MARKERS)]} for i, name in enumerate(names)
    }


def line(axis: Axes, x: Sequence[float], y: Sequence[Measured], label: str, **look: Any) -> None:
    """Values joined by a line, their intervals shaded; error bars where there is only one."""
    if not y:
        return
    values, low, high = [m.value for m in y], [m.low for m in y], [m.high for m in y]
    if len(y) == 1:
        error = [[values[0] - low[0]], [high[0] - values[0]]]
        axis.errorbar(x, values, yerr=error, linestyle="none", markersize=5, capsize=2, label=label, **look)
        return
    axis.plot(x, values, markersize=4, linewidth=1.4, label=label, **look)
    axis.fill_between(x, low, high, color=look.get("color"), alpha=0.15, linewidth=0)


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend for all axes, under them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def few_labels(axes: Iterable[Axes], marked: Mapping[Axes, Iterable[float]] | None = None) -> None:
    """`log_ticks` of what is logarithmic; called when all is drawn.

    Args:
        marked: x by the axes; where they are few, they have the ticks.
    """
    for axis in axes:
        if axis.get_xscale() == "log":
            ticks = sorted((marked or {}).get(axis, ()))
            log_ticks(axis.xaxis, 6, ticks if len(ticks) < 12 else ())
        if axis.get_yscale() == "log":
            log_ticks(axis.yaxis, 8)


def curves(entries: Mapping[str, Sequence[Entry]], scales: Sequence[float]) -> Figure:
    """Mean reward by evaluations a sample: a row a reward, a column a lambda."""
    return _grid(entries, scales, lambda e: e.nfe, lambda e: e.reward, "NFE a sample", "mean reward", xscale="log")


def hacking(entries: Mapping[str, Sequence[Entry]], scales: Sequence[float]) -> Figure:
    """Fréchet distance by mean reward: a row a reward, a column a lambda."""

    def distance(entry: Entry) -> Measured:
        if entry.frechet is None:
            raise ValueError(f"{entry.name} has no Fréchet distance: measure it, with the suite's quality")
        return entry.frechet

    return _grid(entries, scales, lambda e: e.reward.value, distance, "mean reward", "Fréchet distance", yscale="log")


def _grid(
    entries: Mapping[str, Sequence[Entry]],
    scales: Sequence[float],
    across: Callable[[Entry], float],
    up: Callable[[Entry], Measured],
    xlabel: str,
    ylabel: str,
    xscale: str = "linear",
    yscale: str = "linear",
) -> Figure:
    looks = style(list(dict.fromkeys(e.method for found in entries.values() for e in found)))
    R, C = len(entries), len(scales)
    figure = Figure(figsize=(3.7 * max(C, 2), 3.1 * R + 1.0), layout="constrained")
    axes = figure.subplots(R, C, squeeze=False, sharey="row")
    for row, (reward, found) in zip(axes, entries.items(), strict=True):
        for axis, scale in zip(row, scales, strict=True):
            for method, look in looks.items():
                points = [e for e in found if e.method == method and e.scale in (None, scale)]
                line(axis, [across(e) for e in points], [up(e) for e in points], method, **look)
            axis.set(xscale=xscale, yscale=yscale, title=f"{reward}, λ = {scale:g}", xlabel=xlabel)
            axis.title.set_fontsize(10)
            axis.grid(alpha=0.25)
        row[0].set_ylabel(ylabel)
        if yscale == "log":  # an interval may reach below zero
            row[0].set_ylim(bottom=0.7 * min(up(e).value for e in found))
    few_labels(axes.flatten())
    legend_below(figure, axes.flatten(), 4 if C > 1 else 3)
    return figure


def gallery(
    rows: Sequence[tuple[str, Tensor]], columns: int = 12, titles: Sequence[str] = (), size: float = 0.8
) -> Figure:
    """Images `(B, C, H, W)` in [0, 1], a row for each caption.

    titles: of the columns; size: of an image, in inches.
    """
    columns = min(columns, min(len(images) for _, images in rows))
    figure = Figure(figsize=(size * columns + 2.0, 1.025 * size * len(rows) + 0.3 * bool(titles)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8)
    for line_, (caption, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line_, images, strict=False):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        line_[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def clouds(
    panels: Mapping[str, Tensor],
    log_density: Callable[[Tensor], Tensor],
    exact: Tensor,
    background: Tensor,
    columns: int = 4,
    limit: float = 5.5,
) -> Figure:
    """Samples `(N, 2)` by name over contours of a density that hold 50, 90 and 99 % of it.

    Args:
        log_density: `(M, 2) -> (M,)`.
        exact: its samples, which say where the contours are.
        background: samples drawn in grey.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.85 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    ticks = torch.linspace(-limit, limit, 220)
    grid = torch.cartesian_prod(ticks, ticks)
    height = log_density(grid).reshape(len(ticks), len(ticks)).T
    levels = log_density(exact).quantile(torch.tensor([0.01, 0.1, 0.5], dtype=exact.dtype)).tolist()
    for axis, (name, x) in zip(axes, panels.items(), strict=False):
        axis.scatter(*background.T, s=1.5, linewidths=0, color="0.87", rasterized=True)
        axis.contour(ticks, ticks, height, levels=levels, colors="0.35", linewidths=0.7)
        axis.scatter(x[:2000, 0], x[:2000, 1], s=5, linewidths=0, alpha=0.6, rasterized=True)
        axis.set_title(name, fontsize=9)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return figure


def lines(
    panels: Mapping[str, Mapping[str, Measured | Sequence[tuple[float, Measured]]]],
    xlabel: str,
    ylabel: str,
    xscale: str = "log",
    yscale: str = "linear",
    size: tuple[float, float] = (3.5, 3.9),
    sharey: bool = True,
    mark: bool = True,
) -> Figure:
    """A panel for each name; its lines are points `(x, value)`, or one value for all x, drawn across with its interval.

    size: of a panel, in inches; sharey: whether the panels have one scale; mark: whether few points have the ticks of a
    logarithmic axis.
    """
    looks = style(list(dict.fromkeys(name for found in panels.values() for name in found)))
    C = len(panels)
    figure = Figure(figsize=(max(size[0] * C, 7.0), size[1]), layout="constrained")
    axes = figure.subplots(1, C, squeeze=False, sharey=sharey)[0]
    marked: dict[Axes, set[float]] = {}
    for axis, (title, found) in zip(axes, panels.items(), strict=True):
        ticks = marked[axis] = set()
        for name, values in found.items():
            if isinstance(values, Measured):
                colour = looks[name]["color"]
                axis.axhline(values.value, color=colour, linestyle="--", linewidth=1.2, label=name)
                axis.axhspan(values.low, values.high, color=colour, alpha=0.08, linewidth=0)
                continue
            ticks |= {x for x, _ in values}
            line(axis, [x for x, _ in values], [y for _, y in values], name, **looks[name])
        axis.set(xscale=xscale, yscale=yscale, title=title, xlabel=xlabel)
        if xscale != "log" and ticks and len(ticks) < 12:
            axis.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(ylabel)
    if yscale == "log":  # an interval may reach below zero
        values = [m for found in panels.values() for v in found.values() for m in _all(v) if m.value > 0]
        if values:
            axes[0].set_ylim(bottom=0.6 * min(m.value for m in values))
    few_labels(axes, marked if mark else None)
    legend_below(figure, axes, 3)
    return figure


def bars(
    panels: Mapping[str, Mapping[str, Measured]], colour: Callable[[str], Any], mark: Mapping[str, float], xlabel: str,
    dashed: bool = False,
) -> Figure:  # fmt: skip
    """Horizontal bars with their intervals, a panel each, its title over it; a line at the panel's `mark`."""
    rows = [len(values) for values in panels.values()]
    figure = Figure(figsize=(8.5, 0.42 * sum(rows) + 1.2), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        spread = [[m.value - m.low for m in values.values()], [m.high - m.value for m in values.values()]]
        lengths, colours = [m.value for m in values.values()], [colour(name) for name in values]
        axis.barh(range(len(values)), lengths, xerr=spread, color=colours, height=0.7, capsize=2)
        axis.set_yticks(range(len(values)), values, fontsize=9)
        axis.invert_yaxis()
        axis.axvline(mark[title], color="black", linewidth=0.8, linestyle="--" if dashed else "-")
        axis.set_title(title, fontsize=10, loc="left")
    axes[-1].set_xlabel(xlabel)
    return figure


def by_steps(
    found: Mapping[tuple[float, str], Measured],
    times: Sequence[float],
    kinds: Mapping[str, Sequence[int]],
    cost: Mapping[tuple[float, str], float],
    ylabel: str,
    extra: Callable[[Measured], Measured | Sequence[tuple[float, Measured]]],
    extra_name: str,
    yscale: str = "linear",
) -> Figure:
    """Numbers by the network evaluations of a draw, a panel for each outer time.

    Args:
        found: by time and name, such as "MFM 4".
        kinds: names and their steps.
        cost: evaluations of a draw, by time and name.
        extra: how the further number `extra_name` is drawn, as a value of `lines`.
    """
    panels = {}
    for t in times:
        panel: dict[str, Any] = {
            kind: [(cost[t, name], found[t, name]) for k in steps if (t, name := f"{kind} {k}") in found]
            for kind, steps in kinds.items()
        }
        if (t, extra_name) in found:
            panel[extra_name] = extra(found[t, extra_name])
        panels[f"t = {t:g}"] = panel
    return lines(panels, "network evaluations of a draw", ylabel, yscale=yscale)


def _all(values: Measured | Sequence[tuple[float, Measured]]) -> list[Measured]:
    return [values] if isinstance(values, Measured) else [y for _, y in values]
