"""Pictures for the parts on draws and values: test images, their noised states, and posterior draws of these."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_lightning.alignment.target import Target

STATES, DRAWS = 3, 9  # of a report: a row has the test image, the noised state, and so many draws


@torch.no_grad()
def draw_pictures(target: Target, draws: Tensor) -> Tensor:
    """Images `(STATES, DRAWS, C, H, W)` of the first draws of the first states, of draws `(B, N, *shape)`."""
    shown = draws[:STATES, :DRAWS]
    return target.decoder(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).float().cpu()


@torch.no_grad()
def given_pictures(target: Target, x1: Tensor, x_t: Tensor) -> Tensor:
    """Images `(STATES, 2, C, H, W)` of the first clean states and of the noised ones, both `(B, *shape)`."""
    shown = torch.stack([x1[:STATES], x_t[:STATES]], dim=1)
    return target.decoder(shown.flatten(0, 1)).unflatten(0, shown.shape[:2]).float().cpu()
