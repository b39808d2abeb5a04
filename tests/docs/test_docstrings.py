"""Docstrings tell no lies: what they name as arguments exists, and each public name has its place in the API reference.

`ruff check` has the first for functions alone (DOC102), and asks that an `Args:` section names every argument (D417,
in the public rooms); here classes and their fields are among them.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mfm_rewards

griffe = pytest.importorskip("griffe")

ROOT = Path(__file__).parents[2]
PACKAGES = {"mfm_lightning": ".", "mfm_rewards": "rewards", "mfm_benchmarks": "benchmarks"}
REFERENCE = "\n".join(page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md")))
ENTRIES = set(re.findall(r"^::: ([\w.]+)", REFERENCE, re.MULTILINE))


@pytest.fixture(scope="module")
def loader() -> Any:
    return griffe.GriffeLoader(search_paths=[ROOT / path for path in PACKAGES.values()])


def members(owner: Any) -> Iterator[Any]:
    """All functions and classes under a module, those of other modules left out."""
    for member in owner.members.values():
        if member.is_alias:
            continue
        if member.is_function or member.is_class:
            yield member
        if member.is_class or member.is_module:
            yield from members(member)


def documented(docstring: Any) -> list[str]:
    sections = docstring.parse("google", warnings=False)
    return [entry.name for section in sections if section.kind.value == "parameters" for entry in section.value]


def accepted(owner: Any) -> set[str]:
    """Names that a function takes, or a class when it is called: of its fields, too, where it has no `__init__`."""
    names = {parameter.name.lstrip("*") for parameter in owner.parameters}
    if owner.is_class:
        fields = {name for name, member in owner.all_members.items() if member.is_attribute}
        names |= fields if not names or owner.bases else set()
        for base in owner.resolved_bases:
            names |= accepted(base)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_arguments_that_a_docstring_names_exist(package, loader):
    loader.load(package)
    lies, seen = [], 0
    for owner in members(loader.modules_collection[package]):
        named = documented(owner.docstring) if owner.docstring else []
        seen += len(named)
        unknown = {name.lstrip("*") for name in named} - accepted(owner)
        lies += [f"{owner.path}: {name}" for name in sorted(unknown)]
    assert seen > 100
    assert lies == []


def test_every_public_name_is_in_the_api_reference():
    stub = ast.parse((ROOT / "mfm_lightning/__init__.pyi").read_text())
    public = {
        alias.asname or alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert len(public) > 60
    entries = {entry.rsplit(".", 1)[1] for entry in ENTRIES}
    assert sorted(public - entries - {"__version__"}) == []
    rewards = {f"mfm_rewards.{name}" for name in mfm_rewards.__all__}
    assert sorted(rewards - ENTRIES) == []


def test_every_command_shows_its_options():
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mfm_lightning.commands"]
    shown = re.findall(r"<!-- mfm ([\w-]+) --help -->", (ROOT / "docs/commands.md").read_text())
    assert sorted(shown) == sorted([*commands, "fit"])
