"""One process of `test_distributed.test_tangents_on_two_processes`: losses and gradients under DDP and FSDP2."""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.objectives import InnerSample, Pair
from mfm_lightning.objectives.terms import DistilledDiagonal, EulerianTeacher

SINGLE = ["exact", "autocast"]
TWO = ["exact ddp", "exact fsdp", "exact fsdp checkpointed", "autocast fsdp"]


class Loss(nn.Module):
    """Both terms of the objective on one inner sample."""

    def __init__(self, model: MetaFlowMap) -> None:
        super().__init__()
        self.model = model

    def forward(self, pair: Pair, inner: InnerSample) -> torch.Tensor:
        terms = (DistilledDiagonal(), EulerianTeacher("explicit"))
        return sum(term(self.model, None, pair, inner).square().mean() for term in terms)


def small_model(dtype: torch.dtype) -> MetaFlowMap:
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 2, 2, 32, 3, 4, 2, num_classes=5, qk_norm=True, guidance_scales=(2.5,)))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def samples(dtype: torch.dtype) -> tuple[Pair, InnerSample]:
    torch.manual_seed(1)
    s, u = torch.rand(2, 8, dtype=dtype).sort(dim=0).values
    x1, x_t, velocity = torch.randn(3, 8, 2, 8, 8, dtype=dtype)
    label, guidance = torch.arange(8) % 6, torch.tensor([2.5, 1.0], dtype=dtype).repeat(4)
    pair = Pair(x1, torch.rand(8, dtype=dtype), x_t, Conditions(label=label, guidance=guidance))
    inner = pair.inner(s, u)
    inner.teacher_velocity = velocity
    return pair, inner


def gradients(case: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The loss and the gradients of the whole batch, computed on this rank's part of it."""
    dtype = torch.float32 if "autocast" in case else torch.float64  # autocast leaves float64 alone
    model, (pair, inner) = small_model(dtype), samples(dtype)
    rows = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    model.network.checkpoint_activations = "checkpointed" in case
    loss = Loss(model)
    if "fsdp" in case:
        mesh = init_device_mesh("cpu", (world_size,))
        for region in model.network.regions:
            fully_shard(region, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif "ddp" in case:
        loss = DistributedDataParallel(loss)
    with torch.autocast("cpu", torch.bfloat16) if "autocast" in case else nullcontext():
        value = loss(pair.take(rows), inner.take(rows))
    value.backward()
    total = value.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
        total /= world_size
    found = {"loss": total}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return found


if __name__ == "__main__":
    folder, rank, world_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found = {case: gradients(case, rank, world_size) for case in (TWO if world_size > 1 else SINGLE)}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    if world_size > 1:
        dist.barrier()
        os._exit(0)  # all is done; gloo's threads at times abort the interpreter's shutdown
