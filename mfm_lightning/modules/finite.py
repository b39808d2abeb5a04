"""Losses and gradients that are no numbers any more: said before a step is taken with them, with what is known."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_NAMES = 3  # of parameters, in an error


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training stops before the step is taken."""


class NonFiniteGradientError(NonFiniteLossError):
    """A gradient is NaN or infinite, of a loss that is not; training stops before the step is taken."""


def require_finite_losses(module: L.LightningModule, losses: dict[str, Tensor], x1: Tensor) -> None:
    """Raise NonFiniteLossError unless the loss `()` of a batch `(B, *shape)` is finite, with the terms that are not."""
    if torch.isfinite(losses["loss"]):
        return
    terms = {k: v.item() for k, v in losses.items() if k not in ("loss", "mse") and not k.startswith("error/")}
    bad = [k for k, v in terms.items() if not torch.isfinite(torch.tensor(v))] or list(terms)
    x = x1.float()
    raise NonFiniteLossError(
        f"non-finite loss at step {module.global_step} in {', '.join(bad)} ({terms}); batch of {len(x)}: mean "
        f"{x.mean():.4g}, std {x.std():.4g}, min {x.min():.4g}, max {x.max():.4g}{_origin(module)}. The last "
        "checkpoint is intact."
    )


def require_finite_gradients(module: L.LightningModule) -> None:
    """Raise NonFiniteGradientError unless all gradients are finite; to be called before they are clipped: the norm of
    all is NaN then, and so are all weights after it."""
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    if not named:
        return
    norm = nn.utils.get_total_norm([gradient for _, gradient in named])
    if torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
        return
    bad = [name for name, gradient in named if not _is_finite(gradient)]
    if not bad:  # each number is finite, and the sum of their squares is not
        raise NonFiniteGradientError(
            f"gradients overflow at step {module.global_step}: their norm is not finite{_origin(module)}; "
            "lower the reward scale, or raise the precision. The last checkpoint is intact."
        )
    more = f" and {len(bad) - _NAMES} more" if len(bad) > _NAMES else ""
    raise NonFiniteGradientError(
        f"non-finite gradient at step {module.global_step} of {', '.join(bad[:_NAMES])}{more} ({len(bad)} of "
        f"{len(named)} parameters), though the loss is finite{_origin(module)}. The last checkpoint is intact."
    )


def _is_finite(gradient: Tensor) -> bool:
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return bool(torch.isfinite(local).all())


def _origin(module: L.LightningModule) -> str:
    """The reward, and where the batch is from, as far as they are known."""
    found = []
    settings = getattr(getattr(module, "target", None), "settings", None)
    if settings is not None:
        found.append(f"reward {settings.reward!r} times {settings.reward_scale:g}")
    data: Any = getattr(module.trainer, "datamodule", None)
    number = module.trainer.fit_loop.epoch_loop.total_batch_idx
    source = data.origin(number) if hasattr(data, "origin") else ""
    found.append(f"batch {number} of rank {module.global_rank}" + (f", {source}" if source else ""))
    return "; " + "; ".join(found)
