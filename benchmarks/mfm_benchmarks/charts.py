"""What a chart shows, as numbers. `page.svg` draws it on the page, and `page.figures` writes it as PNG, SVG and PDF."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mfm_lightning.metrics.measured import Measured, rounded

MARKERS = "osD^vPXh"  # as matplotlib names them
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2), (8, 3, 2, 3))
# The method of interest has the strong colour, the baseline that of the text, and all others have muted ones. Lines
# also differ in marker and dash, so that no reader depends on colour. Both themes: on white, and on the dark page.
COLOURS = {
    "ours": ("#1558d6", "#7db2ff"),
    "baseline": ("#33393f", "#d5d9de"),
    "m0": ("#97713a", "#c9a46c"),
    "m1": ("#71808c", "#93a3b0"),
    "m2": ("#9b6b8d", "#bd94b1"),
    "m3": ("#6a8562", "#94ae8c"),
    "m4": ("#a56c5c", "#cd9a8b"),
    "m5": ("#7d7f45", "#a8aa70"),
}
MUTED = tuple(name for name in COLOURS if name.startswith("m"))


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its 95 % interval; nan where it has none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, number: Measured | Interval | float) -> Interval:
        """The number that a report shows."""
        if isinstance(number, Interval):
            return number
        return cls(number.value, number.low, number.high) if isinstance(number, Measured) else cls(float(number))

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def text(self, digits: int = 3) -> str:
        """`value (low to high)`, or the value alone."""
        if not self.known:
            return rounded(self.value, digits)
        return f"{rounded(self.value, digits)} ({rounded(self.low, digits)} to {rounded(self.high, digits)})"

    def minus(self, other: Interval) -> Interval:
        """The difference of independent numbers, with the interval that follows from both (Zou and Donner, 2008).

        Where both were made from the same noise, they are not independent, and the interval is wider than it need be.
        """
        gap = self.value - other.value
        low = gap - math.hypot(self.value - self.low, other.high - other.value)
        return Interval(gap, low, gap + math.hypot(self.high - self.value, other.value - other.low))

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is above or below zero; 0 where it contains zero, or there is none."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Line:
    """A line of a panel: pairs of x and y; with `level` one y for all x, drawn across the panel."""

    name: str
    points: Sequence[tuple[float, Interval]]
    level: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes."""

    title: str
    lines: Sequence[Line]


@dataclass
class LineChart:
    """Panels beside each other.

    Attributes:
        xscale, yscale: linear, log, or (y) symlog, which is linear below `threshold`.
        same_y: whether all panels have one scale.
        ticks_at_points: whether few points have the ticks of the x axis.
        ours, baselines: names of the lines that are drawn strongly, and in the colour of the text.
    """

    panels: Sequence[Panel]
    xlabel: str
    ylabel: str
    xscale: str = "linear"
    yscale: str = "linear"
    same_y: bool = True
    ticks_at_points: bool = True
    ours: Sequence[str] = ()
    baselines: Sequence[str] = ()
    threshold: float = 1e-3

    def levels(self) -> set[str]:
        """Names of the lines that are drawn across in all their panels."""
        lines = [line for panel in self.panels for line in panel.lines]
        return {line.name for line in lines if line.level} - {line.name for line in lines if not line.level}

    def names(self) -> list[str]:
        """Of all lines: ours first, baselines next."""
        found = list(dict.fromkeys(line.name for panel in self.panels for line in panel.lines))
        return sorted(found, key=lambda name: (name not in self.ours, name not in self.baselines))


@dataclass(frozen=True)
class BarPanel:
    """Horizontal bars with a line at `mark`."""

    title: str
    bars: Sequence[tuple[str, Interval]]
    mark: float


@dataclass
class BarChart:
    """Panels below each other; `ours` are drawn strongly."""

    panels: Sequence[BarPanel]
    xlabel: str
    ours: Sequence[str] = ()
    mark_label: str = ""


@dataclass(frozen=True)
class Cloud:
    """Samples `(x, y)` of a panel."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass
class CloudChart:
    """Samples in two dimensions over contours of a density.

    Attributes:
        contours: lines of points, the same in all panels.
        background: samples drawn in grey.
        limit: of both axes.
        ours: names of the panels that are drawn strongly.
    """

    panels: Sequence[Cloud]
    contours: Sequence[Sequence[tuple[float, float]]]
    background: Sequence[tuple[float, float]]
    limit: float
    ours: Sequence[str] = ()


@dataclass(frozen=True)
class Strip:
    """A row of images `(B, C, H, W)` in [0, 1], with its name and a note such as a score; as data URIs once stored."""

    name: str
    images: Tensor | list[str]
    note: str = ""


@dataclass
class Gallery:
    """Rows of images.

    Attributes:
        titles: of the columns; empty where columns are noise.
        size: of an image in files, in inches.
        ours: names of rows, or titles of columns, that are marked.
    """

    rows: Sequence[Strip]
    titles: Sequence[str] = ()
    size: float = 0.8
    ours: Sequence[str] = ()
    columns: int = field(default=12)


@dataclass(frozen=True)
class Look:
    """How a line is drawn: its colour's name in `COLOURS`, its marker, and its dash."""

    colour: str
    marker: str
    dash: tuple[float, ...]

    @property
    def is_strong(self) -> bool:
        return self.colour == "ours"


def level_dash(look: Look) -> tuple[float, ...]:
    """The dash of a line across the panel, which is never solid: lines with points are."""
    levels = dict(zip(DASHES, ((7.0, 4.0), (3.0, 3.0), (1.5, 3.0), (10.0, 3.0, 2.0, 3.0)), strict=True))
    return levels[look.dash]


def looks(names: Sequence[str], ours: Collection[str] = (), baselines: Collection[str] = ()) -> dict[str, Look]:
    """A look for each name: ours in one colour with different dashes, baselines in the text's colour, others muted."""
    found, counts = {}, {"ours": 0, "baseline": 0, "muted": 0}
    for name in names:
        kind = "ours" if name in ours else "baseline" if name in baselines else "muted"
        k = counts[kind]
        counts[kind] += 1
        colour = MUTED[k % len(MUTED)] if kind == "muted" else kind
        turn = k // len(MUTED) if kind == "muted" else k
        found[name] = Look(colour, MARKERS[k % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def family(ours: str, names: Sequence[str]) -> list[str]:
    """The method that claims are about, and those of its kind: for MFM-G also MFM-GF and MFM-Search."""
    kind, dash, _ = ours.partition("-")
    return [name for name in names if name == ours or (dash and name.startswith(f"{kind}-"))]
