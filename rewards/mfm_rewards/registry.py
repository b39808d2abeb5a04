"""Rewards by name: the ones here, the user's own, and those of installed packages (entry points)."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, overload

from mfm_rewards.execution import OPTIONS
from mfm_rewards.protocol import Reward, RewardError, as_reward, nearest

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
    for point in entry_points(group=ENTRY_POINTS):
        if point.name not in _FACTORIES:
            _FACTORIES[point.name] = _Plugin(point)


class _Plugin:
    """A reward of an installed package, imported when it is first asked for."""

    def __init__(self, point: EntryPoint) -> None:
        self.point, self.__module__, self.__qualname__ = point, point.module, point.attr
        self.__doc__ = f"from {point.value}"

    def __call__(self, **options: Any) -> Any:
        target = self.point.load()
        return target if _is_reward_itself(target) and not options else target(**options)


def _is_reward_itself(target: Callable) -> bool:
    if inspect.isclass(target) or isinstance(target, _Plugin):
        return False
    first = next(iter(inspect.signature(target).parameters.values()), None)
    return first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) and (
        first.default is first.empty
    )  # fmt: skip


def available() -> dict[str, str]:
    """Names of all known rewards, each with the first line of its description."""
    _load_plugins()
    return {name: (inspect.getdoc(f) or "").split("\n")[0] for name, f in sorted(_FACTORIES.items())}


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
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"reward class_path {path!r} cannot be imported: {error}") from error


def check_options(factory: Callable[..., Any], name: str, options: Mapping[str, Any], complete: bool = True) -> None:
    """Refuse options that a reward does not have.

    Args:
        factory: what `name` stands for.
        complete: whether those without a default must be among them.

    Raises:
        RewardError: with the nearest option's name, and all that there are.
    """
    if isinstance(factory, _Plugin):
        factory = factory.point.load()
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
