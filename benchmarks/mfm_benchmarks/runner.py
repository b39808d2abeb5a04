"""Runs a suite, alone or beside other processes: fits what is missing, has its cells computed, writes the report."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mfm_lightning
from mfm_benchmarks.blocks import Page
from mfm_benchmarks.cells import collect, compute, key_of_fit, leases_of
from mfm_benchmarks.environment import describe, device_name
from mfm_benchmarks.report import write_report
from mfm_benchmarks.store import Store
from mfm_benchmarks.suite import MissingInput, Results, Suite
from mfm_lightning.utils.atomic import whole_file
from mfm_lightning.utils.console import console
from mfm_lightning.utils.leases import Leases, alone
from mfm_lightning.utils.repository import commit_of
from mfm_lightning.utils.shared_work import Board

log = logging.getLogger(__name__)
PREPARED = "prepared"  # a file beside the claims, with the settings' digest after its name
REPORT, REPORTED = "report", "reported"  # the lease of who writes the page; a file there: what it is of


@dataclass
class Settings:
    """How a suite is run.

    Args:
        fresh: compute all results again, with the trainings of methods; models that are there stay.
        command: what was typed, for the report.
        settings: the suite's parameters, as the report shows them.
        report_only: compute nothing: write the report of what is there.
        lease: seconds after which the work of a process that gives no sign is another's.
        only: compute only results whose names begin with this, `*` standing for anything, and what they need; all
            where None.
    """

    fresh: bool = False
    command: str = ""
    settings: dict[str, Any] | None = None
    report_only: bool = False
    lease: float = 120.0
    only: str | None = None


def run_suite(suite: Suite, how: Settings) -> Path:
    """The path of the report's page.

    Any number of processes may run the same suite with the same settings in the same folder; all return when all is
    done, and one of them writes the report.

    Raises:
        MissingInput: before any work, if something that the suite must be given is not there.
        FileNotFoundError: with `report_only`, if a model is not trained yet.
        ValueError: with `fresh`, while another process computes there.
    """
    if missing := suite.missing():
        raise MissingInput(suite.name, missing)
    place = {"device": device_name(suite.device), "version": mfm_lightning.__version__}
    store = Store(store_folder(suite), place, commit_of(__file__))
    leases = leases_of(store, how.lease)
    try:
        return _run(suite, how, store, leases)
    finally:
        leases.close()
        for folder in (store.folder, suite.output):  # what cannot run leaves nothing behind
            with suppress(OSError):
                folder.rmdir()


def _run(suite: Suite, how: Settings, store: Store, leases: Leases) -> Path:
    for fit in suite.fits():
        if how.report_only and not fit.is_done():
            raise FileNotFoundError(f"nothing to report yet: {fit.file} is not there, run without --report")
        for _ in alone(leases, key_of_fit(fit), fit.is_done):
            console().rule(f"fit {fit.config} for {fit.file}")
            fit.run(suite.device)
    if how.report_only:
        suite.prepare()
        # not beside another's, whose page may have more: it comes before this one's look, or after this one's page
        for _ in alone(leases, REPORT, lambda: False):
            return write_report(_page(suite, collect(list(suite.cells()), store), how), report_folder(suite))
    _prepare(suite, leases, how)
    began = _state(store, how)
    results, _ = compute(suite, store, how.fresh, leases, how.command, how.only)
    return _write(suite, results, how, store, leases, began)


def store_folder(suite: Suite) -> Path:
    """Where a suite's results are."""
    return suite.output / "results"


def report_folder(suite: Suite) -> Path:
    """Where its report is."""
    return suite.output / "report"


def _prepare(suite: Suite, leases: Leases, how: Settings) -> None:
    """Load models; one process first, for features that are fitted then are kept in files, which the others read."""
    settings = json.dumps([suite.name, how.settings], sort_keys=True, default=str)
    mark = leases.folder / f"{PREPARED}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    for _ in alone(leases, mark.name, mark.is_file):
        suite.prepare()
        mark.touch()
        return
    suite.prepare()


def _write(suite: Suite, results: Results, how: Settings, store: Store, leases: Leases, began: str) -> Path:
    """The report, written by one of the processes that end together."""
    path, mark, now = report_folder(suite) / "index.html", leases.folder / REPORTED, _state(store, how)
    # where nothing was computed meanwhile, a page was asked for
    asked = results.stored == len(results) and not how.fresh and began == now

    def written_by_another() -> bool:
        return not asked and path.is_file() and mark.is_file() and mark.read_text() == now

    for _ in alone(leases, REPORT, written_by_another):
        if results.failures:  # another may have had more luck since: `now` would say that it is on the page
            stored, results = results.stored, collect(list(suite.cells()), store)
            results.stored = stored
        write_report(_page(suite, results, how), path.parent)
        with whole_file(mark) as partial:
            partial.write_text(now)
        return path
    log.info("the report is another process's")
    return path


def _state(store: Store, how: Settings) -> str:
    """What a page of all results would be of: a digest of which there are and failed, of when, and the settings."""
    failed, written = Board(store.folder).look().failed, dict[str, int]()
    for path in store.folder.glob("*-*.json"):
        with suppress(FileNotFoundError):  # damaged, and removed by another
            written[path.name] = path.stat().st_mtime_ns
    return hashlib.sha256(json.dumps([how.settings, failed, written], sort_keys=True, default=str).encode()).hexdigest()


def _page(suite: Suite, results: Results, how: Settings) -> Page:
    stored, number = results.stored, len(results)
    return Page(
        suite.title,
        suite.about,
        list(suite.report(results)),
        results.failures,
        suite.skipped,
        {
            **describe(suite.device),
            "commit": ", ".join(results.commits) or "not in a repository",
            "computing time": f"{results.seconds:.0f} s for all results of this page",
            "reused results": f"{stored} of {number}, computed by earlier runs or other processes",
        },
        how.settings or {},
        suite.intervals,
        results.missing,
        suite.name or type(suite).__name__,
        how.command,
        suite.described(),
        suite.noise,
    )
