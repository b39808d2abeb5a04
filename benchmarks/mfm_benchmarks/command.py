"""`mfm benchmark SUITE`: runs a suite and writes its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser
from rich import get_console
from rich.table import Table

from mfm_benchmarks.runner import Settings, run_suite
from mfm_benchmarks.suite import Suite, find_suite, suites
from mfm_lightning.utils.configs import find_config
from mfm_lightning.utils.devices import find_device

CONFIGS = Path("configs/benchmarks")
OUTPUT = Path("outputs/benchmarks")


def main(args: Sequence[str]) -> None:
    """Entry point of the subcommand.

    Raises:
        ValueError: for an unknown suite, or settings that do not fit it.
        MissingInput: if something that the suite must be given is not there.
    """
    parser = argparse.ArgumentParser(
        prog="mfm benchmark",
        description="Run a suite and write its report: one HTML page, figures, tables. A run that was stopped goes on "
        "where it was. Without a suite: list them. Other options set the suite's parameters, e.g. --num_samples 64.",
    )
    parser.add_argument("suite", nargs="?", help="name of a suite, or the path of a Suite class")
    parser.add_argument(
        "--config", type=Path, help=f"YAML with the suite's parameters; {CONFIGS}/SUITE.yaml if it is left out"
    )
    parser.add_argument("--quick", action="store_true", help="a small version, within two minutes on two cores")
    parser.add_argument("--output", type=Path, help=f"folder of results and report; {OUTPUT}/SUITE if left out")
    parser.add_argument("--fresh", action="store_true", help="compute all again")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    options, rest = parser.parse_known_args(args)
    console = get_console()
    if options.suite is None:
        table = Table("suite", "what it measures")
        for name, kind in suites().items():
            table.add_row(name, kind.about)
        console.print(table)
        return
    suite, settings = load_suite(options.suite, options.config, rest)
    suite.device = find_device(options.device)
    stem = options.config.stem if options.config else suite.name or type(suite).__name__
    suite.output = options.output or OUTPUT / (f"{stem}_quick" if options.quick else stem)
    if options.quick:
        suite.shrink()
        settings = {"quick": "a small version of these settings", **settings}
    how = Settings(options.fresh, shlex.join(["mfm", "benchmark", *args]), settings)
    try:
        path = run_suite(suite, how)
    except KeyboardInterrupt:
        console.print(
            f"Stopped; what is done is in {suite.output / 'results'}, and the same command goes on from there."
        )
        raise SystemExit(130) from None
    console.print(f"Report: {path}")


def load_suite(name: str, config: Path | None = None, args: Sequence[str] = ()) -> tuple[Suite, dict]:
    """A suite by name, with the parameters of a YAML and of the command line; and those parameters.

    Raises:
        FileNotFoundError: if the config is not there.
        ValueError: if a parameter is unknown or does not fit.
    """
    kind = find_suite(name)
    parser = ArgumentParser(prog=f"mfm benchmark {name}", exit_on_error=False)
    parser.add_class_arguments(kind, "suite")
    if config is not None:
        config = find_config(config)
    else:
        with suppress(FileNotFoundError):  # a suite of the user's own needs none
            config = find_config(CONFIGS / f"{name}.yaml")
    given = [f"--suite.{arg[2:]}" if arg.startswith("--") else arg for arg in args]
    try:
        read = [] if config is None else ["--suite", str(config)]
        parsed = parser.parse_args([*read, *given])
        made = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(f"settings of the suite {name} do not fit: {error}") from error
    return made.suite, yaml.safe_load(parser.dump(parsed))["suite"]


if __name__ == "__main__":
    main(sys.argv[1:])
