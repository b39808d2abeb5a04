"""`--imports` and `imports:`: modules of the user's own, imported before anything is looked up by name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence

from mfm_lightning.commands.errors import CommandLineError

_imported: dict[str, None] = {}  # in their order


def split_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--imports`, and the modules that it names.

    Raises:
        CommandLineError: if it names none.
    """
    others: list[str] = []
    modules: list[str] = []
    waiting = list(args)
    while waiting:
        arg = waiting.pop(0)
        name, equals, value = arg.partition("=")
        if name not in ("--imports", "--imports+"):
            others.append(arg)
            continue
        if not equals and not waiting:
            raise CommandLineError("--imports needs the name of a module: mfm ... --imports my_rewards")
        given = (value if equals else waiting.pop(0)).strip("[]").split(",")
        modules += filter(None, (module.strip() for module in given))
    return others, modules


def import_modules(names: Sequence[str]) -> None:
    """Import modules of the user's own, from the current folder or where Python finds them; what they register then has
    a name.

    Raises:
        CommandLineError: if a module is not there; what a module raises is raised.
    """
    for name in filter(None, (name.strip() for name in names)):
        if name.endswith(".py") or os.sep in name:
            raise CommandLineError(f"imports: {name} is a file: give the module's name, {_module_of(name)!r}")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
            raise CommandLineError(
                f"imports: no module {name!r} in {os.getcwd()} or among Python's packages"
            ) from error
        _imported[name] = None


def imported_modules() -> list[str]:
    """The modules of the user's own that this process was told to import: what another one that goes on with its work
    must import, too."""
    return list(_imported)


def _module_of(path: str) -> str:
    return path.removesuffix(".py").strip("./").replace(os.sep, ".")
