"""What went wrong, in a line or two: jsonargparse's messages cut down, the nearest right name, the user's own line."""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
import site
import sysconfig
import types
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from mfm_lightning.utils.names import nearest

_KEY = re.compile(r'(?:Parser key|Key) "(?P<key>[^"]+)":(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':(?P<rest>.*)")
_NOISE = re.compile(
    r"Does not validate against any of|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")


class CommandLineError(ValueError):
    """Options that the command does not know, or values that they do not take."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """`what` is unknown; with the nearest name, else with all."""
    known = sorted(known)
    if meant := nearest(name, known):
        return f"unknown {what} {name!r}: did you mean {meant!r}?"
    return f"unknown {what} {name!r}: known are {', '.join(known)}"


def explain(message: str, options: Iterable[str] = ()) -> str:
    """A message of jsonargparse's in a line or two: the key that it is about, what is wrong, and what is right.

    Args:
        message: as raised; of unions it lists each kind that did not fit, inside of each other, and the whole config.
        options: the command's own keys, such as "trainer.max_steps".
    """
    options = list(options)
    if (found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)) is not None:
        return _unrecognized(found[1].split(), options)
    if found := re.search(r"does not accept option '([^']+)'|^Option '([^']+)' is not accepted$", message):
        return _not_an_option(found[1] or found[2], options)
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"{_and(found[1].split(', '))} must be given"
    if found := re.match(r"(?:Problems parsing config|Unable to load config.*?): (.*)", message, re.DOTALL):
        return f"the config is no YAML: {' '.join(found[1].split())}"
    if message.startswith("Unexpected config:"):
        return "the config holds no settings: expected sections such as model, data and trainer"
    reasons = list(dict.fromkeys(_reasons(message)))
    return "; ".join(reasons) if reasons else message


def _reasons(message: str) -> Iterator[str]:
    """The leaves of the message's tree, each with the keys and classes that it stands under."""
    values = re.findall(r"^ *Given value: ([^\s({\[]+)$", message, re.MULTILINE)
    given = values[0] if values else None  # the innermost one, where it is no structure
    above: list[tuple[int, str, str]] = []  # indentation, kind, name
    wanted: dict[int, list[str]] = {}  # types that were tried, by indentation
    for line in filter(str.strip, message.splitlines()):
        bare = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip()) + (1 if line.strip().startswith("- ") else 0)
        above = [level for level in above if level[0] < indent]
        if bare.startswith("Subtypes:"):
            wanted[indent] = re.findall(r"<class '([\w.]+)'>", bare)
        for kind, pattern in (("key", _KEY), ("class", _CLASS)):
            if found := pattern.match(bare):
                above.append((indent, kind, found[1]))
                bare = found["rest"].strip()
        if not bare or _NOISE.match(bare):
            continue
        keys = ".".join(name for _, kind, name in above if kind == "key")
        inside = next((name for _, kind, name in reversed(above) if kind == "class"), None)
        classes = [name for tried in wanted.values() for name in tried]
        if reason := _reason(bare, inside, classes, given):
            yield f"{keys}: {reason}" if keys else reason


def _reason(bare: str, inside: str | None, classes: list[str], given: str | None) -> str:
    """One leaf in plain words.

    Args:
        inside: path of the class whose arguments are spoken of.
        classes: paths of the classes that were possible.
        given: the value, where it stands elsewhere in the message.
    """
    if found := re.match(r"Option '([^']+)' is not accepted|unrecognized arguments: --([\w.]+)", bare):
        return _no_option(inside, found[1] or found[2]) if inside else bare
    if found := re.match(r"module '([^']+)' has no attribute '([^']+)'", bare):
        return f"{found[1]} has no {found[2]}{_meant(found[2], _public(found[1]))}"
    if found := re.match(r"Expected a dot import path string: (.*)", bare):
        known = {c.__name__ for path in classes for c in subclasses(path)}
        return unknown("class", found[1], known) if known else f"{found[1]!r} is not the path of a class"
    if found := re.match(r"the following arguments are required: (.*)", bare):
        return f"{inside or 'it'} needs {_and(found[1].split(', '))}"
    if found := _EXPECTED.match(bare):
        value = given if found["value"] is None else found["value"]
        if value is not None and (nested := re.match(r"\W*NestedArg\(key='([^']+)'", value)):
            return f"it is {_type(found['type'])}, and has no {nested[1]!r}"
        return f"expected {_type(found['type'])}" if value is None else f"{value!r} is not {_type(found['type'])}"
    return bare


def _no_option(inside: str, key: str) -> str:
    """A class has no such option: where a key of several parts goes wrong, and what was meant there."""
    made, parts, right = _imported(inside), key.split("."), []
    while len(parts) > 1 and (kind := _class_of(_arguments(made).get(parts[0]))) is not None:
        made, right = kind, [*right, parts.pop(0)]
    known = _arguments(made)
    wrong = parts if parts[0] in known else parts[:1]  # one that is there, and is no class, has no parts
    under = {".".join((*right, name, part)) for name, kind in known.items() for part in _arguments(_class_of(kind))}
    deeper = sorted(name for name in under if name.rpartition(".")[2] == wrong[0])
    meant = f": did you mean {deeper[0]!r}?" if len(deeper) == 1 else _meant(wrong[0], known)
    return f"{inside} has no option {'.'.join([*right, *wrong])!r}{'' if wrong is parts else meant}"


def _class_of(annotation: Any) -> type | None:
    """The class of our own or the user's that an annotation allows, None aside."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if inspect.isclass(kind) and kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0].__module__ != "builtins" else None


def _type(text: str) -> str:
    """A type as people say it."""
    text = re.sub(r"<class '([\w.]+)'>", lambda found: found[1].rsplit(".", 1)[-1], text)
    text = re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", text)
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "Path": "a path"}
    return names.get(text, text if text.startswith("one of") else f"a {text}")


def _unrecognized(given: list[str], options: list[str]) -> str:
    flags = [text.partition("=")[0].removeprefix("--") for text in given if text.startswith("--")]
    if not flags:
        return f"{' '.join(given)!r} is not an option: options begin with --"
    return _not_an_option(flags[0], options, "--")


def _not_an_option(key: str, options: list[str], dashes: str = "") -> str:
    """A key of the command's own that is not there: the part of it that is wrong decides what was meant."""
    parts = key.split(".")
    for depth in range(len(parts)):
        under = ".".join(parts[:depth])
        known = {
            o.split(".")[depth] for o in options if o.split(".")[:depth] == parts[:depth] and o.count(".") >= depth
        }
        if parts[depth] not in known:
            full = ".".join(parts[: depth + 1])
            meant = nearest(parts[depth], known)
            hint = f": did you mean {dashes}{'.'.join(filter(None, (under, meant)))}?" if meant else ""
            return f"unknown option {dashes}{full}{hint}"
    return f"unknown option {dashes}{key}"


def _meant(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    meant = nearest(name, known)
    if meant:
        return f": did you mean {meant!r}?"
    return f": it has {', '.join(known)}" if 0 < len(known) <= 12 else ""


def _and(names: list[str]) -> str:
    *others, last = [name.removeprefix("--").split(".")[-1] for name in names]
    return f"{', '.join(others)} and {last}" if others else last


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _public(module: str) -> list[str]:
    try:
        found = vars(importlib.import_module(module))
    except ImportError:
        return []
    return [name for name, value in found.items() if callable(value) and not name.startswith("_")]


def arguments_of(path: str) -> list[str]:
    """Names of a class's arguments, also of those that it passes on to its base class."""
    return list(_arguments(_imported(path)))


def _arguments(made: Any) -> dict[str, Any]:
    """Of a class or a function by name with their types; none of what has no signature that can be read."""
    if not callable(made):
        return {}
    from jsonargparse._parameter_resolvers import get_signature_parameters  # what the parser itself goes by

    found = get_signature_parameters(made, "__init__" if inspect.isclass(made) else None)
    return {parameter.name: parameter.annotation for parameter in found}


def subclasses(path: str) -> Iterator[type]:
    """A class's concrete subclasses that are imported, and itself."""
    made = _imported(path)
    waiting = [made] if inspect.isclass(made) else []
    while waiting:
        made = waiting.pop()
        waiting += made.__subclasses__() if made is not type else []
        if not inspect.isabstract(made) and not made.__name__.startswith("_"):
            yield made


def users_line(error: BaseException) -> str | None:
    """Where the user's own code raised: file, line and function of the innermost frame that is no package's, and its
    text; None where no such code ran."""
    found = None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # the cause is nearer to what went wrong than what was made of it
        found = _last_of_users(error.__traceback__) or found
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)  # type: ignore[assignment]
    return found


def _last_of_users(traceback: types.TracebackType | None) -> str | None:
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if is_users_file(code.co_filename):
            text = linecache.getline(code.co_filename, traceback.tb_lineno).strip()
            found = f"{code.co_filename}:{traceback.tb_lineno} in {code.co_name}: {text}"
        traceback = traceback.tb_next
    return found


def is_users_file(name: str) -> bool:
    """Whether a source file belongs to neither Python, nor an installed package, nor us."""
    if name.startswith("<") or not Path(name).is_file():
        return False
    path = Path(name).resolve()
    return not any(path.is_relative_to(place) for place in _places_of_others())


def _places_of_others() -> list[Path]:
    found = [find_spec(name) for name in ("mfm_lightning", "mfm_rewards", "mfm_benchmarks")]
    ours = [Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None]
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    return [Path(p).resolve() for p in (*ours, *installed, *site.getsitepackages(), site.getusersitepackages())]
