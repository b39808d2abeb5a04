"""Every option of a config or a command has a help text of its own; a config's are entries of `Args:` sections.

A config names the subclasses of `ROOTS`, the networks and the rewards; and what their constructors' types ask for.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import sys
import typing

import lightning as L
import pytest
from docstring_parser import parse
from lightning.pytorch.strategies import Strategy

import mfm_benchmarks
import mfm_lightning
import mfm_rewards
from mfm_benchmarks.command import _how
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suite import Suite
from mfm_lightning.checkpoints import SOURCES
from mfm_lightning.commands.main import commands, run
from mfm_lightning.commands.options import parser_of
from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.preparation import Preparation
from mfm_lightning.metrics.classifier import SmallClassifier
from mfm_lightning.metrics.inception import FEATURES
from mfm_lightning.networks import NETWORKS, VALUE_NETWORKS
from mfm_lightning.samplers import METHODS
from mfm_lightning.sampling import OUTPUTS
from mfm_lightning.sampling.model_sampler import KINDS
from mfm_rewards.execution import Precision
from mfm_rewards.registry import factory

PACKAGES = (mfm_lightning, mfm_rewards, mfm_benchmarks)
ROOTS = (L.LightningModule, L.LightningDataModule, L.Callback, Strategy, Suite, Quality, SmallClassifier)
# these have options without help still; one that has none left must be taken out


def ours(made: typing.Any) -> bool:
    public = not made.__name__.startswith("_")
    return public and made.__module__.split(".")[0] in {package.__name__ for package in PACKAGES}


def defined() -> list[type]:
    """All public classes of the packages."""
    found = {}
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for made in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(made) and ours(made):
                    found[made.__module__, made.__qualname__] = made
    return list(found.values())


def constructor(made: typing.Any) -> typing.Any:
    """What a class is called by, or a function itself; None for a constructor that is not ours."""
    if not inspect.isclass(made):
        return made
    owner = next(c for c in made.__mro__ if "__init__" in vars(c))
    return owner.__init__ if ours(owner) else None


def classes_in(hint: typing.Any) -> set[type]:
    """The classes that a type hint speaks of, inside of unions, lists and so on, too."""
    if inner := typing.get_args(hint):
        return set().union(*map(classes_in, inner))
    return {hint} if inspect.isclass(hint) else set()


def configurable() -> list[typing.Any]:
    """Classes, and functions that make rewards, with options that a config can set."""
    known = defined()
    rewards = [made for made in map(factory, mfm_rewards.available()) if ours(made)]
    waiting = [made for made in known if issubclass(made, ROOTS)]
    waiting += [*NETWORKS.values(), *VALUE_NETWORKS.values(), *rewards]
    found: dict[str, typing.Any] = {}
    while waiting:
        made = waiting.pop()
        name = f"{made.__module__}.{made.__qualname__}"
        if name in found or made is Spec or constructor(made) is None:  # a Spec is YAML, read when it is used
            continue
        found[name] = made
        hints = typing.get_type_hints(constructor(made)).values()
        asked = tuple(c for hint in hints for c in classes_in(hint) if ours(c))
        waiting += [c for c in known if issubclass(c, asked)]
    return [found[name] for name in sorted(found) if inspect.signature(found[name]).parameters]


def described(made: typing.Any) -> set[str]:
    """The options with an entry in `Args:`, as jsonargparse finds them: also a base class's."""
    docs = [c.__doc__ for c in made.__mro__ if ours(c)] if inspect.isclass(made) else [made.__doc__]
    return {p.arg_name for doc in docs for p in parse(doc or "").params if p.description}


def name_of(made: typing.Any) -> str:
    return made.__name__


@pytest.mark.parametrize("made", configurable(), ids=name_of)
def test_every_option_has_a_help_text(made):
    options = list(inspect.signature(made).parameters)
    assert [name for name in options if name not in described(made)] == []


def test_help_of_a_class_shows_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mfm"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match=r"^0$"):
        run(["fit", "--data.help", "mfm_lightning.data.LatentShards"])
    shown = capsys.readouterr().out
    for entry in parse(LatentShards.__doc__).params:
        assert " ".join(entry.description.split()) in " ".join(shown.split())


TOOLS = {name: point.load() for name, point in commands().items()}


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_every_option_of_a_command_has_a_help_text(name):
    # demo takes the options of `mfm fit`, and benchmark those of a suite
    tool = {"demo": None, "benchmark": _how}.get(name, TOOLS[name])
    actions = parser_of(tool, name)._actions if tool else []
    assert [action.dest for action in actions if not action.help] == []


@pytest.mark.parametrize(
    ("light", "heavy"),
    [
        (("fid", "num_features"), FEATURES),
        (("sample", "format"), sorted(OUTPUTS)),
        (("sample", "sampler"), KINDS),
        (("sample", "method"), METHODS),
        (("sample", "precision"), typing.get_args(Precision)),
        (("prepare-latents", "precision"), typing.get_args(Precision)),
        (("import", "source"), SOURCES),
    ],
)
def test_a_command_offers_what_there_is(light, heavy):
    """A command says its choices without importing what knows them."""
    name, option = light
    kind = inspect.signature(TOOLS[name], eval_str=True).parameters[option].annotation
    choices = {
        c for k in (kind, *typing.get_args(kind)) if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)
    }
    assert choices == set(heavy)


def test_a_command_has_the_defaults_of_what_it_calls():
    defaults = {p.name: p.default for p in inspect.signature(TOOLS["prepare-latents"]).parameters.values()}
    for field in dataclasses.fields(Preparation):
        assert field.name in ("inputs", "output") or defaults[field.name] == field.default, field.name
