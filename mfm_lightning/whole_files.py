"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"  # between the name of a file that is being written and what is its writer's alone


@contextmanager
def whole_file(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block is done: a reader, a kill or a full disk finds the
    file before it or the new one, whole. An error leaves nothing behind, a kill what `clear_partials` removes.

    The path to write to is of this call alone: several processes, of several machines too, may write a file at once.

    Args:
        sync: make sure that the content is on the disk before it takes the name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:12]}")
    try:
        yield partial
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def clear_partials(folder: str | Path, name: str = "*") -> None:
    """Remove what killed processes have left half written of files of that name; only where nobody writes them now."""
    for left in Path(folder).glob(f"{name}{PARTIAL}*"):
        left.unlink(missing_ok=True)
