"""Exponential moving average of the trained parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mfm_lightning.checkpoints.post_hoc_ema import power
from mfm_lightning.training.sharding import like, reshard, whole

log = logging.getLogger(__name__)


class EMA(L.Callback):
    """Averages the parameters that are trained, and puts the average in their place for validation, test and predict.

    Lightning's WeightAveraging copies the whole module, frozen parts and all. Here only trained parameters are held,
    parameter by parameter and in place, which is also right for sharded ones (each rank averages its own shard). The
    average is float32 also where the parameters are bfloat16: steps of 1 - decay are below their precision.

    Args:
        decay: of the average; at step k the smaller of this and (1+k)/(10+k) is used, so that short runs work.
        start_step: before it the average is the parameters themselves.
        sigma_rel: in place of the decay, the average's width as a share of the training so far: steps count by a power
            of their number (Karras et al., arXiv 2312.02696, Section 3.1), so that one setting suits runs of any
            length; in (0, 0.2887], such as 0.1.

    Raises:
        ValueError: for a decay or a width out of range.
    """

    def __init__(self, decay: float = 0.9999, start_step: int = 0, sigma_rel: float | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} must lie in [0, 1)")
        self.decay, self.start_step, self.sigma_rel = decay, start_step, sigma_rel
        self._power = None if sigma_rel is None else power(sigma_rel)
        self.average: dict[str, Tensor] = {}
        self.num_updates = 0
        self._kept: dict[str, Tensor] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start(pl_module)  # not earlier: sharding strategies restore checkpoints late

    def start(self, module: nn.Module) -> None:
        """Begin with the parameters as they are, where there is no average of them yet."""
        for name, p in _trained(module):
            kept = self.average.get(name)
            kept = p.detach().clone() if kept is None else like(kept, p)
            self.average[name] = kept.to(torch.promote_types(p.dtype, torch.float32))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.num_updates:  # else an accumulating batch: no optimiser step
            self.update(pl_module, trainer.global_step)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after optimiser step number `step`."""
        self.num_updates = step
        decay = self._decay_at(self.num_updates - self.start_step)
        parameters = [(self.average[name], p.detach().to(self.average[name].dtype)) for name, p in _trained(module)]
        # torch's optimisers average so, too; its types leave the function out
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [a for a, _ in parameters], [p for _, p in parameters], 1 - decay
        )

    def _decay_at(self, k: int) -> float:
        """What the average keeps of itself at its step k = 1, 2, ..."""
        if k <= 0:
            return 0.0
        return min(self.decay, (1 + k) / (10 + k)) if self._power is None else (1 - 1 / k) ** (self._power + 1)

    @contextmanager
    def applied(self, module: L.LightningModule) -> Iterator[None]:
        """Within the context the module holds the averaged parameters."""
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    @torch.no_grad()
    def _swap_in(self, module: L.LightningModule) -> None:
        if self._kept is not None or not self.average:
            return
        self._kept = {name: p.detach().clone() for name, p in _trained(module)}
        for name, p in _trained(module):
            p.copy_(like(self.average[name], p))

    @torch.no_grad()
    def _swap_out(self, module: L.LightningModule) -> None:
        if self._kept is not None:
            for name, p in _trained(module):
                p.copy_(self._kept[name])
            self._kept = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        average = dict(self.average)
        if any(isinstance(tensor, DTensor) for tensor in average.values()):
            average = whole(average, keep=dist.get_rank() == 0, device="cpu")  # the rank that writes it
        return {"average": average, "num_updates": self.num_updates, "sigma_rel": self.sigma_rel}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.num_updates = dict(state_dict["average"]), state_dict["num_updates"]
        if (before := state_dict.get("sigma_rel")) != self.sigma_rel:
            log.warning(
                "the average of the weights goes on with ema.sigma_rel %s, and was made with %s until step %d",
                self.sigma_rel, before, self.num_updates,
            )  # fmt: skip


def _trained(module: nn.Module) -> list[tuple[str, Tensor]]:
    reshard(module)
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
