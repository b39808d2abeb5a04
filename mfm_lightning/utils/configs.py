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
        named = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
        if named.suffix not in (".yaml", ".yml", ".json"):
            named = named.with_name(f"{named.name}.yaml")
        for folder in (Path(), Path("configs"), SHIPPED):
            if (found := folder / named).is_file():
                return found
    wanted = re.sub(r"^configs/|\.yaml$", "", str(name))
    meant = nearest(wanted, packaged())
    hint = f"did you mean {meant}?" if meant else "mfm configs lists those of the package"
    raise FileNotFoundError(f"no config at {name}: {hint}")


def read_config(path: Path) -> dict[str, Any]:
    """What a config holds.

    Raises:
        ValueError: if it is no YAML, or holds no settings; with the line.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path} is no YAML: {error.problem}{where}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings: expected sections such as model, data and trainer")
    return found


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
