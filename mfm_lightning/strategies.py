"""Fully sharded training: `trainer.strategy: fsdp2` instead of `ddp`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mfm_lightning.whole_files import PARTIAL, mend, put_in_place, remove


class FSDP(ModelParallelStrategy):
    """FSDP2: each rank keeps its shard of weights, gradients, optimiser state and EMA, and gathers a block's weights
    while it computes it. Lightning's `ModelParallelStrategy` with all devices in one data-parallel group; modules here
    say by `configure_model` what is sharded.

    Args:
        save_sharded: a checkpoint is a folder with a file for each rank, quicker for large models, but resumed only by
            FSDP. Else it is one file, as any strategy's.
        process_group_backend: of torch.distributed; nccl on GPUs and gloo on CPUs where None.
    """

    def __init__(self, save_sharded: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=save_sharded, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder beside its place and then move it there, so that the checkpoint before it stays, whatever
        happens (Lightning writes into the one before). A file is the `CheckpointIO`'s, which does the same."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint and not path.is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if path.is_dir() and not (path / "meta.pt").is_file():
            raise IsADirectoryError(f"{path} is a folder, and no checkpoint in shards: it is not replaced by one")
        partial = path.with_name(f"{path.name}{PARTIAL}shards")
        if self.is_global_zero:
            remove(partial)  # of a run that was killed
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except (CheckpointException, OSError, RuntimeError) as error:
            if self.is_global_zero:
                remove(partial)
            raise OSError(f"checkpoint {path} could not be written, the one before it is intact: {error}") from error
        self.barrier()  # all ranks have written
        if self.is_global_zero:
            for part in partial.iterdir() if partial.is_dir() else ():
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
            put_in_place(partial, path)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        if self.is_global_zero:
            mend(Path(checkpoint_path))
        self.barrier()
        return super().load_checkpoint(checkpoint_path, weights_only)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's parameters in place, its blocks (`regions`) one by one; no effect on one that is sharded."""
    if isinstance(network, FSDPModule):
        return
    for part in network.modules():
        for region in getattr(part, "regions", ()):
            fully_shard(region, mesh=mesh)
    fully_shard(network, mesh=mesh)


def reshard(module: nn.Module) -> None:
    """Make the parameters of all parts shards again; FSDP leaves some whole after a forward pass without a backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensors: Mapping[str, Tensor], keep: bool, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Copies of tensors with all their shards where `keep`, else none; called by all ranks.

    Args:
        device: of the copies; each tensor's own where None.
    """
    copies = {}
    for name, tensor in tensors.items():  # one at a time, so that the others need no room for it
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            copies[name] = tensor.to(device or tensor.device, copy=True)
    return copies


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, sharded as the parameter is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def gathered(network: nn.Module, keep: bool) -> nn.Module | None:
    """A copy of a sharded network, not sharded, where `keep`; called by all ranks.

    Args:
        network: one that its class and `config` make again; or a MetaFlowMap of one.
    """
    state = whole(network.state_dict(), keep)
    if not keep:
        return None
    with torch.device("meta"):
        copy = rebuilt(network)
    copy.load_state_dict(state, assign=True)
    return copy.eval().requires_grad_(False)


def rebuilt(network: nn.Module) -> nn.Module:
    """A new network of the same architecture."""
    inner = getattr(network, "network", None)
    return plain_class(network)(rebuilt(inner)) if inner is not None else plain_class(network)(**network.config)


def plain_class(network: nn.Module) -> type[nn.Module]:
    """The network's class, without what FSDP mixes into it."""
    return next(c for c in type(network).__mro__ if not issubclass(c, FSDPModule))
