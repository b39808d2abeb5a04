"""The tangent of attention, in one of three ways: of q, k, v `(B, heads, T, d)` with their tangents dq, dk, dv.

With weights S = softmax(q k^T / sqrt(d)) and the scores' tangent A = (dq k^T + q dk^T) / sqrt(d), it is

    (S A) v - rowsum(S A) (S v) + S dv,   products of S and A by element.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, cast, get_args

import torch
import torch.autograd.forward_ad as forward_mode
import torch.nn.functional as F
from torch import Tensor

Parameters = ParamSpec("Parameters")
AttentionTangent = Literal["auto", "chunked", "fused", "triton"]
MAX_WEIGHTS = {"cpu": 2**20, "cuda": 2**26}  # attention weights that `chunked` holds at once
TRITON_SIZES = (32, 64, 128, 256)  # of a head, that the package's kernel computes with blocks of 32
MISSING = (
    "attention_tangent triton needs the package jvp-flash-attention: pip install 'mfm-lightning[triton]', "
    "or take chunked or fused"
)


def _eager(function: Callable[Parameters, Tensor]) -> Callable[Parameters, Tensor]:
    """`function`, which `torch.compile` leaves as it is."""
    return cast(Callable[Parameters, Tensor], torch.compiler.disable(function))


def check_attention_tangent(kind: str) -> AttentionTangent:
    """`kind`, if it is one and what it needs is installed.

    Raises:
        ValueError: for another word.
        ModuleNotFoundError: for "triton" without its package; the message names the extra.
    """
    for known in get_args(AttentionTangent):
        if kind == known:
            if kind == "triton":
                _kernel()
            return known
    raise ValueError(f"attention_tangent {kind!r}: expected one of {', '.join(get_args(AttentionTangent))}")


def attention_tangent(
    kind: AttentionTangent, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, value: Tensor
) -> Tensor:
    """The tangent of softmax(q k^T / sqrt(d)) v, of the value's shape and type; `value` is the attention itself.

    Args:
        kind: "chunked": plain products, some heads or queries at a time; "fused": by the backward pass of torch's fused
            attention; "triton": by the kernel of jvp-flash-attention. "auto" is "chunked", which is exact in every
            type and the fastest that was measured (on CPUs; docs/performance.md).
    """
    if kind == "fused":
        return fused(q, k, v, dq, dk, dv)
    if kind == "triton":
        return by_triton(q, k, v, dq, dk, dv)
    return chunked(q, k, v, dq, dk, dv, value)


def chunked(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, value: Tensor) -> Tensor:
    """Plain products, over some heads at a time or some queries of one head: no more than `MAX_WEIGHTS` are held."""
    B, heads, T, size = value.shape

    def flat(x: Tensor) -> Tensor:
        return x.reshape(B * heads, T, -1)

    # the scale goes to where there is least of it
    queries, dq, keys, dk = flat(q * size**-0.5), flat(dq * size**-0.5), flat(k), flat(dk)
    values, dv, output = flat(v), flat(dv), flat(value)
    tangent = value.new_empty(B * heads, T, values.shape[-1])
    limit = MAX_WEIGHTS.get(value.device.type, MAX_WEIGHTS["cuda"])
    num_heads, num_rows = max(1, limit // T**2), max(1, min(T, limit // T))
    for head in range(0, B * heads, num_heads):
        h = slice(head, head + num_heads)
        across, change_across = keys[h].mT, dk[h].mT
        for row in range(0, T, num_rows):
            r = slice(row, row + num_rows)
            weights = (queries[h, r] @ across).softmax(dim=-1)
            change = torch.baddbmm(dq[h, r] @ across, queries[h, r], change_across).mul_(weights)
            part = torch.baddbmm(weights @ dv[h], change, values[h])
            tangent[h, r] = part.addcmul_(change.sum(dim=-1, keepdim=True), output[h, r], value=-1)
    return tangent.reshape(value.shape)


@_eager  # autograd inside of a step without a graph; the rest of a block is compiled
def fused(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """By the backward pass of fused attention, with heads twice as wide: no quadratic matrix.

    Attention of Q = [q, 0], K = [k, v], V = [k, dk] has the weights S, and its gradient by Q along G = [dq, q] is
    S (A - rowsum(S A)) K / sqrt(d), for G V^T is the tangent of the scores. Its second half is what the scores add.
    """
    scale = q.shape[-1] ** -0.5
    with torch.no_grad():
        through_values = F.scaled_dot_product_attention(q, k, dv, scale=scale)
    with torch.enable_grad():
        wide = torch.cat([q, torch.zeros_like(q)], -1).detach().requires_grad_()
        out = F.scaled_dot_product_attention(wide, torch.cat([k, v], -1), torch.cat([k, dk], -1), scale=scale)
        (gradient,) = torch.autograd.grad(out, wide, torch.cat([dq, q], -1))
    return gradient[..., q.shape[-1] :] + through_values


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Chunks of a GPU on tensors of a CPU: to plan what a GPU will do."""
    before = MAX_WEIGHTS["cpu"]
    MAX_WEIGHTS["cpu"] = MAX_WEIGHTS["cuda"]
    try:
        yield
    finally:
        MAX_WEIGHTS["cpu"] = before


@_eager
def by_triton(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """By the kernel of jvp-flash-attention, value and tangent in one pass; heads are padded to its sizes.

    Raises:
        ModuleNotFoundError: without the package.
        ValueError: for tensors, or a device, that the kernel does not take.
    """
    attention = _kernel()
    T, size = q.shape[-2:]
    if T % 32 or size > TRITON_SIZES[-1] or q.dtype == torch.float64:
        raise ValueError(
            f"attention_tangent triton: {T} tokens in heads of {size} in {q.dtype}: its kernel takes a multiple of 32 "
            f"(with another number it writes outside of its arrays), heads up to {TRITON_SIZES[-1]}, and no float64; "
            "take chunked"
        )
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("attention_tangent triton runs on GPUs (or by Triton's interpreter, TRITON_INTERPRET=1)")
    if q.device.type == "cpu" and q.dtype != torch.float32:  # what it gives is garbage, and it does not say so
        raise ValueError(
            f"Triton's interpreter does not compute in {str(q.dtype).removeprefix('torch.')}: take float32"
        )
    more = next(n for n in TRITON_SIZES if n >= size) - size
    primals, tangents = ([F.pad(x, (0, more)).contiguous() for x in part] for part in ((q, k, v), (dq, dk, dv)))
    with forward_mode.dual_level():
        duals = [forward_mode.make_dual(x.detach(), dx) for x, dx in zip(primals, tangents, strict=True)]
        out = attention(duals[0], duals[1], duals[2], sm_scale=size**-0.5, verify_attn_mask=False)
        tangent = forward_mode.unpack_dual(out).tangent
    assert tangent is not None
    return tangent[..., :size]


def _kernel() -> Any:
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    return JVPAttn.fwd_dual
