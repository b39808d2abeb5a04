"""Latents of a pipeline to images, in parts, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from mfm_lightning.networks.decoders import Decoder, GradientPath, decoded_in_parts
from mfm_lightning.utils.devices import out_of_memory
from mfm_lightning.utils.row_budget import MaxRows, RowBudget, in_parts


class LatentDecoder(Decoder):
    """Scaled latents `(B, C, h, w)` to images `(B, 3, H, W)` in [0, 1] by a pipeline's VAE, in its own floating type.

    Memory is that of `max_rows` latents, also for gradients: each such part is decoded again in the backward pass.

    Args:
        vae: of the pipeline.
        unscaled: the pipeline's scaling taken away.
        max_rows: latents at once; "auto" finds the most that a GPU has room for.
        tiled: decode large latents in overlapping tiles that are blended.
        place: device of the VAE, on which it stays; it moves with the decoder where None.

    Attributes:
        gradients: a small decoder, through which gradients go back; images are the VAE's. None for the VAE itself.
    """

    def __init__(
        self,
        vae: Any,
        unscaled: Callable[[Tensor], Tensor],
        max_rows: MaxRows = 8,
        tiled: bool = False,
        place: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.unscaled, self.max_rows = vae.eval().requires_grad_(False), unscaled, max_rows
        self.place = place
        self.gradients: Decoder | None = None
        self._path = GradientPath()
        self.budget, self.gradient_budget = RowBudget("the VAE"), RowBudget("the VAE with gradients")
        if place is not None:
            self.vae.to(place)
        self.tiled = tiled
        if tiled:
            self.vae.enable_tiling()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the decoder leaves a VAE on a device of its own where it is."""
        return self if self.place is not None else super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"max_rows={self.max_rows}" + (", tiled=True" if self.tiled else "")

    def forward(self, states: Tensor) -> Tensor:
        if self.gradients is not None and torch.is_grad_enabled() and states.requires_grad:
            return self._path(self.gradients, states, self(states.detach()))
        return ((self._images(states) + 1) / 2).clamp(0, 1)  # without a name, which would keep them in memory

    def _images(self, states: Tensor) -> Tensor:
        """In [-1, 1]."""
        if not isinstance(self.max_rows, str):
            return decoded_in_parts(self._decode, states, self.max_rows)
        if torch.is_grad_enabled() and states.requires_grad:
            return decoded_in_parts(self._decode, states, self._rows_with_gradient(states))
        return torch.cat(
            in_parts(lambda rows: self._decode(states[rows]), len(states), "auto", self.budget, states.device)
        )

    def _rows_with_gradient(self, states: Tensor) -> int:
        """How many are decoded again at once in the backward pass, where memory must not end: tried before, where it is
        not known."""
        budget = self.gradient_budget
        if len(states) <= budget.fits or budget.settled:
            return budget.rows(len(states))

        def trial(rows: int) -> None:
            part = states[:rows].detach().requires_grad_()
            torch.autograd.grad(self._decode(part).sum(), part)

        return budget.attempt(trial, len(states), states.device)[1]

    def _decode(self, part: Tensor) -> Tensor:
        with out_of_memory("the VAE", "max_rows, or set tiled"):
            latents = self.unscaled(part).to(self.place or part.device, self.vae.dtype)
            images = self.vae.decode(latents, return_dict=False)[0].float().to(part.device)
        return images[:, :, 0] if images.dim() == 5 else images  # a video of one frame
