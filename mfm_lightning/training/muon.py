"""Muon for matrices, and AdamW for what is no matrix, as one optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from mfm_rewards.execution import cpu_multiplies_bf16


class Float32Muon(Muon):
    """torch's Muon with products in float32 in place of bfloat16, which CPUs without AVX-512 BF16 or AMX multiply many
    times slower. Settings and state are the same. Steps are of the size of AdamW's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override] # torch's overloads
        """Of all parameters that have a gradient; there is no closure."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                p.mul_(1 - group["lr"] * group["weight_decay"])
                step = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.sub_(0.2 * math.sqrt(max(p.shape)) * group["lr"] * step)


def orthogonalised(update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix `(m, n)` with its singular values near 1, in float32: Newton-Schulz steps x -> a x + b x^3 + c x^5 of
    them (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024)."""
    a, b, c = coefficients
    x = update.float()
    x = x / x.norm().clamp_min(eps)
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class MuonAdamW(Optimizer):
    """torch's Muon for parameters of two dimensions, AdamW for all others (biases, scales, convolutions). One schedule
    and one checkpoint hold for both. Muon's steps have the size of AdamW's (`match_rms_adamw`; Liu et al.,
    arXiv 2502.16982), so that one learning rate suits both. On a CPU without products of bf16, Muon's are in float32.
    Not for parameters that FSDP2 shards: a step of Muon needs the whole matrix.

    Args:
        params: of the network.
        lr: learning rate of both.
        weight_decay: decoupled, of both.
        momentum: of Muon.
        betas: decay rates of AdamW's moments.

    Raises:
        ValueError: if no parameter has two dimensions; torch.optim.AdamW is that optimiser. If parameters are sharded.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        given = list(params)
        if any(isinstance(p, DTensor) for p in given):
            raise ValueError("muon needs whole matrices, and FSDP2 shards them: take radam or adamw, or strategy ddp")
        matrices, others = [p for p in given if p.ndim == 2], [p for p in given if p.ndim != 2]
        if not matrices:
            raise ValueError("no parameter has two dimensions, for which Muon is: take torch.optim.AdamW")
        slow = matrices[0].device.type == "cpu" and not cpu_multiplies_bf16()
        kind = Float32Muon if slow else Muon
        muon = kind(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.parts: list[Optimizer] = [muon]
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and state of the parts are this optimiser's own, so that schedules and checkpoints reach them."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override] # torch's overloads
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
