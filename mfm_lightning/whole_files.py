"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # after the name of a file that is being written


@contextmanager
def whole_file(path: str | Path, owner: object = None, sync: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block is done: a reader, a kill or a full disk finds the
    file before it or the new one, whole. An error leaves nothing behind.

    Args:
        owner: who writes (a process's number), where several may write the same file at once.
        sync: make sure that the content is on the disk before it takes the name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{'' if owner is None else f'-{owner}'}")
    try:
        yield partial
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
