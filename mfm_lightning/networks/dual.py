"""A value with its tangent: layers written once, for both.

Consistency targets need a directional derivative of the network, under a stop-gradient. Here each operation propagates
the pair (value, tangent): the value with a graph as always, the tangent without one. Where there is no tangent an
operation is nothing but itself, so a network of these operations is its own forward and its own derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mfm_lightning.networks.attention_tangents import AttentionTangent, attention_tangent


class Dual(NamedTuple):
    """A tensor and its derivative along the direction asked for; a tangent of None is zero."""

    value: Tensor
    tangent: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear, parameter-free `function` (a change of shape or type) of both."""
        return Dual(function(self.value), None if self.tangent is None else function(self.tangent))

    def split(self, function: Callable[[Tensor], Sequence[Tensor]]) -> list[Dual]:
        """The parts that a linear `function` takes both into."""
        values = function(self.value)
        tangents = [None] * len(values) if self.tangent is None else function(self.tangent)
        return [Dual(*part) for part in zip(values, tangents, strict=True)]


def add(*terms: Dual) -> Dual:
    """The sum."""
    value = sum((term.value for term in terms[1:]), terms[0].value)
    tangents = [term.tangent for term in terms if term.tangent is not None]
    with torch.no_grad():
        return Dual(value, sum(tangents[1:], tangents[0]) if tangents else None)


def concatenate(*parts: Dual, dim: int = -1) -> Dual:
    """Side by side in one dimension, the last where it is not given."""
    value = torch.cat([part.value for part in parts], dim)
    if all(part.tangent is None for part in parts):
        return Dual(value)
    tangents = [torch.zeros_like(part.value) if part.tangent is None else part.tangent for part in parts]
    return Dual(value, torch.cat(tangents, dim))


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
    value = F.layer_norm(x.value, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        full = torch.promote_types(x.value.dtype, torch.float32)
        state, shape = x.value.to(full), layer.normalized_shape
        _, mean, inverse = torch.native_layer_norm(state, shape, None, None, layer.eps)
        # the derivative of n is symmetric, so that forward and backward mode agree
        arguments = (x.tangent.to(full), state, shape, mean, inverse, None, None, [True, False, False])
        tangent = torch.ops.aten.native_layer_norm_backward(*arguments)[0]
        tangent = tangent if layer.weight is None else tangent * layer.weight
        return Dual(value, tangent.to(x.tangent.dtype))


def rms_norm(scale: Tensor, eps: float, x: Dual) -> Dual:
    """n = x / r with r = sqrt(mean(x^2) + eps), dn = (dx - n mean(n dx)) / r, both times `scale` `(size,)`."""
    full = torch.promote_types(x.value.dtype, torch.float32)
    state = x.value.to(full)
    inverse = (state.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    normed = state * inverse
    value = (normed * scale).to(x.value.dtype)
    if x.tangent is None:
        return Dual(value)
    with torch.no_grad():
        change = x.tangent.to(full)
        tangent = (change - normed * (normed * change).mean(dim=-1, keepdim=True)) * inverse * scale
        return Dual(value, tangent.to(x.tangent.dtype))


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift; `x` `(B, T, D)`, `shift`, `scale` `(B, D)`."""
    return scale_shift(x, shift.map(_over_tokens), scale.map(_over_tokens))


def scale_shift(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """x (1 + scale) + shift, of shapes that broadcast to that of `x`."""
    factor = 1 + scale.value
    value = torch.addcmul(shift.value, x.value, factor)
    with torch.no_grad():
        tangent = _sum_of_products(shift.tangent, (x.tangent, factor), (scale.tangent, x.value))
        return Dual(value, None if tangent is None else tangent.expand_as(value))


def add_gated(x: Dual, gate: Dual, y: Dual) -> Dual:
    """x + gate y; `x`, `y` `(B, T, D)`, `gate` `(B, D)`."""
    gate = gate.map(_over_tokens)
    value = torch.addcmul(x.value, gate.value, y.value)
    with torch.no_grad():
        return Dual(value, _sum_of_products(x.tangent, (y.tangent, gate.value), (gate.tangent, y.value)))


def attention(q: Dual, k: Dual, v: Dual, kind: AttentionTangent = "auto") -> Dual:
    """softmax(q k^T / sqrt(d)) v for `(B, heads, T, d)`; `kind`: how its tangent is computed."""
    # On CPU the fused kernel is several times slower than plain products for few tokens.
    few = q.value.device.type == "cpu" and q.value.shape[-2] <= 64
    with sdpa_kernel(SDPBackend.MATH) if few else nullcontext():
        value = F.scaled_dot_product_attention(q.value, k.value, v.value)
    if q.tangent is None:
        return Dual(value)
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        (queries, dq), (keys, dk), (values, dv) = (_both(x, value.dtype) for x in (q, k, v))
        return Dual(value, attention_tangent(kind, queries, keys, values, dq, dk, dv, value))


def checkpointed(block: nn.Module, x: Dual, c: Dual) -> Dual:
    """block(x, c), whose activations are dropped and computed again in the backward pass.

    Then without tangents; but a compiled block must be called as before, for its graph decides what it keeps.
    """
    tangents, found = [(x.tangent, c.tangent)], []
    again = tangents[0] if getattr(block, "_compiled_call_impl", None) is not None else (None, None)

    def run(x: Tensor, c: Tensor) -> Tensor:
        dx, dc = tangents.pop() if tangents else again
        y = block(Dual(x, dx), Dual(c, dc))
        found.append(y.tangent)
        return y.value

    value = checkpoint(run, x.value, c.value, use_reentrant=False, preserve_rng_state=False)
    return Dual(value, found.pop())


def _both(x: Dual, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Value and tangent in one type, zeros where there is none."""
    return x.value.to(dtype), torch.zeros_like(x.value, dtype=dtype) if x.tangent is None else x.tangent.to(dtype)


def _over_tokens(x: Tensor) -> Tensor:
    return x[:, None]


def _sum_of_products(term: Tensor | None, *products: tuple[Tensor | None, Tensor]) -> Tensor | None:
    """term + sum_i a_i b_i, each None standing for zero."""
    total = term
    for tangent, factor in products:
        if tangent is not None:
            total = tangent * factor if total is None else torch.addcmul(total, tangent, factor)
    return total
