"""Writes a report: one self-contained HTML page, figures as PNG, SVG and PDF, tables as CSV and JSON."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mfm_benchmarks.blocks import Block, Drawing, Page, Picture, Table
from mfm_benchmarks.page.figures import write_figures
from mfm_benchmarks.page.html import render
from mfm_benchmarks.page.stored import FILE, SAMPLES, save_page, save_samples
from mfm_lightning.utils.atomic import save_json, whole_file


def write_report(page: Page, folder: Path, with_samples: bool = True) -> Path:
    """Write the report's files, and return the path of its page.

    They are `index.html`, which needs no network and no other file; `NAME.png`, `NAME.svg` and `NAME.pdf` of each
    picture, the last at the width of a paper's column; `NAME.csv` and `NAME.json` of each table; `environment.json`;
    `page.json`, of which `mfm report` writes the page again; and `samples.safetensors`, with what each sample adds to a
    number, by which `mfm report A B` pairs two runs of the same noise. A page that was read from `page.json` has no
    samples: then the file stays as it is, `with_samples=False`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = replace(page, blocks=_with_names_of_their_own(page.blocks))
    for block in page.blocks:
        if isinstance(block, Picture) and not isinstance(block.plot, Drawing):
            write_figures(block.plot, folder / block.name)
        elif isinstance(block, Table) and block.rows:
            _write_table(block, folder / block.name)
    record = {"environment": {"command": page.command, **page.environment}, "settings": page.settings}
    record |= {"failures": page.failures, "skipped": page.skipped, "missing": page.missing}
    save_json(record, folder / "environment.json", default=str)
    save_page(page, folder / FILE)
    if with_samples:
        save_samples(page, folder / SAMPLES)
    path = folder / "index.html"
    with whole_file(path) as partial:
        partial.write_text(render(page))
    return path


def _with_names_of_their_own(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, so that no two pictures and no two tables share a file, even where file names ignore case."""
    taken: set[tuple[type, str]] = set()
    found = []
    for block in blocks:
        if isinstance(block, Picture | Table):
            names = itertools.chain([block.name], (f"{block.name}_{k}" for k in itertools.count(2)))
            block = replace(block, name=next(name for name in names if (type(block), name.lower()) not in taken))
            taken.add((type(block), block.name.lower()))
        found.append(block)
    return found


def _write_table(table: Table, path: Path) -> None:
    rows = table.plain()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    save_json(rows, path.with_suffix(".json"), default=str)
