"""`mfm report A [B]`: writes a run's page again, or a page that compares two runs of one suite."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_lightning.commands.errors import CommandLineError

if TYPE_CHECKING:
    from mfm_benchmarks.blocks import Block, Page, Pair, Table
    from mfm_benchmarks.charts import Interval
    from mfm_lightning.metrics.measured import Measured

    Samples = Mapping[tuple[str, int, str], Measured]

OUTPUT = Path("outputs/benchmarks")
FILES = "index.html", "page.json"
HOW, PAIRED, INDEPENDENT = "taken as", "paired", "independent"  # a column, and what it says


def report(a: Path, b: Path | None = None, *, output: Path | None = None) -> None:
    """Write the page of a finished benchmark again, or compare two runs of one suite on one page.

    Nothing is computed and no model is loaded: the numbers are those of the runs' reports.

    Args:
        a: folder of a run, such as outputs/benchmarks/alignment.
        b: folder of a second run of the same suite; the page then has the settings that differ, the tables' rows in
            pairs with their differences, and the pictures side by side.
        output: folder of the comparison; outputs/benchmarks/A_and_B if left out.

    Raises:
        CommandLineError: for two runs of different suites, or an output without a second run.
        FileNotFoundError: if a run has no report.
        ValueError: if a report is of another version, or damaged.
    """
    from mfm_benchmarks.report import write_report
    from mfm_lightning.utils.atomic import check_is_folder
    from mfm_lightning.utils.console import console

    first = folder_of(a)
    if b is None:
        if output is not None:
            raise CommandLineError("--output is of a comparison: give two runs, mfm report A B --output FOLDER")
        path = write_report(read_run(a), first, with_samples=False)
    else:
        names = _name_of(a), _name_of(b)
        output = output or OUTPUT / "_and_".join(names)
        check_is_folder(output)
        path = write_report(compared(read_run(a), read_run(b), names, (samples_of(a), samples_of(b))), output)
    console().print(f"Report: {path}", soft_wrap=True)


def folder_of(run: Path) -> Path:
    """The folder of a run's report: of the run's folder, of `report` in it, or of a file there.

    Raises:
        FileNotFoundError: if there is no report, with the command that writes one.
    """
    place = run.parent if run.name in FILES else run
    for folder in (place / "report", place):
        if (folder / "page.json").is_file():
            return folder
    old = next((f for f in (place / "report", place) if (f / "index.html").is_file()), None)
    if old is not None:
        raise FileNotFoundError(
            f"{old} has no page.json: an earlier version wrote it; run the benchmark's command again with --report"
        )
    raise FileNotFoundError(f"no report in {run}: expected the folder of a run of mfm benchmark, with report/page.json")


def read_run(run: Path) -> Page:
    """The page of a run; raises as `folder_of` and `load_page`."""
    from mfm_benchmarks.page.stored import FILE, load_page

    return load_page(folder_of(run) / FILE)


def samples_of(run: Path) -> Samples:
    """What each sample of a run adds to its numbers; empty for a report of an earlier version."""
    from mfm_benchmarks.page.stored import SAMPLES, load_samples

    return load_samples(folder_of(run) / SAMPLES)


def _name_of(run: Path) -> str:
    place = run.resolve()
    place = place.parent if place.name in FILES else place
    return place.parent.name if place.name == "report" else place.name


def compared(a: Page, b: Page, names: tuple[str, str], samples: tuple[Samples, Samples] = ({}, {})) -> Page:
    """A page with both runs: what differs in their settings, rows in pairs, pictures side by side.

    Args:
        samples: of both runs' numbers. Where the runs have the same noise, differences are paired by them.

    Raises:
        CommandLineError: for runs of different suites.
    """
    from mfm_benchmarks.blocks import Claims, Headline, Page, Summary, Table
    from mfm_lightning.metrics.measured import rounded

    if a.suite != b.suite:
        raise CommandLineError(
            f"{names[0]} is of the suite {a.suite!r} and {names[1]} of {b.suite!r}: expected two runs of one suite"
        )
    settings = list(differing(a.settings, b.settings))
    where = list(differing(a.environment, b.environment))
    same = bool(a.noise) and a.noise == b.noise
    tables, said = _tables(a, b, samples if same else ({}, {}))
    rows = [row for table in tables for row in table.rows]
    sure = [row for row in rows if (d := row.get("difference")) is not None and d.sign]
    keys = ", ".join(str(row["setting"]) for row in settings[:4])
    more = f" and {len(settings) - 4} more" if len(settings) > 4 else ""
    judged = [row for row in rows if (d := row.get("difference")) is not None and d.known]
    summary = Summary([
        f"A is {names[0]}, B is {names[1]}; "
        + (f"they differ in {keys}{more}." if settings else "their settings are the same."),
        f"Of {len(judged)} numbers with an interval that both runs have, {len(sure)} differ significantly; if nothing "
        f"differed, {rounded(0.05 * len(judged), 2)} would by chance.",
        f"Differences are B minus A. {_how(a, b, samples, judged)}",
    ])  # fmt: skip
    blocks: list[Block] = [
        summary,
        Table("settings", "Settings that differ", settings, keys=["setting"]),
        Table("environment", "Where and when", where, keys=["setting"], folded=True),
    ]  # fmt: skip
    for page, name in ((a, "A"), (b, "B")):
        items = [item for block in page.blocks if isinstance(block, Headline) for item in block.items]
        if items:
            blocks.append(Claims(f"Main results of {name}", [f"{number} {words}" for number, words in items]))
    blocks += [*_pictures(a, b), *tables]
    if said:
        blocks.append(Claims("Rows that only one run has", said))
    about = f"Two runs of the suite {a.suite}: {a.title}. A is {names[0]}, B is {names[1]}."
    words = (
        "Intervals are 95 % intervals of differences. A paired one is made from the differences of single samples that "
        "start from the same noise in both runs. One of independent numbers is made from the intervals of both (Zou "
        "and Donner, 2008). Each is of one comparison, without a correction for their number."
    )
    commands = {"command of A": a.command, "command of B": b.command}
    return Page(f"{names[0]} and {names[1]}", about, blocks, environment=commands, intervals=words, suite=a.suite)


def _how(a: Page, b: Page, samples: tuple[Samples, Samples], judged: Sequence[Mapping[str, Any]]) -> str:
    """Whether the runs were paired, and why not."""
    paired = sum(row[HOW] == PAIRED for row in judged)
    if paired == len(judged) and judged:
        return f"Both runs have the same noise ({a.noise}), so that they are paired sample by sample."
    if paired:
        return (
            f"Both runs have the same noise ({a.noise}): {paired} of {len(judged)} differences are paired sample by "
            "sample, the others are of numbers taken as independent."
        )
    if not a.noise or not b.noise:
        why = "it is not stored what their noise is made from"
    elif a.noise != b.noise:
        why = f"they have different noise: A has {a.noise}, B has {b.noise}"
    elif not all(samples):
        why = "a report of an earlier version has no samples.safetensors"
    else:
        why = "their numbers have different numbers of samples"
    return f"The runs are taken as independent, for {why}."


def differing(a: Any, b: Any, key: str = "") -> Iterator[dict[str, str]]:
    """Rows of dotted keys whose values differ, with both values; what one does not have is empty."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            yield from differing(a.get(name), b.get(name), f"{key}.{name}" if key else str(name))
    elif a != b:
        yield {"setting": key, "A": "" if a is None else str(a), "B": "" if b is None else str(b)}


def _pictures(a: Page, b: Page) -> list[Pair]:
    """Pictures of the same name beside each other, in the order of the first run."""
    from mfm_benchmarks.blocks import Pair, Picture

    left, right = ({p.name: p for p in page.blocks if isinstance(p, Picture)} for page in (a, b))
    names = list(dict.fromkeys([*left, *right]))
    return [Pair((left.get(n) or right[n]).title, left.get(n), right.get(n)) for n in names]


def _tables(a: Page, b: Page, samples: tuple[Samples, Samples]) -> tuple[list[Table], list[str]]:
    """For each table that both runs have, its numbers in pairs; and a sentence on rows that have no partner."""
    from mfm_benchmarks.blocks import Table

    left, right = ({t.name: t for t in page.blocks if isinstance(t, Table)} for page in (a, b))
    found, said = [], []
    for name, table in left.items():
        if name not in right:
            said.append(f"{table.title}: A alone has this table.")
            continue
        other = right[name]
        rows = paired(table, other, samples)
        keys = list(dict.fromkeys([*_keys(table), *_keys(other), "number"]))
        caption = (
            "The numbers of rows that both runs have. The difference is B minus A, in bold where it is significant."
        )
        found.append(Table(name, table.title, rows, caption, folded=len(rows) > 24, keys=keys))
        for page, mine, its in (("A", table, other), ("B", other, table)):
            if alone := list(_alone(mine, its)):
                said.append(f"{table.title}, {page} alone: {'; '.join(alone)}.")
    said += [f"{table.title}: B alone has this table." for name, table in right.items() if name not in left]
    return found, said


def _keys(table: Table) -> list[str]:
    """Columns that identify a row."""
    if table.keys:
        return list(table.keys)
    return [c for c in table.columns() if all(isinstance(row.get(c), str | None) for row in table.rows)]


def _identified(table: Table, keys: Sequence[str]) -> dict[tuple[Any, ...], int]:
    """Places of rows by the values of their keys; of rows with the same ones, the second has a 2, and so on."""
    found, count = {}, Counter[tuple[str, ...]]()
    for k, row in enumerate(table.rows):
        key = tuple("" if row.get(k) is None else str(row[k]) for k in keys)
        count[key] += 1
        found[(*key, count[key])] = k
    return found


def _alone(table: Table, other: Table) -> Iterator[str]:
    keys = _keys(table)
    there = _identified(other, keys)
    for key in (key for key in _identified(table, keys) if key not in there):
        yield ", ".join(part for part in key[:-1] if part)


def paired(a: Table, b: Table, samples: tuple[Samples, Samples] = ({}, {})) -> list[dict[str, Any]]:
    """A row for each number of the rows that both tables have: its keys, both values and B minus A.

    Where `samples` has both numbers, of as many samples, the difference is of the samples; else of independent numbers.
    Numbers that are equal in both and have no interval, such as costs, are left out where no number of the column
    differs.
    """
    keys = _keys(a)
    left, right = _identified(a, keys), _identified(b, keys)
    columns = [c for c in a.columns() if c not in keys and c in b.columns()]
    by_column: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for column in columns:
        for key, k in left.items():
            if key not in right:
                continue
            mine, its = a.rows[k].get(column), b.rows[right[key]].get(column)
            if (one := _number(mine)) is None or (two := _number(its)) is None:
                continue
            difference, how = two.minus(one), None
            if difference.known:
                how = INDEPENDENT
            first, second = samples[0].get((a.name, k, column)), samples[1].get((b.name, right[key], column))
            if first is not None and second is not None and first.samples == second.samples:
                difference, how = one.of(second - first), PAIRED
            values = {"number": column, "A": mine, "B": its, "difference": difference, HOW: how}
            by_column[column].append(dict(zip(keys, key[:-1], strict=True)) | values)
    rows = []
    for column, found in by_column.items():
        if any(row["difference"].known or row["difference"].value for row in found):
            rows += by_column[column]
    return rows


def _number(value: Any) -> Interval | None:
    """The number of a cell; None for text, and for what is not finite."""
    from mfm_benchmarks.charts import Interval

    if isinstance(value, Interval):
        return value if math.isfinite(value.value) else None
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return Interval.of(value) if plain else None
