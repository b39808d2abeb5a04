"""The command `mfm`: finds the command of a name, hands it its arguments, and says in a line or two what went wrong.

Nothing here imports torch: `mfm --help` and the help of each command are there at once.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mfm_lightning._version import __version__
from mfm_lightning.commands.errors import CommandLineError, explain, unknown, users_line
from mfm_lightning.commands.imports import import_modules, split_imports
from mfm_lightning.commands.jobs import JOBS, short_help
from mfm_lightning.utils.stopping import Stopped

log = logging.getLogger(__name__)
ENTRY_POINTS = "mfm_lightning.commands"  # the group by which packages add commands
USAGE = "Usage: mfm COMMAND [options]        mfm COMMAND --help tells a command's options"
CLOSING = """Of every command:
  --imports MODULE  imports a module of yours, whose rewards then have names
  --debug           shows the whole traceback of an error; so does MFM_DEBUG=1
Dashes and underscores in the names of options are the same."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: what the user can mend ends with its message and status 1 (2 for the command line itself), without a
    traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args or os.environ.get("MFM_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    try:
        run(args)
    except CommandLineError as error:
        if debug:
            raise
        print(f"mfm: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        if stop.message:
            print(f"mfm: {stop.message}", file=sys.stderr)
        raise
    except KeyboardInterrupt:  # of a command that does not go on, or while it was imported
        if debug:
            raise
        print("mfm: stopped by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if debug or not _can_be_mended(error):
            raise
        where = users_line(error)
        # what a constructor raises comes in jsonargparse's wrapping
        message = explain(str(error)) if "\nErrors:\n" in str(error) else str(error)
        sys.exit(f"mfm: {type(error).__name__}: {message}" + (f"\n  raised at {where}" if where else ""))


def run(args: Sequence[str]) -> Any:
    """Run the command with these arguments, raising what goes wrong; what `mfm fit` and its like return is their
    `MFMCLI`.

    Raises:
        CommandLineError: for a command, an option or a value that is not known.
    """
    name, *given = list(args) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return None
    if name == "--version":
        print(f"mfm-lightning {__version__}")
        return None
    tools = commands()
    if name not in tools and name not in JOBS:
        raise CommandLineError(f"{unknown('command', name, [*JOBS, *tools])} (mfm --help lists all)")
    if "" not in sys.path:
        sys.path.append("")  # modules of the user's own, in the folder that the command runs in
    given, modules = split_imports(spelled(given))
    import_modules(modules)
    if name in JOBS and {"-h", "--help"} & set(given):
        print(short_help(name))
        return None
    if name in JOBS:
        from mfm_lightning.commands.fit import run_job

        return run_job(name, given, typed=args)
    return call(tools[name].load(), name, given, modules)


def call(tool: Callable[..., Any], name: str, args: Sequence[str], modules: Sequence[str] = ()) -> Any:
    """Call a tool with what the command line says: its parameters are the options. A tool whose only parameter is
    `args` reads the command line by itself; it is given the imported modules, too, for commands that it makes of it."""
    from mfm_lightning.commands.options import parse

    if list(inspect.signature(tool).parameters) == ["args"]:
        return tool([*args, *(f"--imports={module}" for module in modules)])
    positional, options = parse(tool, f"mfm {name}", args)
    return tool(*positional, **options)


def commands() -> dict[str, EntryPoint]:
    """The commands besides `JOBS` by name; packages add theirs by the entry-point group of `ENTRY_POINTS`: a function
    whose parameters are the options, and whose docstring is the help."""
    found: dict[str, EntryPoint] = {}
    # ours first: of two of a name, as of a job of Lightning's, the other is named and left out
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (not _is_ours(point), point.value)):
        if point.name in JOBS or found.get(point.name, point).value != point.value:
            log.warning("the command %s of %s is left out: there is one of that name", point.name, point.value)
        else:
            found[point.name] = point
    return found


def _is_ours(point: EntryPoint) -> bool:
    return point.value.split(".")[0] in ("mfm_lightning", "mfm_benchmarks")


def overview() -> str:
    """All commands with a line each."""
    about = dict(JOBS)
    for name, point in sorted(commands().items()):
        try:
            about[name] = _first_sentence(inspect.getdoc(point.load()) or "")
        except Exception as error:  # another package's, which must not take the help of all others with it
            about[name] = f"(of {point.value}, cannot be imported: {error})"
    width = max(map(len, about))
    lines = [f"  {name:<{width}}  {text}" for name, text in about.items()]
    title = "Meta Flow Maps: train them, draw from them, steer, search and fine-tune to a reward, and compare."
    return "\n".join([USAGE, "", title, "", *lines, "", CLOSING])


def spelled(args: Sequence[str]) -> list[str]:
    """The arguments with the names of options spelled with underscores: `--batch-size 8` is `--batch_size 8`."""
    found = []
    for arg in args:
        name, equals, value = arg.partition("=")
        found.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if re.match(r"--[A-Za-z]", arg) else arg)
    return found


def _first_sentence(doc: str) -> str:
    """Up to the first full stop, as a line of a list: "Write samples of a model." is "write samples of a model"."""
    text = re.split(r"\.(?:\s|$)", " ".join(doc.split("\n\n")[0].split()))[0]
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _can_be_mended(error: Exception) -> bool:
    """Whether the message says it all: errors that are raised for the user, and those of files, disks and imports."""
    if isinstance(error, OSError | FloatingPointError | ImportError | ValueError):
        return True
    # of modules that import torch
    return bool({kind.__name__ for kind in type(error).__mro__} & {"NonFiniteLossError", "MisconfigurationException"})


if __name__ == "__main__":
    main()
