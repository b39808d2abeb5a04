"""Muon for matrices, and AdamW for what is no matrix, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """torch's Muon for parameters of two dimensions, AdamW for all others (biases, scales, convolutions). One schedule
    and one checkpoint hold for both. Muon's steps have the size of AdamW's (`match_rms_adamw`; Liu et al.,
    arXiv 2502.16982), so that one learning rate suits both. Not for parameters that FSDP2 shards: a step of Muon needs
    the whole matrix.

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
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")
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
