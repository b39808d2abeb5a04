"""Where configs are: in the current folder, else those that come with the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mfm_lightning.utils.names import nearest

_PACKAGE = Path(__file__).parents[1]
# a wheel has them inside the package, a clone beside it
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
DEFAULTS = SHIPPED / "defaults.yaml"  # what every job starts from


def find_config(name: str | Path) -> Path:
    """The file at a path; where there is none, the config of that name, such as "digits/mfm" or
    "configs/digits/mfm.yaml": in the folder `configs` here, then among those of the package.

    Raises:
        FileNotFoundError: if it is nowhere; with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_absolute():
        named = _in_configs(path)
        if named.suffix not in (".yaml", ".yml", ".json"):
            named = named.with_name(f"{named.name}.yaml")
        for folder in (Path(), Path("configs"), SHIPPED):
            if (found := folder / named).is_file():
                return found
    wanted = re.sub(r"^configs/|\.yaml$", "", str(name))
    meant = nearest(wanted, packaged())
    hint = f"did you mean {meant}?" if meant else "mfm configs lists those of the package"
    raise FileNotFoundError(f"no config at {name}: {hint}")


def find_shipped(folder: str | Path) -> Path:
    """A folder of settings: the one at a path; where there is none, that of the package of this name, such as
    "text_to_image/small/architecture", if there is one."""
    path = Path(folder)
    if path.exists() or path.is_absolute():
        return path
    return shipped if (shipped := SHIPPED / _in_configs(path)).is_dir() else path


def _in_configs(path: Path) -> Path:
    """A path seen from the folder `configs`, which it may begin with."""
    return Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path


def read_config(path: Path) -> dict[str, Any]:
    """What a config holds.

    Raises:
        ValueError: if it is no YAML, or holds no settings; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = yaml.safe_load(text)
        check_keys(text)
    except DuplicateKeyError as error:
        raise ValueError(f"{path}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path} is no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: expected sections such as model, data and trainer")
    return found


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # every value of a command line goes through it


class DuplicateKeyError(yaml.YAMLError, ValueError):
    """A key that stands twice in one mapping of a YAML, of which parsers take the last."""


def check_keys(text: str) -> None:
    """Refuse a YAML of which a part would be lost.

    Raises:
        DuplicateKeyError: for a key that stands twice in a mapping, with both lines.
        yaml.YAMLError: if it is no YAML.
    """
    waiting, seen = [yaml.compose(text, Loader=_LOADER)], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, Any], int] = {}
            for key, value in node.value:
                waiting.append(value)
                line, name = key.start_mark.line + 1, (key.tag, str(key.value))
                if name in lines and key.tag != "tag:yaml.org,2002:merge":
                    where = f"line {line}" if lines[name] == line else f"lines {lines[name]} and {line}"
                    raise DuplicateKeyError(
                        f"the key {key.value!r} stands twice, in {where}, and the first would be lost: make them one"
                    )
                lines[name] = line


def packaged() -> dict[str, str]:
    """The package's configs by name, such as "digits/mfm", each with the first line of its comment."""
    found = {}
    for path in sorted(SHIPPED.glob("*/*.yaml")):
        first = path.read_text().partition("\n")[0]
        about = first.lstrip("# ") if first.startswith("#") else ""
        found[str(path.relative_to(SHIPPED).with_suffix(""))] = re.sub(r":?\s+mfm .*|\s*\(fit .*|:$", "", about)
    return found


def default_settings() -> dict[str, Any]:
    """What `DEFAULTS` holds."""
    return yaml.safe_load(DEFAULTS.read_text())
