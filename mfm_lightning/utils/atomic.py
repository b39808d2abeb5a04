"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # between the name of a file that is being written and what is its writer's alone
OLD = ".old"  # after the name of what is being replaced by, or is, a folder


@contextmanager
def whole_file(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the name `path` when the block is done: a reader, a kill or a full disk finds the
    file before it or the new one, whole. An error leaves nothing behind, a kill what `clear_partials` removes.

    The path to write to is of this call alone: several processes, of several machines too, may write a file at once.

    Args:
        sync: make sure that the content is on the disk before it takes the name.

    Raises:
        OSError: with the file's name, for a full disk and the like.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex[:12]}")
    try:  # from the first moment, for a signal may come at any
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)  # by the umask; some writers, safetensors among them, make it 0600
        partial.unlink()
        yield partial
        with contextlib.suppress(PermissionError):  # of file systems that know no modes
            partial.chmod(mode)
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # that of a full disk does not say where
        raise OSError(error.errno, f"{error.strerror}, while it was written", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def check_is_folder(path: str | Path) -> None:
    """Raise NotADirectoryError for an output that is to be a folder, and is a file or lies in one."""
    for place in (Path(path), *Path(path).parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file: expected a folder to write to, give another")


def save_tensors(tensors: Mapping[str, Any], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write tensors, of any device and layout, as one whole safetensors file."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(plain, partial, metadata=metadata)
    return Path(path)


def save_json(content: Any, path: str | Path, indent: int | None = 1, **options: Any) -> Path:
    """Write one whole JSON file in UTF-8; `options` are those of `json.dumps`."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=indent, **options), encoding="utf-8")
    return Path(path)


def clear_partials(folder: str | Path, name: str = "*") -> None:
    """Remove what killed processes have left half written of files of that name; only where nobody writes them now."""
    for left in Path(folder).glob(f"{name}{PARTIAL}*"):
        remove(left)


def put_in_place(new: Path, path: Path) -> None:
    """Give a folder the name `path`, of a folder or file that goes. No file system does that in one step: if it is
    killed on its way, `path` may be missing, and what was there has `OLD` after its name; `mend` puts it back."""
    old = path.with_name(path.name + OLD)
    if path.exists():
        remove(old)
        os.rename(path, old)
    os.rename(new, path)
    remove(old)


def mend(path: Path) -> None:
    """Undo a `put_in_place` that was killed on its way; no effect otherwise. Several processes may do it at once."""
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):
            os.rename(path.with_name(path.name + OLD), path)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
