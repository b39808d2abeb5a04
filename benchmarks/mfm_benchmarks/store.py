"""Outcomes on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from mfm_benchmarks.suite import Cell, Outcome
from mfm_lightning.utils.atomic import save_json, save_tensors


class Store:
    """A folder with one JSON (and one safetensors file, where there are tensors) a cell, named by cell and identity.

    Args:
        shared: what all outcomes depend on besides: the device and the package's version.
        commit: of the code that computes, which the report names where results are of several.
    """

    def __init__(self, folder: Path, shared: dict[str, str] | None = None, commit: str = "") -> None:
        self.folder, self.shared, self.commit = Path(folder), shared or {}, commit

    def path(self, cell: Cell) -> Path:
        """Where the cell's JSON is."""
        return self.folder / f"{self.key(cell)}.json"

    def key(self, cell: Cell) -> str:
        """The name of the cell's files, without their endings: of its name and identity."""
        identity = json.dumps({**self.shared, **cell.identity}, sort_keys=True, default=str)
        digest = hashlib.sha256(f"{cell.name}\n{identity}".encode()).hexdigest()[:12]
        return f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', cell.name)[:100]}-{digest}"

    def load(self, cell: Cell) -> Outcome | None:
        """The stored outcome; None if there is none, or only a part of one."""
        path = self.path(cell)
        try:
            content = json.loads(path.read_text())
            tensors = load_file(path.with_suffix(".safetensors")) if content["tensors"] else {}
            return Outcome(dict(content["numbers"]), tensors, content.get("commit", ""))
        except (FileNotFoundError, ValueError, TypeError, SafetensorError, KeyError):
            return None

    def save(self, cell: Cell, outcome: Outcome) -> None:
        """Write the outcome; the JSON last and at once, so that what is there is whole."""
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        if outcome.tensors:
            save_tensors(outcome.tensors, path.with_suffix(".safetensors"))
        content = {
            "cell": cell.name,
            "identity": {**self.shared, **cell.identity},
            "commit": self.commit,
            "by": f"process {os.getpid()} on {socket.gethostname()}",
            "numbers": outcome.numbers,
            "tensors": sorted(outcome.tensors),
        }
        save_json(content, path, default=str)

    def remove(self, cell: Cell) -> None:
        """Forget the cell's outcome; no effect where there is none."""
        self.path(cell).unlink(missing_ok=True)
        self.path(cell).with_suffix(".safetensors").unlink(missing_ok=True)
