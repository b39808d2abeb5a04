"""Networks in shards (FSDP2), and whole again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's parameters in place, its blocks (`regions`) one by one; no effect on one that is sharded.

    Raises:
        ValueError: for a network that says it cannot be (`shardable = False`).
    """
    if isinstance(network, FSDPModule):
        return
    whole = next((part for part in network.modules() if not getattr(part, "shardable", True)), None)
    if whole is not None:
        raise ValueError(
            f"a {type(whole).__name__} cannot be trained in shards, for its file does not make all of it again: take "
            "trainer.strategy ddp"
        )
    for part in network.modules():
        for region in getattr(part, "regions", ()):
            if not isinstance(region, FSDPModule):  # a wrapper has those of what it wraps
                fully_shard(region, mesh=mesh)
    for frozen in elsewhere(network):
        fully_shard(frozen, mesh=mesh)
    there = {p for frozen in elsewhere(network) for p in frozen.parameters()}  # adapters within it among them
    fully_shard(network, mesh=mesh, ignored_params=there)


def elsewhere(network: nn.Module) -> list[nn.Module]:
    """What parts of a network run and do not hold, by their attribute `elsewhere`: frozen weights, with adapters in
    them that the network holds, too. No rank has room for a copy of them."""
    found = (getattr(part, "elsewhere", None) for part in network.modules())
    return list(dict.fromkeys(module for module in found if isinstance(module, nn.Module)))


def reshard(module: nn.Module) -> None:
    """Make the parameters of all parts shards again; FSDP leaves some whole after a forward pass without a backward."""
    for part in (*module.modules(), *(part for frozen in elsewhere(module) for part in frozen.modules())):
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def whole_parameters(network: nn.Module) -> Iterator[None]:
    """Within the context the parameters that a network holds are whole, in place, for writing them; it cannot compute.
    Entered by all ranks."""
    reshard(network)
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in network.modules():
        for name, p in part.named_parameters(recurse=False):
            if isinstance(p, DTensor):
                before.append((part, name, p))
                part._parameters[name] = nn.Parameter(p.full_tensor().detach(), requires_grad=p.requires_grad)
    try:
        yield
    finally:
        for part, name, p in before:
            part._parameters[name] = p


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
    """A new network of the same architecture; by its attribute `made_again`, a function, where it has one."""
    if (made_again := getattr(network, "made_again", None)) is not None:
        return made_again()
    inner, config = getattr(network, "network", None), getattr(network, "config", {})
    return plain_class(network)(rebuilt(inner)) if inner is not None else plain_class(network)(**config)


def plain_class(network: nn.Module) -> type[nn.Module]:
    """The network's class, without what FSDP mixes into it."""
    return next(c for c in type(network).__mro__ if not issubclass(c, FSDPModule))
