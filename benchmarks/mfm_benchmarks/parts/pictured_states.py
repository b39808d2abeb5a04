"""Pictures for the parts on draws and values: test images, their noised states, and posterior draws of these."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_benchmarks.parts.thumbnails import thumbnails
from mfm_lightning.alignment.target import Target

STATES, DRAWS = 3, 9  # of a report: a row has the test image, the noised state, and so many draws


def draw_pictures(target: Target, draws: Tensor) -> Tensor:
    """Images `(STATES, DRAWS, C, h, w)` of the first draws of the first states, of draws `(B, N, *shape)`."""
    return _decoded(target, draws[:STATES, :DRAWS])


def given_pictures(target: Target, x1: Tensor, x_t: Tensor) -> Tensor:
    """Images `(STATES, 2, C, h, w)` of the first clean states and of the noised ones, both `(B, *shape)`."""
    return _decoded(target, torch.stack([x1[:STATES], x_t[:STATES]], dim=1))


def shown(images: Tensor) -> Tensor:
    """Stored images as those of a gallery, in [0, 1]."""
    return images.float() / 255


@torch.no_grad()
def _decoded(target: Target, states: Tensor) -> Tensor:
    """Bytes, and no larger than a report shows them: all that is stored is read again for each report. The images of a
    state are decoded at once."""
    found = [(thumbnails(target.decoder(x).float()).clamp(0, 1) * 255).round().byte().cpu() for x in states]
    return torch.stack(found)
