"""A page as HTML: one file that holds its style, its script, its charts and its images."""

from __future__ import annotations

import base64
import functools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from mfm_benchmarks.blocks import Block, Drawing, Headline, Page, Picture, Summary, Table, TableCell, table_cell
from mfm_benchmarks.charts import COLOURS, BarChart, CloudChart, Interval, LineChart, Strip, looks
from mfm_benchmarks.page import axes, svg
from mfm_benchmarks.page.glossary import Glossary
from mfm_benchmarks.page.stored import decoded, svg_of, uris

HERE = Path(__file__).parent
PIXELS = 64  # images of at most so many pixels are enlarged without smoothing


def render(page: Page) -> str:
    """The page as HTML text."""
    blocks = _with_ids([block for block in page.blocks if not isinstance(block, Summary)])
    ours = {name for _, block in blocks if isinstance(block, Picture) for name in getattr(block.plot, "ours", ())}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "kind_of": lambda block: type(block).__name__,
        "line_panels": _line_panels,
        "bar_panels": lambda chart: _marked(svg.bar_panels(chart)),
        "cloud_panels": _cloud_panels,
        "cloud_symbols": lambda chart, name: Markup(svg.cloud_symbols(chart, name)),
        "looks_of": lambda chart: looks(chart.names(), chart.ours, chart.baselines),
        "note": axes.note,
        "sample": lambda look, level: Markup(svg.legend_mark(look, level)),
        "numbers_of": _numbers,
        "images_of": lambda row: uris(row.images),
        "small": _is_small,
        "drawing": _drawing,
        "first_line": lambda text: text.rpartition("\n")[0].replace("\n", " ") or text,
        "other_lines": lambda text: text.rpartition("\n")[2] if "\n" in text else "",
        "strong": functools.partial(_is_strong, ours),
        "tone": _tone,
        "yaml": _yaml,
    }
    return environment.get_template("page.html.j2").render(
        page=page,
        summary=page.summary(),
        blocks=blocks,
        contents=_contents(page, blocks),
        again=shlex.join(_again(page.command)),
        glossary=Glossary(),
        css=Markup(_style()),
        script=Markup((HERE / "page.js").read_text()),
    )


def _style() -> str:
    """The style sheet, with the colours of `COLOURS` in both themes."""
    light, dark = ("".join(f"  --{name}: {pair[k]};" for name, pair in COLOURS.items()) for k in (0, 1))
    colours = "\n".join(f".{name} {{ --c: var(--{name}); }}" for name in COLOURS)
    text = (HERE / "page.css").read_text()
    for place, lines in (("LIGHT", light), ("DARK", dark), ("COLOURS", colours)):
        text = re.sub(rf"^{place}$", lines, text, flags=re.MULTILINE)
    return text


def _with_ids(blocks: Sequence[Block]) -> list[tuple[str, Block]]:
    """Each block with the id of its section."""
    found, taken = [], set[str]()
    for block in blocks:
        words = block.name if isinstance(block, Picture | Table) else _title(block)
        stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "part"
        if isinstance(block, Table):
            stem = f"table-{stem}"
        name = next(n for k in range(1, len(blocks) + 2) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
        taken.add(name)
        found.append((name, block))
    return found


def _title(block: Block) -> str:
    return str(getattr(block, "title", getattr(block, "heading", "")))


def _contents(page: Page, blocks: Sequence[tuple[str, Block]]) -> list[tuple[str, str]]:
    found = [("failures", "What failed")] if page.failures else []
    found += [("missing", "What is not computed yet")] if page.missing else []
    found += [(name, _title(block)) for name, block in blocks if not isinstance(block, Headline)]
    found += [("methods", "Settings of the methods")] if page.methods else []
    found += [("skipped", "Left out on purpose")] if page.skipped else []
    return [*found, ("environment", "How this was measured"), ("glossary", "Glossary")]


def _again(command: str) -> list[str]:
    """A command that computes a part of the run again, in a folder of its own; --only is added to it."""
    found, skip = [], False
    for word in shlex.split(command):
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif name in ("--output", "--only"):
            skip = "=" not in word
        elif name not in ("--report", "--fresh"):
            found.append(word)
    return [*found, "--output", "outputs/again"] if found else []


def _marked(found: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    return [(title, Markup(text)) for title, text in found]


def _line_panels(chart: LineChart, like: object = None) -> list[tuple[str, Markup]]:
    return _marked(svg.line_panels(chart, like if isinstance(like, LineChart) else None))


def _cloud_panels(chart: CloudChart, name: str) -> list[tuple[str, Markup]]:
    return _marked([(title, text.replace("#SHARED", f"#{name}-shared")) for title, text in svg.cloud_panels(chart)])


def _numbers(chart: LineChart | BarChart) -> list[list[Any]]:
    """The numbers of a chart as rows of a table, the first of which has the columns' names."""
    rows: list[list[Any]] = []
    if isinstance(chart, BarChart):
        rows = [[panel.title, name, y] for panel in chart.panels for name, y in panel.bars]
        return [["panel", "name", chart.xlabel], *_cells(rows)]
    for panel in chart.panels:
        for line in panel.lines:
            rows += [[panel.title, line.name, None if line.level else x, y] for x, y in line.points]
    return [["panel", "line", chart.xlabel, chart.ylabel], *_cells(rows)]


def _cells(rows: Sequence[Sequence[Any]]) -> list[list[TableCell]]:
    return [[table_cell(value) for value in row] for row in rows]


def _is_small(row: Strip) -> bool:
    """Whether its images are so small that they are enlarged without smoothing."""
    first = row.images[0]
    return max((decoded(first) if isinstance(first, str) else first).shape[-2:]) <= PIXELS


def _drawing(plot: Figure | Drawing) -> str:
    text = plot.svg if isinstance(plot, Drawing) else svg_of(plot)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


def _is_strong(ours: set[str], row: dict[str, Any]) -> bool:
    """Whether a row of a table is of a method of interest."""
    return any(isinstance(value, str) and value in ours for value in row.values())


def _tone(row: dict[str, Any], column: str) -> str:
    """A class for a difference that is significant."""
    value = row.get(column)
    if column != "difference" or not isinstance(value, Interval) or not value.sign:
        return ""
    return " sure"


def _yaml(settings: Any) -> str:
    """Settings as YAML, as a config has them."""
    plain = json.loads(json.dumps(settings, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).strip()
