"""Layers of feature maps `(B, C, H, W)`, for a value with its tangent (see `mfm_lightning.networks.dual`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.networks.dual import Dual, scale_shift


def conv2d(layer: nn.Conv2d, x: Dual) -> Dual:
    """W * x + b, and W * dx."""
    value = layer(x.value)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, layer._conv_forward(x.tangent, layer.weight, None))


def group_norm(layer: nn.GroupNorm, x: Dual) -> Dual:
    """n = (x - mean) / std over each group, dn = (dx - mean(dx) - n mean(n dx)) / std, then the layer's affine map."""
    value = layer(x.value)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        full = torch.promote_types(x.value.dtype, torch.float32)
        state, change = x.value.to(full).contiguous(), x.tangent.to(full).contiguous()
        B, C, H, W = state.shape
        sizes = (B, C, H * W, layer.num_groups)
        _, mean, inverse = torch.native_group_norm(state, None, None, *sizes, layer.eps)
        # the derivative of n is symmetric, so that forward and backward mode agree
        arguments = (change, state, mean, inverse, None, *sizes, [True, False, False])
        tangent = torch.ops.aten.native_group_norm_backward(*arguments)[0]
        tangent = tangent if layer.weight is None else tangent * _over_pixels(layer.weight)
        return Dual(value, tangent.to(x.tangent.dtype))


def modulate_channels(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift; `x` `(B, C, H, W)`, `shift`, `scale` `(B, C)`."""
    return scale_shift(x, shift.map(_over_pixels), scale.map(_over_pixels))


def upsample(x: Dual, size: int) -> Dual:
    """`(B, C, H, W) -> (B, C, size, size)`: each pixel that of x nearest to it."""
    return x.map(lambda y: F.interpolate(y, size=(size, size), mode="nearest"))


def _over_pixels(x: Tensor) -> Tensor:
    return x[..., None, None]
