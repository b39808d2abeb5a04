"""The network of a run's checkpoint, one file or a folder of shards, as one safetensors file, by one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mfm_lightning.training.run_checkpoints import METADATA, REST, check_checkpoint, read_plan
from mfm_lightning.utils.atomic import whole_file
from mfm_rewards.weights import CheckpointError, load_plain

NETWORK = "network"  # in a checkpoint: what a file of the network says, and where its weights are


class PlainReader(FileSystemReader):
    """Shards whose plan, a pickle, is read with the classes of a plan alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        plan = read_plan(Path(self.path))
        plan.storage_meta = plan.storage_meta or StorageMeta()
        plan.storage_meta.load_id = self.load_id
        return plan


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a run's checkpoint: a folder of shards, or a file that ends in .ckpt."""
    return (Path(path) / METADATA).is_file() or (Path(path).suffix == ".ckpt" and Path(path).is_file())


def consolidate(path: str | Path, output: str | Path, average: bool = True) -> dict[str, str]:
    """Write the network of a checkpoint as `mfm fit` would write its `model.safetensors`, with no process group, and
    without the optimiser's state. Its weights are in memory once.

    Args:
        path: a `last.ckpt`, a file or a folder of shards.
        output: the file.
        average: the averaged weights (EMA), where the checkpoint has them; else those of the last step.

    Returns:
        The file's metadata.

    Raises:
        FileNotFoundError, CheckpointError: as `check_checkpoint`; if the checkpoint does not say what its network is,
            or its file is not made of the weights alone; if a tensor is missing, or a number is not finite.
    """
    check_checkpoint(path)
    path = Path(path)
    rest = load_plain(path / REST if path.is_dir() else path, mmap=True)
    said = rest.get(NETWORK)
    if not isinstance(said, Mapping):
        raise CheckpointError(
            f"{path} does not say what its network is: it is of an older version, or its file is made of more than its "
            "weights; go on from it by mfm fit --ckpt_path, whose end writes the file"
        )
    prefix, averages = f"{said['prefix']}.", _averages(rest) if average else {}
    header = {str(k): str(v) for k, v in said["header"].items()} | {"step": str(rest.get("global_step", 0))}
    header["averaged"] = str(bool(averages)).lower()
    tensors = _shards(path, prefix) if path.is_dir() else _under(rest["state_dict"], prefix)
    if not tensors:
        raise CheckpointError(f"{path} has no weights under {prefix[:-1]}: it is damaged")
    for name, tensor in _under(averages, prefix).items():
        if name in tensors:
            tensors[name] = tensor.to(tensors[name].dtype)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{output} is not written: weight {name} of {path} is not finite everywhere")
    _save(tensors, output, header)
    return header


def _averages(rest: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Of the EMA callback, by the names of the module's parameters."""
    states = (state for name, state in rest.get("callbacks", {}).items() if name.split("{")[0].endswith("EMA"))
    return next((state["average"] for state in states if state.get("average")), {})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shards(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of that prefix, put together from all shards, each read once."""
    plan, prefix = read_plan(path).state_dict_metadata, f"state_dict.{prefix}"
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in plan.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    try:
        load(wanted, storage_reader=PlainReader(path), no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} cannot be put together ({reason}): a file of it is missing or damaged"
        ) from error
    return _under(wanted, prefix)


def _save(tensors: Mapping[str, Tensor], output: str | Path, header: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with whole_file(output) as partial:  # without the copies that `save_tensors` makes of shared storages
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=header)


def said_of(header: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """What a checkpoint says of its network: its file's header, and the name of its part in the module."""
    json.dumps(dict(header))  # texts
    return {"header": dict(header), "prefix": prefix}
