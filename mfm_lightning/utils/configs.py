"""Where configs are: in the current folder, else those that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).parents[1]
# a wheel has them inside the package, a clone beside it
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
DEFAULTS = SHIPPED / "defaults.yaml"  # what every job starts from


def find_config(path: str | Path) -> Path:
    """The file at a path; where there is none and the path begins with `configs/`, the package's own config.

    Raises:
        FileNotFoundError: if neither is there.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.parts[:1] == ("configs",) and (shipped := SHIPPED.joinpath(*path.parts[1:])).is_file():
        return shipped
    raise FileNotFoundError(f"no config at {path}: the package's own are configs/*/*.yaml, in {SHIPPED}")


def default_settings() -> dict[str, Any]:
    """What `DEFAULTS` holds."""
    return yaml.safe_load(DEFAULTS.read_text())
