"""Images at the size at which a report shows them."""

from __future__ import annotations

import torch
from torch import Tensor

THUMBNAIL = 192  # pixels a side at most


def thumbnails(images: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as `(B, C, h, w)`; those that are no larger as they are."""
    factor = min(1.0, THUMBNAIL / max(images.shape[2:]))
    return torch.nn.functional.interpolate(images, scale_factor=factor, mode="area")
