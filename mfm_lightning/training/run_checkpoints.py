"""What `--ckpt_path` takes: checkpoints of runs, looked at before anything is built, and never executed."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mfm_rewards.weights import CheckpointError, load_plain

METADATA = ".metadata"  # of a checkpoint in shards: torch.distributed.checkpoint's plan, a pickle
REST = "meta.pt"  # and Lightning's own part of it
OF_A_RUN = ("state_dict", "optimizer_states", "loops", "global_step")
EXPECTED = "expected the last.ckpt of a run"
PLANNERS = {  # all that a plan consists of
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "collections": ("OrderedDict",),
}  # fmt: skip


def check_checkpoint(path: str | Path, resumed: bool = False) -> None:
    """Refuse what training cannot go on from, nor load weights from, before anything is built.

    Args:
        resumed: training goes on from it; else its weights are taken alone.

    Raises:
        FileNotFoundError: if there is nothing.
        CheckpointError: if it is a file of another kind, or not whole.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        _check_folder(path)
        content = _read(path / REST, path)
        wanted = [key for key in OF_A_RUN if key not in ("state_dict", "optimizer_states")]
    elif path.is_file():
        _check_kind(path)
        content = _read(path, path)
        wanted = list(OF_A_RUN)
    else:
        raise CheckpointError(f"{path} is no regular file: {EXPECTED}")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and is no run's checkpoint: {EXPECTED}")
    if path.is_file() and not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            f"{path} is no run's checkpoint, for it has no state_dict (it holds {_few(content)}): {EXPECTED}; "
            "mfm import reads released weights"
        )
    if resumed and (missing := [key for key in wanted if key not in content]):
        raise CheckpointError(
            f"{path} holds weights alone: it has no {', '.join(missing)}, which training goes on from; {EXPECTED}, or "
            "give its model.safetensors as model.initial"
        )


def _check_kind(path: Path) -> None:
    with contextlib.suppress(zipfile.BadZipFile):  # its end is damaged
        if zipfile.is_zipfile(path):
            return
    with open(path, "rb") as file:
        begin = file.read(64)
    if not begin:
        what = "is empty (0 bytes)"
    elif begin.startswith(b"PK"):
        what = f"is cut off at {path.stat().st_size:,} bytes: the end of the archive is missing"
    elif path.suffix == ".safetensors" or begin[8:9] == b"{":
        what = "is a model, not a run's checkpoint"
    else:
        what = "is no file of torch.save, not a run's checkpoint"
    raise CheckpointError(
        f"{path} {what}: --ckpt_path takes the last.ckpt of a run (a model is given in the config, as teacher, "
        "initial or target.model)"
    )


def _check_folder(path: Path) -> None:
    missing = [name for name in (METADATA, REST) if not (path / name).is_file()]
    if missing or not any(path.glob("*.distcp")):
        what = " and ".join(missing) or "*.distcp"
        raise CheckpointError(f"{path} is a folder without {what}, and no checkpoint in shards: {EXPECTED}")
    check_plan(path)


def _read(path: Path, of: Path) -> Any:
    """A file of torch.save, with its tensors left on the disk."""
    try:
        return load_plain(path, mmap=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{of} cannot be read as plain tensors and numbers ({error}): it is damaged, or holds code; {EXPECTED}"
        ) from error


def _few(content: dict[Any, Any]) -> str:
    names = [repr(key) for key in list(content)[:3]]
    return ", ".join(names) + (", ..." if len(content) > 3 else "") if names else "nothing"


def check_plan(path: str | Path) -> None:
    """Refuse a checkpoint in shards whose `.metadata`, a pickle, names anything but the classes of a plan; raises as
    `read_plan`."""
    read_plan(path)


def read_plan(path: str | Path) -> Metadata:
    """The plan of a checkpoint in shards: its `.metadata`, a pickle, read with the classes of a plan alone.

    Raises:
        CheckpointError: with the first name that is no part of a plan, nothing of which is called; if it is damaged.
    """
    file = Path(path) / METADATA
    try:
        with open(file, "rb") as content:
            found = _PlanUnpickler(content, file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{file} is no plan of a checkpoint in shards ({error}): it is damaged") from error


class _PlanUnpickler(pickle.Unpickler):
    def __init__(self, content: Any, path: Path) -> None:
        super().__init__(content)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in PLANNERS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        self._refuse(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        self._refuse("a persistent object")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path} names {what}, which is no part of a checkpoint's plan: it is refused, for loading it could "
            "run code"
        )
