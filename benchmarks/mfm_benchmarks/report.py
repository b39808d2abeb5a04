"""Writes a report: one self-contained HTML page, figures as PNG and SVG, tables as CSV and JSON, the environment."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from mfm_benchmarks.blocks import Block, Page, Picture, Table
from mfm_lightning.utils.atomic import whole_file


def write_report(page: Page, folder: Path) -> Path:
    """Write `index.html`, `NAME.png`, `NAME.svg`, `NAME.csv`, `NAME.json` and `environment.json`; the page's path.

    The page needs no network and no other file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    page = replace(page, blocks=_with_names_of_their_own(page.blocks))
    for block in page.blocks:
        if isinstance(block, Picture):
            sources[block.name] = _write_figure(block.plot, folder / block.name)
        elif isinstance(block, Table) and block.rows:
            _write_table(block, folder / block.name)
    record = {"environment": page.environment, "settings": page.settings}
    record |= {"failures": page.failures, "skipped": page.skipped, "missing": page.missing}
    (folder / "environment.json").write_text(json.dumps(record, indent=1, default=str))
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = templates.get_template("page.html.j2").render(
        page=page,
        sources=sources,
        kind=lambda block: type(block).__name__,
        settings=json.dumps(page.settings, indent=1, default=str),
    )
    path = folder / "index.html"
    with whole_file(path) as partial:
        partial.write_text(html)
    return path


def _with_names_of_their_own(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, so that no two pictures and no two tables have a file in common, where case is not told, too."""
    taken: set[tuple[type, str]] = set()
    found = []
    for block in blocks:
        if isinstance(block, Picture | Table):
            names = itertools.chain([block.name], (f"{block.name}_{k}" for k in itertools.count(2)))
            block = replace(block, name=next(name for name in names if (type(block), name.lower()) not in taken))
            taken.add((type(block), block.name.lower()))
        found.append(block)
    return found


def _write_figure(figure: Figure, path: Path) -> str:
    """Both files; the SVG as a data URI."""
    figure.savefig(path.with_suffix(".png"), dpi=130)
    buffer = io.BytesIO()
    # without a date and with a fixed salt the same figure is the same file
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(buffer, format="svg", dpi=130, metadata={"Date": None})
    path.with_suffix(".svg").write_bytes(buffer.getvalue())
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_table(table: Table, path: Path) -> None:
    rows = table.plain()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1, default=str))
