"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from mfm_benchmarks.charts import BarChart, CloudChart, Gallery, Interval, LineChart
from mfm_lightning.metrics.measured import Measured, rounded

SUMMARY = 3  # sentences


@dataclass
class Drawing:
    """The SVG of a matplotlib figure, as it was stored."""

    svg: str


Plot = LineChart | BarChart | CloudChart | Gallery | Figure | Drawing


@dataclass
class Summary:
    """Sentences for the top of the page, the most important first. The page takes three: where several parts of a suite
    have a summary, the first sentence of each, then the second ones."""

    sentences: Sequence[str]


@dataclass
class Headline:
    """The main results: a few words each with a number, shown large."""

    items: Sequence[tuple[str, str]]


@dataclass
class Text:
    """A heading with paragraphs."""

    heading: str
    paragraphs: Sequence[str] = ()


@dataclass
class Claims:
    """Statements that intervals decided, one a line."""

    heading: str
    lines: Sequence[str]


@dataclass
class Picture:
    """A chart, images, or a matplotlib figure; written as PNG, SVG and PDF.

    Attributes:
        name: of the files.
    """

    name: str
    title: str
    plot: Plot
    caption: str = ""


@dataclass
class Table:
    """Rows of equal keys, written as CSV and JSON.

    A `Measured` is a value with its interval: one cell of the page, three columns of the files.

    Attributes:
        folded: shown on a click.
        keys: columns that identify a row, by which the rows of two runs are paired; those of text where empty.
        only: for each row, the beginning of the names of the results that it is of, for a command that computes it
            alone; empty where it needs all of them.
    """

    name: str
    title: str
    rows: Sequence[dict[str, Any]]
    caption: str = ""
    folded: bool = False
    keys: Sequence[str] = ()
    only: Sequence[str] = ()

    def plain(self) -> list[dict[str, Any]]:
        """The rows for files: numbers in full."""
        found = []
        for row in self.rows:
            flat: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, Measured | Interval):
                    flat |= {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
                else:
                    flat[key] = value
            found.append(flat)
        return found

    def columns(self) -> list[str]:
        """Of all rows, in their order."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def shown(self) -> list[list[TableCell]]:
        """The rows for the page."""
        return [[table_cell(row.get(column)) for column in self.columns()] for row in self.rows]


@dataclass
class Pair:
    """Two pictures beside each other, of two runs; None where one has no such picture."""

    title: str
    left: Picture | None
    right: Picture | None


Block = Summary | Headline | Text | Claims | Picture | Table | Pair


@dataclass(frozen=True)
class TableCell:
    """A cell of the page: its text, the interval beside it, and what it is sorted by (None for text)."""

    text: str
    interval: str = ""
    key: float | None = None


def table_cell(value: Any) -> TableCell:
    """How a value of a row is shown."""
    if value is None:
        return TableCell("")
    if isinstance(value, Measured | Interval):
        number = Interval.of(value)
        ends = f"{rounded(number.low)} to {rounded(number.high)}" if number.known else ""
        return TableCell(rounded(number.value), ends, number.value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return TableCell(str(value))
    return TableCell(f"{value:,}" if isinstance(value, int) else rounded(value), "", float(value))


@dataclass
class Page:
    """A report before it is written.

    Attributes:
        suite: its name, by which two runs are known to be of the same one.
        command: what was typed; `environment` says where.
        methods: settings of each method, by its name.
        noise: what the noise of the samples is made from; two runs with the same are compared sample by sample.
    """

    title: str
    about: str
    blocks: list[Block] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    intervals: str = ""
    missing: list[str] = field(default_factory=list)
    suite: str = ""
    command: str = ""
    methods: dict[str, Any] = field(default_factory=dict)
    noise: str = ""

    def summary(self) -> list[str]:
        """At most three sentences."""
        parts = [block.sentences for block in self.blocks if isinstance(block, Summary)]
        turns = max(map(len, parts), default=0)
        return [part[k] for k in range(turns) for part in parts if k < len(part)][:SUMMARY]
