"""Resizing and normalising of images for a pretrained model: as its PIL code does it, but in torch, with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "crop_floor", "pad")


@dataclass(frozen=True)
class Preprocessing:
    """Images `(B, 1 or 3, H, W)` in [0, 1] to a model's `(B, 3, size, size)`.

    Bicubic with antialiasing, cut off at black and white, as PIL does it; but not rounded to 8 bits, so that it has a
    gradient. It agrees with PIL within two grey levels of 255.

    Args:
        size: side of the square in pixels.
        fit: "crop": the shorter edge becomes `size`, and the middle of the longer is taken, as torchvision does it;
            "crop_floor": the same, but half a pixel is rounded down, as transformers does it; "pad": the longer edge
            becomes `size`, with black beside the shorter (HPSv2).
        mean: of each channel, subtracted.
        std: of each channel, divided by.
    """

    size: int = 224
    fit: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}: expected one of {', '.join(FITS)}")

    def __call__(self, images: Tensor) -> Tensor:
        """Raises ValueError unless images are `(B, 1 or 3, H, W)`."""
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, 3, H, W) or (B, 1, H, W) in [0, 1]")
        images = images.expand(-1, 3, -1, -1)
        images = self._pad(images) if self.fit == "pad" else self._crop(images)
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (images - mean) / std

    def _crop(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        short = min(height, width)
        images = _bicubic(images, int(self.size * height / short), int(self.size * width / short))
        over = [n - self.size for n in images.shape[2:]]
        top, left = [n // 2 if self.fit == "crop_floor" else round(n / 2) for n in over]
        return images[:, :, top : top + self.size, left : left + self.size]

    def _pad(self, images: Tensor) -> Tensor:
        scale = self.size / max(images.shape[2:])
        images = _bicubic(images, *[max(1, round(n * scale)) for n in images.shape[2:]])
        over_y, over_x = [self.size - n for n in images.shape[2:]]
        return F.pad(images, (over_x // 2, over_x - over_x // 2, over_y // 2, over_y - over_y // 2))


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    # autocast would leave it as it is, but CPUs have no antialiased kernel for 16 bits
    wide = images if images.dtype in (torch.float32, torch.float64) else images.float()
    # PIL goes over the rows, cuts off what overshoots, then over the columns
    for size in ((images.shape[2], width), (height, width)):
        wide = F.interpolate(wide, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return wide.to(images.dtype)
