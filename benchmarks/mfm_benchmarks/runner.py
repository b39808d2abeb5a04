"""Runs a suite: fits what is missing, computes cells that are not stored, goes on after failures, writes the report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mfm_lightning
from mfm_benchmarks.blocks import Page
from mfm_benchmarks.environment import commit, describe, device_name
from mfm_benchmarks.report import write_report
from mfm_benchmarks.store import Store
from mfm_benchmarks.suite import MissingInput, Results, Suite
from mfm_lightning.utils.console import console, progress_bar

log = logging.getLogger(__name__)


@dataclass
class Settings:
    """How a suite is run.

    Args:
        fresh: compute all results again, with the trainings of methods; models that are there stay.
        command: what was typed, for the report.
        settings: the suite's parameters, as the report shows them.
    """

    fresh: bool = False
    command: str = ""
    settings: dict[str, Any] | None = None


def run_suite(suite: Suite, how: Settings) -> Path:
    """The path of the report's page.

    Raises:
        MissingInput: before any work, if something that the suite must be given is not there.
    """
    terminal = console()
    if missing := suite.missing():
        raise MissingInput(suite.name, missing)
    for fit in suite.fits():
        if not fit.is_done():
            terminal.rule(f"fit {fit.config} for {fit.file}")
            fit.run()
    suite.prepare()
    where = {"device": device_name(suite.device), "version": mfm_lightning.__version__}
    results, seconds = compute(suite, Store(suite.output / "results", where, commit()), how.fresh)
    page = Page(
        suite.title,
        suite.about,
        list(suite.report(results)),
        results.failures,
        suite.skipped,
        {
            "command": how.command,
            **describe(suite.device),
            "commit": ", ".join(results.commits) or "not in a repository",
            "computing": f"{seconds:.0f} s for all results of this page",
            "from the store": f"{results.stored} of {len(results)} results, of earlier runs",
        },
        how.settings or {},
        suite.intervals,
    )
    return write_report(page, suite.output / "report")


def compute(suite: Suite, store: Store, fresh: bool = False) -> tuple[Results, float]:
    """Outcomes of all cells, and the seconds that they took when they were computed.

    A cell that fails is noted, and so are those that need it; the others go on. What is done is kept when the run is
    interrupted.
    """
    results, total, fitted = Results(), 0.0, set()
    cells = list(suite.cells())
    if len({cell.name for cell in cells}) < len(cells):
        names = [cell.name for cell in cells]
        raise ValueError(f"cells of one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    with progress_bar() as progress:
        task = progress.add_task("", total=len(cells))
        for cell in cells:
            progress.update(task, description=cell.name)
            outcome = None if fresh else store.load(cell)
            if outcome is not None:
                results.stored += 1
            elif lost := [need.name for need in cell.needs if need not in results]:
                results.failures[cell.name] = f"needs {', '.join(lost)}, which failed"
            else:
                begin = time.monotonic()
                try:
                    if cell.fit is not None and (not cell.fit.is_done() or (fresh and cell.fit.file not in fitted)):
                        fitted.add(cell.fit.file)
                        progress.stop()  # the training has a bar of its own
                        cell.fit.run()
                    outcome = cell.compute(*[results[need] for need in cell.needs])
                except Exception as error:  # whatever a method or reward of the user's does, the others go on
                    results.failures[cell.name] = f"{type(error).__name__}: {error}"
                    log.warning("%s failed, the others go on: %s: %s", cell.name, type(error).__name__, error)
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        torch.cuda.empty_cache()
                else:
                    outcome.commit = store.commit
                    outcome.numbers["cell_seconds"] = time.monotonic() - begin
                    outcome.tensors = {name: tensor.detach().cpu() for name, tensor in outcome.tensors.items()}
                    store.save(cell, outcome)
                if cell.fit is not None:
                    progress.start()
            if outcome is not None:
                total += outcome.numbers.get("cell_seconds", 0.0)
                results.add(cell, outcome)
            progress.advance(task)
    where = f"{results.stored} of {len(cells)} results were there already, in {store.folder}"
    log.info("%s%s", where, " (--fresh computes them again)" if results.stored else "")
    if results.failures:
        log.warning("%d results failed", len(results.failures))
    return results, total
