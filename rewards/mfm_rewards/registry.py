"""Rewards by name: the ones here, the user's own, and those of installed packages (entry points)."""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import logging
import sys
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, overload

from torch import nn

from mfm_rewards.execution import OPTIONS
from mfm_rewards.protocol import Reward, RewardError, as_reward, nearest

log = logging.getLogger(__name__)
ENTRY_POINTS = "mfm_lightning.rewards"
Factory = TypeVar("Factory", bound=Callable[..., Any])

_FACTORIES: dict[str, Callable[..., Any]] = {}


@overload
def register(name: str) -> Callable[[Factory], Factory]: ...
@overload
def register(name: str, factory: Factory) -> Factory: ...
def register(name: str, factory: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Make a reward known by `name`; as a decorator, or with the factory as second argument.

    A class is a factory: `build(name, **options)` calls it with the options. So is a function without a required
    parameter. A function that takes `images` (its first, required parameter) is a reward itself and has no options.

    Raises:
        ValueError: if the name is taken by something else.
    """

    def add(factory: Callable[..., Any]) -> Callable[..., Any]:
        known = _FACTORIES.get(name)
        if known is not None and _place(known) != _place(factory):
            raise ValueError(f"reward {name!r} is registered already, as {_place(known)}")
        _FACTORIES[name] = factory
        return factory

    return add if factory is None else add(factory)


def _place(factory: Callable[..., Any]) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def _load_plugins() -> None:
    """Add the rewards of installed packages; one that is malformed or hidden by another of its name is named."""
    for point in sorted(entry_points(group=ENTRY_POINTS), key=_origin):
        known = _FACTORIES.get(point.name)
        if point in _SEEN or (isinstance(known, _Plugin) and known.point == point):
            continue
        _SEEN.append(point)
        try:
            made = _Plugin(point)
        except Exception as error:  # of whatever a package's metadata says
            log.warning("reward %r of %s is left out: %r is no module:name (%s)", point.name, _origin(point),
                        point.value, error)  # fmt: skip
            continue
        if known is not None and _place(known) != _place(made):
            other = _origin(known.point) if isinstance(known, _Plugin) else _place(known)
            log.warning("reward %r of %s is hidden by %s; %s names it", point.name, _origin(point), other,
                        point.value.replace(":", "."))  # fmt: skip
        else:
            _FACTORIES[point.name] = made


_SEEN: list[EntryPoint] = []  # of which has been spoken


def _origin(point: EntryPoint) -> str:
    """The package that an entry point is of."""
    return f"the package {point.dist.name}" if point.dist is not None else point.value


class _Plugin:
    """A reward of an installed package, imported when it is first asked for."""

    def __init__(self, point: EntryPoint) -> None:
        self.point, self.__module__, self.__qualname__ = point, point.module, point.attr
        if not point.attr:
            raise ValueError("no name after a colon")
        self.__doc__ = f"from {point.value}"

    def load(self) -> Any:
        """The class or function; raises RewardError if it cannot be imported."""
        try:
            return self.point.load()
        except Exception as error:  # whatever the package's own code raises
            raise RewardError(
                f"reward {self.point.name!r} of {_origin(self.point)} cannot be imported from {self.point.value}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def __call__(self, **options: Any) -> Any:
        target = self.load()
        return target if _is_reward_itself(target) and not options else target(**options)


def _is_reward_itself(target: Callable) -> bool:
    if inspect.isclass(target) or isinstance(target, _Plugin):
        return False
    first = next(iter(inspect.signature(target).parameters.values()), None)
    return first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) and (
        first.default is first.empty
    )  # fmt: skip


def available() -> dict[str, str]:
    """Names of all known rewards, each with the first paragraph of its description."""
    _load_plugins()
    return {
        name: " ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()) for name, f in sorted(_FACTORIES.items())
    }


def factory(name: str) -> Callable[..., Any]:
    """What `name` stands for: a class, a function, or an installed package's reward that is not imported yet.

    Args:
        name: a registered name, or the path of what is registered under none, "my_module.my_reward".

    Raises:
        RewardError: if the name is unknown (the nearest known one is suggested), or the path leads nowhere.
    """
    _load_plugins()
    if name not in _FACTORIES:
        if "." in name:
            return _imported(name)
        known = ", ".join(sorted(_FACTORIES))
        raise RewardError(f"unknown reward {name!r}: did you mean {nearest(name, _FACTORIES)!r}? Known are {known}")
    return _FACTORIES[name]


def build(name: str | dict[str, Any] | Callable, **options: Any) -> Reward:
    """A reward by its registered name and options; also from what a YAML holds.

    Args:
        name: a registered name; or a dictionary, `{"name": ..., options}`, `{"class_path": ..., options}` or
            `{"class_path": ..., "init_args": options}`; or a reward already built, which comes back as it is.
        **options: of the reward.

    Raises:
        RewardError: if the name is unknown (the nearest known one is suggested) or the options do not fit.
    """
    if isinstance(name, dict):
        return _build_from_dict(name, options)
    if not isinstance(name, str):
        return as_reward(name)
    return _call(factory(name), name, options)


def _build_from_dict(settings: dict[str, Any], options: dict[str, Any]) -> Reward:
    settings = {**settings, **options}
    if "class_path" in settings:
        path = settings["class_path"]
        factory = _imported(path)
        others = {key: value for key, value in settings.items() if key not in ("class_path", "init_args")}
        return _call(factory, path, {**others, **dict(settings.get("init_args") or {})})
    if "name" not in settings:
        raise RewardError(f"a reward needs a 'name' or a 'class_path', got {', '.join(settings) or 'nothing'}")
    settings = dict(settings)
    name = settings.pop("name")
    return build(name, **{**settings, **dict(settings.pop("options", None) or {})})


def _imported(path: str) -> Callable[..., Any]:
    """What stands at "module.name"."""
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"reward class_path {path!r} cannot be imported: {error}") from error
    if not _makes_a_reward(found):
        raise RewardError(
            f"reward class_path {path!r} is not called, for it is no reward: expected a function whose first argument "
            "is images, a subclass of Reward or torch.nn.Module, or a function that says it returns one (-> Reward)"
        )
    return found


def _makes_a_reward(target: Any) -> bool:
    """Whether a thing that a config names by its path is a reward, or would make one: nothing else is called."""
    if isinstance(target, nn.Module):
        return True
    named = inspect.isroutine(target) or inspect.isclass(target)
    if named and str(getattr(target, "__module__", "")).split(".")[0] in (*sys.stdlib_module_names, "posix", "nt"):
        return False  # such as os.remove, whose first argument is required, too
    if inspect.isclass(target):
        call = inspect.getattr_static(target, "__call__", None)
        return issubclass(target, nn.Module) or (
            inspect.isfunction(call) and "images" in inspect.signature(call).parameters
        )
    if not callable(target):
        return False
    try:
        if _is_reward_itself(target):
            return True
        returned = inspect.signature(target, eval_str=True).return_annotation
    except (TypeError, ValueError, NameError):  # a function of C without a signature, or names that are not there
        return False
    kind = typing.get_origin(returned) or returned
    return (
        kind is Callable or kind is collections.abc.Callable or (inspect.isclass(kind) and issubclass(kind, nn.Module))
    )


def check_options(factory: Callable[..., Any], name: str, options: Mapping[str, Any], complete: bool = True) -> None:
    """Refuse options that a reward does not have.

    Args:
        factory: what `name` stands for.
        name: of the reward, for messages.
        options: by name.
        complete: whether those without a default must be among them.

    Raises:
        RewardError: with the nearest option's name, and all that there are.
    """
    if isinstance(factory, _Plugin):
        factory = factory.load()
    if _is_reward_itself(factory):
        if options:
            raise RewardError(f"reward {name!r} is a function of images and has no options, got {', '.join(options)}")
        return
    signature = inspect.signature(factory)
    known = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if not takes_all and (strange := [option for option in options if option not in known]):
        if moved := _moved(signature, options):
            raise RewardError(f"options of reward {name!r} do not fit:{moved}")
        meant = difflib.get_close_matches(strange[0], known, n=1)
        hint = f"did you mean {meant[0]!r}? It has" if meant else "it has"
        has = f"{hint} {', '.join(known)}" if known else "it has none"
        raise RewardError(f"options of reward {name!r} do not fit: no option {strange[0]!r}; {has}")
    try:
        signature.bind(**options) if complete else signature.bind_partial(**options)
    except TypeError as error:
        raise RewardError(f"options of reward {name!r} do not fit: {error}") from error


def _call(factory: Callable, name: str, options: dict[str, Any]) -> Reward:
    check_options(factory, name, options)
    if not isinstance(factory, _Plugin) and _is_reward_itself(factory):
        return as_reward(factory, name)
    try:
        return as_reward(factory(**options), name)
    except RewardError:
        raise
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise RewardError(f"reward {name!r} cannot be built: {error}") from error


def _moved(signature: inspect.Signature, options: Mapping[str, Any]) -> str:
    """A hint for options that stand beside `execution`, and belong under it."""
    names = [name for name in options if name in OPTIONS and name not in signature.parameters]
    if not names or "execution" not in signature.parameters:
        return ""
    given = ", ".join(f"{name}: {options[name]}" for name in names)
    return f" ({', '.join(names)}: now under execution, as in execution: {{{given}}})"
