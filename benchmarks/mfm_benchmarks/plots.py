"""Charts of measured numbers; each function makes one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import contourpy
import torch
from torch import Tensor

from mfm_benchmarks.charts import (
    BarChart,
    BarPanel,
    Cloud,
    CloudChart,
    Gallery,
    Interval,
    Line,
    LineChart,
    Panel,
    Strip,
    family,
)
from mfm_benchmarks.parts.entry import Entry
from mfm_lightning.metrics.measured import Measured

Values = Measured | Sequence[tuple[float, Measured]]


def curves(
    entries: Mapping[str, Sequence[Entry]], scales: Sequence[float], ours: str = "", baseline: str = ""
) -> LineChart:
    """Mean reward by evaluations a sample: a panel for each reward and lambda."""
    return _grid(entries, scales, lambda e: e.nfe, lambda e: e.reward, "NFE per sample", "mean reward", ours, baseline)


def hacking(
    entries: Mapping[str, Sequence[Entry]], scales: Sequence[float], ours: str = "", baseline: str = ""
) -> LineChart:
    """Fréchet distance by mean reward: a panel for each reward and lambda."""

    def distance(entry: Entry) -> Measured:
        if entry.frechet is None:
            raise ValueError(f"{entry.name} has no Fréchet distance: measure it, with the suite's quality")
        return entry.frechet

    chart = _grid(
        entries, scales, lambda e: e.reward.value, distance, "mean reward", "Fréchet distance", ours, baseline
    )
    chart.xscale, chart.yscale, chart.ticks_at_points = "linear", "log", False
    return chart


def _grid(
    entries: Mapping[str, Sequence[Entry]],
    scales: Sequence[float],
    across: Callable[[Entry], float],
    up: Callable[[Entry], Measured],
    xlabel: str,
    ylabel: str,
    ours: str,
    baseline: str,
) -> LineChart:
    methods = list(dict.fromkeys(e.method for found in entries.values() for e in found))
    panels = []
    for reward, found in entries.items():
        for scale in scales:
            lines = {
                method: [(across(e), up(e)) for e in found if e.method == method and e.scale in (None, scale)]
                for method in methods
            }
            panels.append(
                _panel(f"{reward}, λ = {scale:g}", {name: points for name, points in lines.items() if points})
            )
    return LineChart(
        panels, xlabel, ylabel, xscale="log", same_y=False, ticks_at_points=False, ours=family(ours, methods),
        baselines=[baseline] if baseline in methods else [],
    )  # fmt: skip


def _panel(title: str, found: Mapping[str, Values]) -> Panel:
    lines = []
    for name, values in found.items():
        if isinstance(values, Measured):
            lines.append(Line(name, [(0.0, Interval.of(values))], level=True))
        elif values:
            lines.append(Line(name, [(float(x), Interval.of(y)) for x, y in values]))
    return Panel(title, lines)


def gallery(
    rows: Sequence[tuple[str, Tensor]],
    columns: int = 12,
    titles: Sequence[str] = (),
    size: float = 0.8,
    ours: Collection[str] = (),
) -> Gallery:
    """Images `(B, C, H, W)` in [0, 1], a row for each caption: its first line is the name, its second a note.

    Args:
        columns: the most images of a row.
        titles: of the columns.
        size: of an image in files, in inches.
        ours: names that are marked.
    """
    strips = []
    for caption, images in rows:
        name, _, note = caption.partition("\n")
        strips.append(Strip(name, images.detach().cpu().float()[:columns], note))
    return Gallery(strips, list(titles), size, list(ours), columns)


def clouds(
    panels: Mapping[str, Tensor],
    log_density: Callable[[Tensor], Tensor],
    exact: Tensor,
    background: Tensor,
    limit: float = 5.5,
    ours: Collection[str] = (),
) -> CloudChart:
    """Samples `(N, 2)` by name over contours of a density that contain 50, 90 and 99 % of it.

    Args:
        log_density: `(M, 2) -> (M,)`.
        exact: its samples, which say where the contours are.
        background: samples drawn in grey.
        limit: of both axes.
        ours: names that are drawn strongly.
    """
    ticks = torch.linspace(-limit, limit, 220)
    height = log_density(torch.cartesian_prod(ticks, ticks)).reshape(len(ticks), len(ticks)).T
    levels = log_density(exact).quantile(torch.tensor([0.01, 0.1, 0.5], dtype=exact.dtype)).tolist()
    generator = contourpy.contour_generator(ticks.numpy(), ticks.numpy(), height.double().numpy())
    found: list[Any] = [line for level in levels for line in generator.lines(level)]
    contours = [
        _pairs(torch.as_tensor(line)[:: max(1, len(line) // 120)]) + _pairs(torch.as_tensor(line)[:1]) for line in found
    ]
    return CloudChart(
        [Cloud(name, _pairs(x[:2000])) for name, x in panels.items()], contours, _pairs(background), limit, list(ours)
    )


def _pairs(points: Tensor) -> list[tuple[float, float]]:
    return [(round(x, 3), round(y, 3)) for x, y in points.tolist()]


def lines(
    panels: Mapping[str, Mapping[str, Values]],
    xlabel: str,
    ylabel: str,
    xscale: str = "log",
    yscale: str = "linear",
    sharey: bool = True,
    mark: bool = True,
    ours: Collection[str] = (),
    baselines: Collection[str] = (),
) -> LineChart:
    """A panel for each name; its lines are points `(x, value)`, or one value for all x, drawn across with its interval.

    Args:
        sharey: whether the panels have one scale.
        mark: whether few points have the ticks of the x axis.
        ours: names that are drawn strongly; `baselines`: in the colour of the text.
    """
    made = [_panel(title, found) for title, found in panels.items()]
    return LineChart(made, xlabel, ylabel, xscale, yscale, sharey, mark, list(ours), list(baselines))


def bars(
    panels: Mapping[str, Mapping[str, Measured]], mark: Mapping[str, float], xlabel: str, ours: Collection[str] = ()
) -> BarChart:
    """Horizontal bars with their intervals, a panel each; a dashed line at the panel's `mark`."""
    made = [
        BarPanel(title, [(name, Interval.of(value)) for name, value in values.items()], mark[title])
        for title, values in panels.items()
    ]
    return BarChart(made, xlabel, list(ours))


def by_steps(
    found: Mapping[tuple[float, str], Measured],
    times: Sequence[float],
    kinds: Mapping[str, Sequence[int]],
    cost: Mapping[tuple[float, str], float],
    ylabel: str,
    extra: Callable[[Measured], Values],
    extra_name: str,
    yscale: str = "linear",
) -> LineChart:
    """Numbers by the network evaluations of a draw, a panel for each outer time of which there are some.

    Args:
        found: by time and name, such as "MFM 4".
        kinds: names and their steps; the first is drawn strongly.
        cost: evaluations of a draw, by time and name.
        extra: how the further number `extra_name` is drawn, as a value of `lines`.
    """
    panels = {}
    for t in times:
        panel: dict[str, Values] = {
            kind: [(cost[t, name], found[t, name]) for k in steps if (t, name := f"{kind} {k}") in found]
            for kind, steps in kinds.items()
        }
        if (t, extra_name) in found:
            panel[extra_name] = extra(found[t, extra_name])
        if any(panel.values()):  # some times may not be computed yet
            panels[f"t = {t:g}"] = panel
    first = next(iter(kinds), "")
    return lines(panels, "network evaluations per draw", ylabel, yscale=yscale, ours=[first], baselines=[extra_name])
