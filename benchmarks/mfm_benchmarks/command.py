"""`mfm benchmark SUITE`: runs a suite and writes its report."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mfm_lightning.commands.errors import CommandLineError, explain
from mfm_lightning.commands.imports import split_imports
from mfm_lightning.commands.options import add_options, help_only, strict_yaml

if TYPE_CHECKING:
    from mfm_benchmarks.suite import Suite

CONFIGS = Path("configs/benchmarks")
OUTPUT = Path("outputs/benchmarks")


def benchmark(args: Sequence[str]) -> None:
    """Run a suite of comparisons and write its report.

    One HTML page, figures and tables. A run that was stopped goes on where it was. Without a suite: list them.

    Raises:
        CommandLineError: for an unknown suite, or settings that do not fit it.
        MissingInput: if something that the suite must be given is not there.
    """
    given, _ = split_imports(args)  # imported they are; `args` have them for workers, and for the page's command
    name = given[0] if given and not given[0].startswith("-") else None
    if name is None:
        if others := [arg for arg in given if arg not in ("-h", "--help")]:
            raise CommandLineError(f"the suite comes first, as in mfm benchmark alignment --quick; got {others[0]}")
        print(_listing())
        return
    from mfm_lightning.utils.console import console
    from mfm_lightning.utils.stopping import stoppable

    suite, settings, how = load_suite(name, given[1:])
    stem = how["config"].stem if how["config"] else suite.name or type(suite).__name__
    suite.output = how["output"] or OUTPUT / (f"{stem}_quick" if how["quick"] else stem)
    _check(how)
    results = suite.output / "results"
    if how["status"]:
        from mfm_benchmarks.progress import read_status

        print("\n".join(read_status(results, how["lease"]).lines()))
        return
    terminal = console()
    try:
        with stoppable(f"what is done is in {results}, and the same command goes on from there"):
            path = _launch(suite, args, how) if how["launcher"] else _run(suite, args, settings, how)
    except KeyboardInterrupt:  # of a training within, which hears signals itself
        terminal.print(f"Stopped; what is done is in {results}, and the same command goes on from there.")
        raise SystemExit(130) from None
    terminal.print(f"Report: {path}")


def _run(suite: Suite, args: Sequence[str], settings: dict[str, Any], how: dict[str, Any]) -> Path:
    """The report, once this process, and others where there are any, have computed all."""
    from mfm_benchmarks.runner import Settings, run_suite
    from mfm_lightning.utils.devices import find_device
    from mfm_lightning.utils.distributed import Process

    suite.device = find_device(how["device"], Process.from_environment().local_rank)
    if how["quick"]:
        suite.shrink()
        settings = {"quick": "a small version of these settings", **settings}
    command = shlex.join(["mfm", "benchmark", *args])
    return run_suite(suite, Settings(how["fresh"], command, settings, how["report"], how["lease"], how["only"]))


def _launch(suite: Suite, args: Sequence[str], how: dict[str, Any]) -> Path:
    """The report that workers have made."""
    from mfm_benchmarks.launchers import check_options, find_launcher, logs
    from mfm_benchmarks.suite import MissingInput

    launch, options = find_launcher(how["launcher"]), how["launcher_options"] or {}
    check_options(how["launcher"], launch, options)
    if missing := suite.missing():
        raise MissingInput(suite.name, missing)
    path = suite.output / "report" / "index.html"
    before = path.stat().st_mtime_ns if path.is_file() else None
    failed = launch(["benchmark", *_without_launcher(args)], how["processes"], logs(suite.output), **options)
    for worker, what in failed.items():
        print(f"{worker}: {what}", file=sys.stderr)
    if len(failed) == how["processes"] or not path.is_file() or (failed and path.stat().st_mtime_ns == before):
        raise CommandLineError(
            f"no report was written: {len(failed)} of {how['processes']} processes failed, see {logs(suite.output)}"
        )
    return path


def _check(how: dict[str, Any]) -> None:
    """Refuse ways of running that do not go together."""
    from mfm_lightning.utils.distributed import Process

    if how["processes"] < 1 or not how["lease"] > 0:
        raise CommandLineError(f"--processes {how['processes']} and --lease {how['lease']:g} must be above 0")
    if how["launcher"] is None and (how["processes"] != 1 or how["launcher_options"]):
        raise CommandLineError("--processes and --launcher_options are of a --launcher: local, submitit or ray")
    if how["fresh"] and (how["launcher"] or Process.from_environment().world_size > 1):
        raise CommandLineError(
            "--fresh, which forgets results, by one of several processes would forget those of the others: give "
            "another --output, or remove the old one first"
        )
    if how["report"] and (how["fresh"] or how["launcher"]):
        raise CommandLineError("--report computes nothing: leave out --fresh and --launcher")
    if how["only"] is not None and (how["report"] or how["status"]):
        raise CommandLineError("--only is about what is computed: leave out --report and --status")
    if how["status"] and (how["fresh"] or how["launcher"] or how["report"]):
        raise CommandLineError("--status computes nothing: leave out --fresh, --launcher and --report")


def _without_launcher(args: Sequence[str]) -> list[str]:
    """The arguments for a worker."""
    found, skip = [], False
    for arg in args:
        if skip:
            skip = False
        elif arg.partition("=")[0].partition(".")[0] in ("--launcher", "--processes", "--launcher_options"):
            skip = "=" not in arg
        else:
            found.append(arg)
    return found


def _how(
    *,
    config: Path | None = None,
    quick: bool = False,
    output: Path | None = None,
    fresh: bool = False,
    device: str = "auto",
    report: bool = False,
    status: bool = False,
    only: str | None = None,
    launcher: Literal["local", "submitit", "ray"] | None = None,
    processes: int = 1,
    launcher_options: dict[str, Any] | None = None,
    lease: float = 120.0,
) -> None:
    """How a suite is run.

    Args:
        config: YAML with the suite's parameters; configs/benchmarks/NAME.yaml, for a suite NAME, if left out.
        quick: a small version, within four minutes on two cores.
        output: folder of results and report; outputs/benchmarks/SUITE if left out.
        fresh: compute all again.
        device: auto, cpu, cuda, cuda:1, ...
        report: compute nothing, and write the report of what is there so far.
        status: compute nothing, and say who computes what, the rate and the time left.
        only: compute only results whose names begin with this, such as "MFM-G (steps 10), brightness", and what they
            need; * stands for anything, "*, symmetry" is all of a reward. The page is of these and of what was there
            before.
        launcher: start processes that share the work, on this machine, on SLURM or on a ray cluster; more may be
            started at any time, by the same command on any machine that sees the folder.
        processes: how many.
        launcher_options: of the launcher, such as {slurm_partition: gpu, gpus_per_node: 1}.
        lease: seconds after which the work of a process that gives no sign is another's; of processes that run on
            the same machine and are gone at once.
    """


def load_suite(name: str, args: Sequence[str] = ()) -> tuple[Suite, dict[str, Any], dict[str, Any]]:
    """A suite by name, with the parameters of its YAML and of the command line; those parameters; and how it is run.

    Raises:
        CommandLineError: if there is no such suite, or a parameter is unknown or does not fit.
        FileNotFoundError: if the config is not there.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from mfm_benchmarks.suite import find_suite
    from mfm_lightning.utils.configs import find_config, read_config

    kind = find_suite(name)
    strict_yaml()
    parser = ArgumentParser(
        prog=f"mfm benchmark {name}", description=kind.about, exit_on_error=False, allow_abbrev=False
    )
    add_options(parser, _how)
    names = [name.removeprefix("suite.") for name in parser.add_class_arguments(kind, "suite")]
    if {"-h", "--help"} & set(args):
        # the parser has the suite's parameters below `suite`, as its own file of settings
        shown = re.sub(r" \[--suite CONFIG\]|^  --suite CONFIG .*\n", "", parser.format_help(), flags=re.MULTILINE)
        print(shown.replace("--suite.", "--").replace("SUITE.", ""))
        raise SystemExit(0)
    config = _config_of(args)
    if config is not None:
        config = find_config(config)
    else:
        with suppress(FileNotFoundError):  # a suite of the user's own needs none
            config = find_config(CONFIGS / f"{name}.yaml")
    if config is not None:
        read_config(config)
    try:
        read = [] if config is None else ["--suite", str(config)]
        parsed = parser.parse_args([*read, *map(_of_suite, args)])
        made = parser.instantiate(parsed)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        keys = [action.dest.removeprefix("suite.") for action in parser._actions]
        where = "" if config is None else f" (with {config})"
        message = explain(str(error).replace("--suite.", "--").replace('"suite.', '"').replace("'suite.", "'"), keys)
        raise CommandLineError(f"suite {name}: {message}{where}") from error
    how = {key: parsed[key] for key in inspect.signature(_how).parameters}
    settings = yaml.safe_load(parser.dump(parsed))["suite"]
    return made.suite, {key: settings.get(key) for key in names}, how


def _of_suite(arg: str) -> str:
    """An argument for the parser, which has the suite's parameters below `suite`."""
    name = arg[2:].partition("=")[0].partition(".")[0].removeprefix("no_")
    ours = not arg.startswith("--") or name in inspect.signature(_how).parameters
    return arg if ours else f"--suite.{arg[2:]}"


def _config_of(args: Sequence[str]) -> str | None:
    """The value of --config, which must be known before the rest is read."""
    for arg, then in itertools.zip_longest(args, args[1:]):
        if arg == "--config" or arg.startswith("--config="):
            return then if arg == "--config" else arg.partition("=")[2]
    return None


def _listing() -> str:
    """The suites with a line each, and the options of all; without importing one."""
    about = dict(_described())
    width = max(map(len, about))
    lines = [f"  {name:<{width}}  {text}" for name, text in about.items()]
    head = "Usage: mfm benchmark SUITE [options]      mfm benchmark SUITE --help tells the suite's parameters"
    own = "A suite of your own is named by its path: mfm benchmark my_module.MySuite."
    return "\n".join([head, "", *lines, "", own, "", help_only(_how)])


def _described() -> Iterator[tuple[str, str]]:
    """Name and description of each suite, read from the sources."""
    for path in sorted(Path(__file__).with_name("suites").glob("[a-z]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                said = {
                    target.id: ast.literal_eval(line.value)
                    for line in node.body
                    if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
                    for target in line.targets
                    if isinstance(target, ast.Name)
                }
                if said.get("name"):
                    yield said["name"], said.get("about", "").partition(": ")[0].partition(". ")[0].rstrip(".")
