"""Directional derivatives of the average velocity, by a backend that the config selects (`BACKENDS`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times, expand

Inner = tuple[Tensor, Tensor, Tensor]
Condition = tuple[Times, Tensor, Conditions]  # t, x_t and the rest
Backend = Callable[[nn.Module, Inner, Inner, Condition], tuple[Tensor, Tensor]]


def functorch(model: nn.Module, inner: Inner, tangents: Inner, condition: Condition) -> tuple[Tensor, Tensor]:
    """v_{s,u}(x) and its derivative along `tangents = (ds, du, dx)`, by torch.func.jvp (the reference).

    Args:
        model: called as `model(s, u, x, t, x_t, conditions)`.
        inner: s, u, x.
        tangents: ds and du `(B,)`, dx `(B, *shape)`.
        condition: t, x_t, conditions.

    Raises:
        ValueError: if the network's blocks are checkpointed, or the model is sharded, which torch.func.jvp cannot
            differentiate (pytorch issue 182641).
    """
    check_backend("functorch", model)

    def velocity(s: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return model(s, u, x, *condition)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        value, tangent, *_ = torch.func.jvp(velocity, inner, tangents)
    return value, tangent


def explicit(model: nn.Module, inner: Inner, tangents: Inner, condition: Condition) -> tuple[Tensor, Tensor]:
    """The same by the network's own rules (`networks.dual`), layer by layer; the derivative has no graph.

    Raises:
        ValueError: if the network has no such rules.
    """
    check_backend("explicit", model)
    return model(*inner, *condition, tangents=tangents)


def finite_difference(model: nn.Module, inner: Inner, tangents: Inner, condition: Condition) -> tuple[Tensor, Tensor]:
    """The same by central differences along the direction, for networks that no other backend can take: two more
    evaluations, without a graph.

    The step is such that no time or entry of the state moves by more than four times the cube root of float32's
    rounding, 0.02. There the error, h^2/6 of the third derivative and rounding/h of the value, is least: 1e-4 to 1e-3
    of the derivative for small networks of random weights, below 1e-7 in float64 (`tests/core/test_tangents.py`). Never
    under autocast, for bf16 rounds at 4e-3. Inner times may leave [0, 1] by the step.

    A network that changes faster with s than with the rest says how much faster, by its attribute `time_rate`: the step
    is then so much smaller, and rounding counts for more.
    """
    value = model(*inner, *condition)
    dtype = torch.promote_types(inner[2].dtype, torch.float32)
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        sizes = [d.abs().reshape(len(d), -1).amax(dim=1).to(dtype) for d in tangents]
        sizes[0] = sizes[0] * getattr(getattr(model, "network", None), "time_rate", 1.0)
        largest = torch.stack(sizes).amax(dim=0)
        h = 4 * torch.finfo(dtype).eps ** (1 / 3) / largest.clamp_min(torch.finfo(dtype).tiny)
        step = tuple(expand(h, d) * d for d in tangents)
        above, below = (
            model(*(x + sign * d for x, d in zip(inner, step, strict=True)), *condition) for sign in (1, -1)
        )
        return value, (above - below) / expand(2 * h, value)


def auto(model: nn.Module, inner: Inner, tangents: Inner, condition: Condition) -> tuple[Tensor, Tensor]:
    """`explicit` where the network has rules, else `functorch`."""
    return BACKENDS[resolved("auto", model)](model, inner, tangents, condition)


def resolved(name: str, model: nn.Module) -> str:
    """The backend of that name, or the one that "auto" stands for."""
    if name != "auto":
        return name
    return "explicit" if has_rules(model) else "functorch"


def check_backend(name: str, model: nn.Module) -> None:
    """Refuse a model that the backend of that name cannot take.

    Raises:
        ValueError: as the backends say.
    """
    name = resolved(name, model)
    if name == "explicit" and not has_rules(model):
        raise ValueError(
            f"{type(model.network).__name__} does not propagate tangents itself: use backend 'auto' or 'functorch'"
        )
    if name == "functorch" and isinstance(model, FSDPModule):
        raise ValueError("backend 'functorch' does not go with FSDP: use 'explicit' or 'finite_difference'")
    if name == "functorch" and getattr(getattr(model, "network", None), "checkpoint_activations", False):
        raise ValueError("checkpointed activations do not go with backend 'functorch': use 'explicit'")


def has_rules(model: nn.Module) -> bool:
    """Whether the model's network takes `tangents`."""
    return "tangents" in inspect.signature(cast(nn.Module, model.network).forward).parameters


BACKENDS: dict[str, Backend] = {
    "auto": auto,
    "explicit": explicit,
    "functorch": functorch,
    "finite_difference": finite_difference,
}


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown tangent backend {name!r}: expected one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]


def velocity_and_jvp(
    model: nn.Module,
    s: Times,
    u: Times,
    x: Tensor,
    t: Times,
    x_t: Tensor,
    tangents: Inner,
    conditions: Conditions | None = None,
    backend: str = "auto",
    *,
    label: Tensor | int | None = None,
    guidance: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """v_{s,u}(x; t, x_t) and its derivative in (s, u, x) along `tangents = (ds, du, dx)`; both `(B, *shape)`.

    Args:
        model: a `MetaFlowMap`.
        s: inner time at the start, `(B,)`.
        u: inner time at the end, `(B,)`.
        x: inner states `(B, *shape)`.
        t: outer times `(B,)`.
        x_t: outer states `(B, *shape)`.
        tangents: `(B,)`, `(B,)` and `(B, *shape)`.
        conditions: as the model takes them; `label=` and `guidance=` make them.
        backend: a name in `BACKENDS`. With "explicit", and "auto" where the network supports it, the derivative has no
            graph.
        label: class of all samples, or `(B,)`.
        guidance: guidance scale, one for all or `(B,)`.
    """
    s, u = as_times(s, x), as_times(u, x)
    ds, du, dx = tangents
    tangents = (as_times(ds, x), as_times(du, x), dx)
    conditions = Conditions.of(conditions, label=label, guidance=guidance)
    return get_backend(backend)(model, (s, u, x), tangents, (t, x_t, conditions))
