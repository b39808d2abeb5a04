"""What a report is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure as Plot

from mfm_lightning.metrics.measured import Measured, rounded


@dataclass
class Headline:
    """The one thing to take away: a few words each with a number, shown large."""

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
    """A figure, written as PNG and SVG. name: of the files."""

    name: str
    title: str
    plot: Plot
    caption: str = ""


@dataclass
class Table:
    """Rows of equal keys, written as CSV and JSON.

    A `Measured` is a value with its interval: one cell of the page, three columns of the files.
    """

    name: str
    title: str
    rows: Sequence[dict[str, Any]]
    caption: str = ""
    folded: bool = False  # shown on a click

    def plain(self) -> list[dict[str, Any]]:
        """The rows for files: numbers in full."""
        found = []
        for row in self.rows:
            flat: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, Measured):
                    flat |= {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
                else:
                    flat[key] = value
            found.append(flat)
        return found

    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def shown(self) -> list[list[tuple[str, float | None]]]:
        """The rows for the page, each cell its text and what it is sorted by."""
        return [[_cell(row.get(column)) for column in self.columns()] for row in self.rows]


Block = Headline | Text | Claims | Picture | Table


def _cell(value: Any) -> tuple[str, float | None]:
    if value is None:
        return "", None
    if isinstance(value, Measured):
        return value.text(), value.value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value), None
    return (f"{value:,}" if isinstance(value, int) else rounded(value)), float(value)


@dataclass
class Page:
    """A report before it is written."""

    title: str
    about: str
    blocks: list[Block] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    intervals: str = ""
    missing: list[str] = field(default_factory=list)
