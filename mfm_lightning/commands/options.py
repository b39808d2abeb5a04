"""A command's options from its function: each parameter is an option, each line of `Args:` its help."""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, set_loader
from jsonargparse._loaders_dumpers import get_loader_exceptions, yaml_load

from mfm_lightning.commands.errors import CommandLineError, explain
from mfm_lightning.utils.configs import check_keys


def load_yaml(text: str) -> Any:
    """As jsonargparse reads YAML, refusing what would lose a part (`check_keys`); `None` is null, for so jsonargparse
    writes it when it hands `--model.optimization.final_learning_rate null` on to the class inside."""
    if text.strip() == "None":
        return None
    check_keys(text)
    return yaml_load(text)


def strict_yaml() -> None:
    """Have all parsers read values, and the files that options name, by `load_yaml`."""
    set_loader("yaml", load_yaml, exceptions=get_loader_exceptions("yaml"))


def parse(tool: Callable[..., Any], command: str, args: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """What the command line gives for a function's parameters: positional ones, and keywords.

    Raises:
        CommandLineError: for an option that there is not, a value that does not fit, or one that is missing; for an
            option of several values that stands twice, of which parsers take the last.
        SystemExit: with status 0, for --help.
    """
    parser = parser_of(tool, command)
    for action in parser._actions:
        names = [name for name in action.option_strings if action.nargs == "*"]
        if sum(arg.split("=")[0] in names for arg in args) > 1:
            name = names[0]
            raise CommandLineError(
                f"{name} stands twice, and the first would be lost: give its values after each other, {name} A B"
            )
    values = vars(parsed(parser, args))
    parameters = inspect.signature(tool).parameters.values()
    positional = [values[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return positional, {p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}


def parsed(parser: ArgumentParser, args: Sequence[str]) -> Any:
    """The parser's namespace; raises as `parse`."""
    try:
        return parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        keys = [action.dest for action in parser._actions]
        raise CommandLineError(f"{explain(str(error), keys)} ({parser.prog} --help tells all)") from error


def parser_of(tool: Callable[..., Any], command: str) -> ArgumentParser:
    """The parser of a function: positional parameters are positional, keyword-only ones are options, `bool` ones are
    switches (`--NAME`, `--no_NAME`), and those of lists take several values."""
    strict_yaml()
    about = parse_docstring(inspect.getdoc(tool) or "").description
    parser = ArgumentParser(
        prog=command, description=about, exit_on_error=False, allow_abbrev=False, formatter_class=HelpFormatter
    )
    add_options(parser, tool)
    return parser


def add_options(parser: ArgumentParser, tool: Callable[..., Any]) -> None:
    """Add a function's parameters to a parser."""
    docs = parse_docstring(inspect.getdoc(tool) or "")
    help_of = {p.arg_name: " ".join((p.description or "").split()) for p in docs.params}
    for parameter in inspect.signature(tool, eval_str=True).parameters.values():
        add_option(parser, parameter, help_of.get(parameter.name, ""))


def help_only(tool: Callable[..., Any]) -> str:
    """The options of a function as help shows them, without usage and description."""
    shown = parser_of(tool, "").format_help()
    return shown[shown.index("options:") :]


def add_option(parser: ArgumentParser, parameter: inspect.Parameter, about: str) -> None:
    """Add a function's parameter to a parser."""
    required, kind = parameter.default is parameter.empty, parameter.annotation
    settings: dict[str, Any] = {"help": about}
    plain = _not_none(kind)
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        settings |= {"type": kind} if required else {"type": kind, "nargs": "?", "default": parameter.default}
        parser.add_argument(parameter.name, **settings)
        return
    settings |= {"required": True} if required else {"default": parameter.default}
    if plain is bool:
        parser.add_argument(f"--{parameter.name}", action=ActionYesNo, **settings)
        return
    if typing.get_origin(plain) is list:
        settings |= {"type": typing.get_args(plain)[0], "nargs": "*"}
    else:
        settings |= {"type": kind}
    parser.add_argument(f"--{parameter.name}", **settings)


def _not_none(kind: Any) -> Any:
    """T of `T | None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        others = [k for k in typing.get_args(kind) if k is not type(None)]
        return others[0] if len(others) == 1 else kind
    return kind


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with what is taken if an option is left out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, "") or isinstance(action.default, bool) or action.required:
            return text.replace("%", "%%")
        return f"{text} (default: {action.default})".replace("%", "%%")
