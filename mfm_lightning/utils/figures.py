"""Figures that several parts draw; each function writes one file."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure with one axis of its whole size, in inches from its upper left corner, for `place`.

    Axes for each image would take seconds to lay out, where there are a hundred.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0.0, width), ylim=(height, 0.0))
    axis.axis("off")
    return figure, axis


def place(axis: Axes, image: Tensor, x: float, y: float, size: float) -> None:
    """Draw an image `(C, H, W)` in [0, 1], as large as fits a square of `size` inches, in its middle.

    Args:
        axis: of `page`.
        image: grey or colour.
        x: of the square's upper left corner.
        y: of the same corner.
        size: of the square.
    """
    H, W = image.shape[-2:]
    width, height = size * min(1.0, W / H), size * min(1.0, H / W)
    left, top = x + (size - width) / 2, y + (size - height) / 2
    pixels = image.detach().cpu().float().permute(1, 2, 0).squeeze(-1).numpy()
    ends = (left, left + width, top + height, top)
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=ends, aspect="auto")


def image_grid(
    rows: Tensor,
    path: str | Path,
    title: str,
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    size: float = 0.7,
) -> None:
    """Images in [0, 1], `(R, C, channels, H, W)`, as a grid.

    Args:
        columns: names of the first columns.
        captions: lines above each image, R rows of C.
        size: width of an image in inches.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    R, C = rows.shape[:2]
    lines = 0 if captions is None else 1 + max(text.count("\n") for row in captions for text in row)
    width = max(size * C, 4.0)
    title = "\n".join(
        textwrap.fill(line, int(13.4 * width)) for line in title.split("\n")
    )  # letters an inch, of 10 points
    head = 0.13 + 0.17 * (1 + title.count("\n")) + (0.2 if len(columns) else 0.0)
    gap, above = 0.06, 0.13 * lines
    height = (size + above) * R + head + gap
    figure, axis = page(width, height)
    begin = (width - size * C) / 2
    for i in range(R):
        y = head + i * (size + above) + above
        for j in range(C):
            x = begin + j * size
            place(axis, rows[i, j], x + gap / 2, y, size - gap)
            if captions is not None and captions[i][j]:
                alone = j + 1 < C and not captions[i][j + 1]  # there is room to its right
                at, side = (x + gap / 2, "left") if alone else (x + size / 2, "center")
                axis.text(at, y - 0.02, captions[i][j], fontsize=7, ha=side, va="bottom", linespacing=1.05)
            elif captions is None and i == 0 and j < len(columns):
                axis.text(x + size / 2, y - 0.04, columns[j], fontsize=9, ha="center", va="bottom")
    axis.text(width / 2, 0.06, title, fontsize=10, ha="center", va="top")
    figure.savefig(path, dpi=130)


def pairs_in_rows(
    pairs: Tensor, captions: Sequence[Sequence[str]], path: str | Path, title: str, columns: int = 4
) -> None:
    """Pairs of images `(B, 2, C, H, W)`, so many beside each other, with a caption above each image; the last row may
    have fewer."""
    width = min(columns, len(pairs))
    missing = -len(pairs) % width
    pairs = torch.cat([pairs, pairs.new_ones(missing, *pairs.shape[1:])])
    captions = [*captions, *[["", ""]] * missing]
    grid = pairs.reshape(len(pairs) // width, 2 * width, *pairs.shape[2:])
    text = [[one for pair in captions[k : k + width] for one in pair] for k in range(0, len(pairs), width)]
    image_grid(grid, path, title, captions=text, size=1.5)


def before_after(
    before: Tensor, after: Tensor, scores: tuple[Tensor, Tensor], path: str | Path, title: str, columns: int = 8
) -> None:
    """Images `(B, C, H, W)` in pairs, the first above the second, each with its score; `scores` are two `(B,)`."""
    columns = min(columns, len(before))
    num = len(before) // columns * columns
    rows, captions = [], []
    for begin in range(0, num, columns):
        for images, values in zip((before, after), scores, strict=True):
            rows.append(images[begin : begin + columns])
            captions.append([f"{v:.3g}" for v in values[begin : begin + columns].tolist()])
    image_grid(torch.stack(rows), path, title, captions=captions)


def scatter(points: Mapping[str, Tensor], path: str | Path, title: str) -> None:
    """The first two coordinates of samples `(B, D)` by name, side by side on the same axes."""
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4 * len(points), 4.2), layout="constrained")
    axes = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (name, x) in zip(axes, points.items(), strict=True):
        x = x.detach().cpu().flatten(1)
        axis.scatter(x[:, 0], x[:, 1], s=4, linewidths=0, alpha=0.6)
        axis.set(title=name, aspect="equal")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def log_ticks(axis: Axis, most: int, marked: Sequence[float] = ()) -> None:
    """Label a logarithmic axis, whose limits are set, with no more numbers than fit: matplotlib labels within a decade
    all that are round, one over the other.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        most: labels that fit on it.
        marked: what has a tick, in place of round numbers; one too near to the label before it has none.
    """
    low, high = sorted(axis.get_view_interval())
    ticks, labels, last = sorted(marked) or round_numbers(low, high, most), [], -math.inf
    apart = math.log(high / low) / most if marked else 0.0
    for tick in ticks:
        far = math.log(tick) - last >= apart
        labels.append(_number(tick) if far else "")
        last = math.log(tick) if far else last
    axis.set_ticks(ticks, labels)
    axis.set_ticks([], minor=True)
    axis.set_view_interval(low, high, ignore=True)  # ticks outside would widen it


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers from low to high, both positive, for a logarithmic axis: of 1, 2, ..., 9 times the
    powers of ten as many as there is room for; equal steps where fewer than two of them lie between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        found = [float(f"{digit}e{power}") for power in powers for digit in digits]
        found = [number for number in found if low <= number <= high]
        if len(found) < 2:
            break
        nearest = min(after / before for before, after in itertools.pairwise(found))
        if len(found) <= most and math.log(nearest) * 1.3 * most >= math.log(high / low):
            return found
    if len(found) > most:  # of many decades every second, third, ...
        return found[:: math.ceil(len(found) / most)]
    from matplotlib.ticker import MaxNLocator

    return [float(number) for number in MaxNLocator(most - 1).tick_values(low, high) if low <= number <= high]


def _number(value: float) -> str:
    power = round(math.log10(value))
    return f"{value:g}" if -4 <= power <= 4 or not math.isclose(value, 10.0**power) else f"$10^{{{power}}}$"
