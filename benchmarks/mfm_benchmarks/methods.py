"""Methods of a comparison as a YAML describes them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_benchmarks.fitting import Fit, FitSettings
from mfm_benchmarks.models import ModelSettings
from mfm_benchmarks.spec import Spec, build, plain
from mfm_lightning.alignment import AlignmentMethod
from mfm_rewards.registry import nearest

FITTED = "FITTED"


@dataclass
class MethodSettings:
    """A method, at one or several costs.

    Args:
        method: `{class_path: ..., init_args: {...}}` of an `AlignmentMethod`; those here go by their bare names.
        sweep: keys of `init_args`, dotted, each with values; the k-th values of all keys make the k-th point, cheapest
            first.
        fit: what is trained first, for each reward and multiplier, in a folder of its own to which `file` is relative;
            in the settings, `FITTED` stands for the file's path.
        rewards: only for these; for all where None.
        quick: whether --quick has it.
    """

    method: Spec
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    fit: FitSettings | None = None
    rewards: list[str] | None = None
    quick: bool = True


@dataclass(frozen=True, eq=False)  # each is itself alone
class Point:
    """One setting of a method, its `settings` as JSON: `label` tells it from the others of its line."""

    method: str
    label: str
    settings: str
    fit: FitSettings | None = None

    @property
    def name(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method

    def build(self, fitted: str | None = None) -> AlignmentMethod:
        """The method; `fitted` is the trained file."""
        text = self.settings if fitted is None else self.settings.replace(f'"{FITTED}"', json.dumps(fitted))
        return build_method(json.loads(text), self.method)


def points(name: str, settings: MethodSettings) -> Iterator[Point]:
    """The settings of a method's sweep.

    Raises:
        ValueError: if the sweep's keys have different numbers of values.
    """
    lengths = {len(values) for values in settings.sweep.values()}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"method {name!r}: give all keys of the sweep the same number of values, at least one")
    for k in range(lengths.pop() if lengths else 1):
        method, words = copy.deepcopy(settings.method.value), []
        for key, values in settings.sweep.items():
            *path, last = key.split(".")
            place = method.setdefault("init_args", {})
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(f"method {name!r}: the sweep's {key!r} leads into {part!r}, which is {place!r}")
            place[last] = values[k]
            words.append(f"{last.removeprefix('num_')} {values[k]}")
        check_class(method, name)
        yield Point(name, ", ".join(words), json.dumps(method, sort_keys=True), settings.fit)


def build_method(settings: dict[str, Any], name: str = "method") -> AlignmentMethod:
    """An `AlignmentMethod` of its `class_path` and `init_args`.

    Raises:
        ValueError: if there is no such class (the nearest is suggested), or the settings do not fit it.
    """
    check_class(settings, name)
    return build(AlignmentMethod, settings, f"method {name!r}")


def check_class(settings: dict[str, Any], name: str) -> None:
    """Raise ValueError unless `class_path` is there and, as a bare name, known."""
    path = settings.get("class_path")
    if not path:
        raise ValueError(f"method {name!r} needs a class_path, got {', '.join(settings) or 'nothing'}")
    known = {kind.__name__: kind for kind in _subclasses(AlignmentMethod)}
    if "." not in path and path not in known:
        raise ValueError(
            f"method {name!r}: unknown class {path!r}: did you mean {nearest(path, known)!r}? Known are "
            f"{', '.join(sorted(known))}, or give the full path of your own"
        )


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def job(settings: FitSettings, folder: Path, model: ModelSettings, reward: Any, scale: float) -> Fit:
    """The training job of a method for one reward and multiplier, in `folder`, on what the suite runs on."""
    target = "model.init_args.target"
    options = {
        "trainer.default_root_dir": str(folder),
        "trainer.logger": False,
        f"{target}.model": model.file,
        f"{target}.reward": reward,
        f"{target}.reward_scale": scale,
    }
    for key in ("decoder", "guidance", "prompts", "class_names"):
        if (value := getattr(model, key)) is not None:
            options[f"{target}.{key}"] = plain(value)
    return Fit(settings.config, str(folder / settings.file), options | settings.given, [model.file], remember=True)
