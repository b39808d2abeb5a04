"""A value with its tangent: layers written once, for both.

Consistency targets need a directional derivative of the network, under a stop-gradient. Here each operation propagates
the pair (value, tangent): the value with a graph as always, the tangent without one. Where there is no tangent an
operation is nothing but itself, so a network of these operations is its own forward and its own derivative.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_WEIGHTS = 2**25  # attention weights that the tangent holds at once


class Dual(NamedTuple):
    """A tensor and its derivative along the direction asked for; a tangent of None is zero."""

    value: Tensor
    tangent: Tensor | None = None

    def map(self, function) -> Dual:
        """A linear, parameter-free `function` (a change of shape or type) of both."""
        return Dual(function(self.value), None if self.tangent is None else function(self.tangent))


def add(*terms: Dual) -> Dual:
    """The sum."""
    value = sum((term.value for term in terms[1:]), terms[0].value)
    tangents = [term.tangent for term in terms if term.tangent is not None]
    with torch.no_grad():
        return Dual(value, sum(tangents[1:], tangents[0]) if tangents else None)


def concatenate(*parts: Dual) -> Dual:
    """Side by side in the last dimension."""
    value = torch.cat([part.value for part in parts], dim=-1)
    if all(part.tangent is None for part in parts):
        return Dual(value)
    tangents = [torch.zeros_like(part.value) if part.tangent is None else part.tangent for part in parts]
    return Dual(value, torch.cat(tangents, dim=-1))


def linear(layer: nn.Linear, x: Dual) -> Dual:
    """W x + b, and W dx."""
    value = layer(x.value)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, F.linear(x.tangent, layer.weight))


def gelu(x: Dual) -> Dual:
    """GELU in its tanh form."""
    value = F.gelu(x.value, approximate="tanh")
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():  # the derivative is elementwise, so that forward and backward mode agree
        return Dual(value, torch.ops.aten.gelu_backward(x.tangent, x.value.to(x.tangent), approximate="tanh"))


def silu(x: Dual) -> Dual:
    """x sigmoid(x)."""
    value = F.silu(x.value)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, torch.ops.aten.silu_backward(x.tangent, x.value.to(x.tangent)))


def cos_sin(angle: Dual) -> Dual:
    """cos and sin of `(B, n)` angles, `(B, 2n)`."""
    cos, sin = angle.value.cos(), angle.value.sin()
    if angle.tangent is None:
        return Dual(torch.cat([cos, sin], dim=-1))
    with torch.no_grad():
        return Dual(torch.cat([cos, sin], -1), torch.cat([-sin * angle.tangent, cos * angle.tangent], -1))


def layer_norm(layer: nn.LayerNorm, x: Dual) -> Dual:
    """n = (x - mean) / std, dn = (dx - mean(dx) - n mean(n dx)) / std, then the layer's affine map if it has one."""
    value = layer(x.value)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        full = torch.promote_types(x.value.dtype, torch.float32)
        n, _, inverse = torch.native_layer_norm(x.value.to(full), layer.normalized_shape, None, None, layer.eps)
        dx = x.tangent.to(full)
        tangent = inverse * (dx - dx.mean(-1, keepdim=True) - n * (n * dx).mean(-1, keepdim=True))
        tangent = tangent if layer.weight is None else tangent * layer.weight
        return Dual(value, tangent.to(x.tangent.dtype))


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift; `x` `(B, T, D)`, `shift`, `scale` `(B, D)`."""
    value = x.value * (1 + scale.value[:, None]) + shift.value[:, None]
    if x.tangent is None and scale.tangent is None and shift.tangent is None:
        return Dual(value)
    with torch.no_grad():
        tangent = _product(x, scale.map(lambda s: s[:, None]))
        if x.tangent is not None:
            tangent = x.tangent if tangent is None else tangent + x.tangent
        if shift.tangent is not None:
            tangent = shift.tangent[:, None].expand_as(value) if tangent is None else tangent + shift.tangent[:, None]
        return Dual(value, tangent)


def add_gated(x: Dual, gate: Dual, y: Dual) -> Dual:
    """x + gate y; `x`, `y` `(B, T, D)`, `gate` `(B, D)`."""
    gate = gate.map(lambda g: g[:, None])
    value = x.value + gate.value * y.value
    with torch.no_grad():
        tangent = _product(gate, y)
        if x.tangent is not None:
            tangent = x.tangent if tangent is None else x.tangent + tangent
        return Dual(value, tangent)


def attention(q: Dual, k: Dual, v: Dual) -> Dual:
    """softmax(q k^T / sqrt(d)) v for `(B, heads, T, d)`.

    With weights S and scores' tangent dS: (S dS) v + S dv - rowsum(S dS) (S v), over a part of the queries at a time,
    so that no more than `MAX_WEIGHTS` weights are held.
    """
    T, size = q.value.shape[-2:]
    # On CPU the fused kernel is several times slower than plain products for few tokens.
    with sdpa_kernel(SDPBackend.MATH) if q.value.device.type == "cpu" and T <= 64 else nullcontext():
        value = F.scaled_dot_product_attention(q.value, k.value, v.value)
    if q.tangent is None:
        return Dual(value)
    with torch.no_grad():
        keys, both_keys = k.value.transpose(-1, -2), torch.cat([k.value, k.tangent], dim=-1).transpose(-1, -2)
        both_values = torch.cat([v.value, v.tangent], dim=-2)
        both_queries = torch.cat([q.tangent, q.value], dim=-1)
        rows = max(1, MAX_WEIGHTS // (q.value[..., 0].numel()))
        parts = []
        for part in range(0, T, rows):
            chunk = slice(part, part + rows)
            weights = (q.value[..., chunk, :] @ keys * size**-0.5).softmax(dim=-1)
            change = weights * (both_queries[..., chunk, :] @ both_keys * size**-0.5)
            tangent = torch.cat([change, weights], dim=-1) @ both_values
            parts.append(tangent - change.sum(dim=-1, keepdim=True) * value[..., chunk, :])
        return Dual(value, parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2))


def _product(a: Dual, b: Dual) -> Tensor | None:
    """The tangent of a * b."""
    left = None if a.tangent is None else a.tangent * b.value
    right = None if b.tangent is None else a.value * b.tangent
    return right if left is None else left if right is None else left + right
