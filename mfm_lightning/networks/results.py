"""What `mfm test` measured, and on which weights: tables, and `weights.json` beside them, which says whose they are.

A run's folder is tested again after it was trained on, with other checkpoints, or by another evaluation. A figure is
taken for a file's own only where the weights that it was measured on are those of the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from mfm_lightning.networks.files import fingerprint, weights_fingerprint
from mfm_lightning.utils.atomic import save_json

log = logging.getLogger(__name__)
NOTES = "weights.json"
MOST_ROWS = 40  # of a table that a model card takes


@contextmanager
def measured_on(
    network: nn.Module, folder: str | Path, whole: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Tables (`*.json`) that are written into the folder within the context are noted as of the network's weights.

    Args:
        whole: a context in which they are whole, where they are sharded.
    """
    folder = Path(folder)
    before = {path: path.stat().st_mtime_ns for path in _tables(folder)}
    yield
    with whole():
        weights = weights_fingerprint(network)
    written = [path for path in _tables(folder) if before.get(path) != path.stat().st_mtime_ns]
    notes = {**_notes(folder), **{path.name: {"table": fingerprint(path), "weights": weights} for path in written}}
    save_json(notes, folder / NOTES)


def measured_of(network: nn.Module, folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The tables in a folder of `mfm test` that were measured on the network's weights, by name. Which ones are left
    out, and why, is said."""
    found: dict[str, list[dict[str, Any]]] = {}
    notes, left_out, weights = _notes(Path(folder)), [], None
    for path in _tables(Path(folder)):
        note = notes.get(path.name, {})
        if note.get("table") != fingerprint(path):  # one of an earlier version, or changed since
            left_out.append(f"{path.name} (it is not noted on which weights it was measured: mfm test does so)")
            continue
        weights = weights or weights_fingerprint(network)
        rows = json.loads(path.read_text())
        if note["weights"] != weights:
            left_out.append(f"{path.name} (measured on other weights: mfm test measures anew)")
        elif len(rows) > MOST_ROWS:
            left_out.append(f"{path.name} ({len(rows)} rows, more than {MOST_ROWS})")
        elif rows:
            found[path.stem] = rows
    if left_out:
        log.warning("left out of what was measured, in %s: %s", folder, ", ".join(left_out))
    return found


def _tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.name != NOTES)


def _notes(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / NOTES).read_text())
    except (FileNotFoundError, ValueError):  # changed by hand: no table is shown to be of any weights then
        return {}
    return found if isinstance(found, dict) else {}
