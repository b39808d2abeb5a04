"""JPEG compressibility: a black-box reward, the size of the encoded file."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register


@register("jpeg_compressibility")
class JPEGCompressibility(Reward):
    """Minus the size in kilobytes (1,000 bytes) of the image as a JPEG file, times `scale`; not differentiable.

    A negative scale rewards large files. It is a reward of DDPO (Black et al., arXiv 2305.13301), whose quality is 95.

    Args:
        quality: of the JPEG file, 1 to 100.
        scale: factor of the reward.
    """

    differentiable = False

    def __init__(self, quality: int = 95, scale: float = 1.0) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"quality {quality} must be in 1..100")
        self.quality, self.scale = quality, scale

    def forward(self, images: Tensor) -> Tensor:
        finite = images.detach().isfinite().flatten(1).all(dim=1)
        shown = images.detach().nan_to_num().clamp(0, 1)
        pixels = (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = torch.tensor([len(self._encode(image)) / 1000 for image in pixels], dtype=torch.float32)
        return torch.where(finite, -self.scale * sizes.to(images.device), torch.nan)

    def _encode(self, image: np.ndarray) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            buffer, format="JPEG", quality=self.quality
        )
        return buffer.getvalue()
