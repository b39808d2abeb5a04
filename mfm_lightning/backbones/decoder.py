"""Latents of a pipeline to images, in parts, differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mfm_lightning.networks.decoders import Decoder, decoded_in_parts
from mfm_lightning.utils.devices import out_of_memory


class LatentDecoder(Decoder):
    """Scaled latents `(B, C, h, w)` to images `(B, 3, H, W)` in [0, 1] by a pipeline's VAE, in its own floating type.

    Memory is that of `max_rows` latents, also for gradients: each such part is decoded again in the backward pass.

    Args:
        vae: of the pipeline.
        unscaled: the pipeline's scaling taken away.
        max_rows: latents at once.
        tiled: decode large latents in overlapping tiles that are blended.
    """

    def __init__(self, vae: Any, unscaled: Callable[[Tensor], Tensor], max_rows: int = 8, tiled: bool = False) -> None:
        super().__init__()
        self.vae, self.unscaled, self.max_rows = vae.eval().requires_grad_(False), unscaled, max_rows
        self.tiled = tiled
        if tiled:
            self.vae.enable_tiling()

    def extra_repr(self) -> str:
        return f"max_rows={self.max_rows}" + (", tiled=True" if self.tiled else "")

    def forward(self, states: Tensor) -> Tensor:
        return ((decoded_in_parts(self._decode, states, self.max_rows) + 1) / 2).clamp(0, 1)

    def _decode(self, part: Tensor) -> Tensor:
        with out_of_memory("the VAE", "max_rows, or set tiled"):
            images = self.vae.decode(self.unscaled(part).to(self.vae.dtype), return_dict=False)[0].float()
        return images[:, :, 0] if images.dim() == 5 else images  # a video of one frame
