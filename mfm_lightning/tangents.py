"""Directional derivatives of the average velocity, by a backend that the config selects.

`register_backend` adds another one: a function with the signature of `functorch` below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Inner = tuple[Tensor, Tensor, Tensor]
Backend = Callable[[nn.Module, Inner, Inner, tuple], tuple[Tensor, Tensor]]


def functorch(model: nn.Module, inner: Inner, tangents: Inner, condition: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """v_{s,u}(x) and its derivative along `tangents = (ds, du, dx)`, by torch.func.jvp (the reference).

    Args:
        model: called as `model(s, u, x, t, x_t, label, guidance)`.
        inner: s, u, x.
        condition: t, x_t, label, guidance.
    """

    def velocity(s: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return model(s, u, x, *condition)

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        return torch.func.jvp(velocity, inner, tangents)


def explicit(model: nn.Module, inner: Inner, tangents: Inner, condition: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The same by the network's own rules (`networks.dual`), layer by layer; the derivative has no graph.

    Raises:
        ValueError: if the network has no such rules.
    """
    if not has_rules(model):
        raise ValueError(
            f"{type(model.network).__name__} does not propagate tangents itself: use backend 'auto' or 'functorch'"
        )
    return model(*inner, *condition, tangents=tangents)


def auto(model: nn.Module, inner: Inner, tangents: Inner, condition: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """`explicit` where the network has rules, else `functorch`."""
    return (explicit if has_rules(model) else functorch)(model, inner, tangents, condition)


def has_rules(model: nn.Module) -> bool:
    """Whether the model's network takes `tangents`."""
    return "tangents" in inspect.signature(model.network.forward).parameters


BACKENDS: dict[str, Backend] = {"auto": auto, "explicit": explicit, "functorch": functorch}


def register_backend(name: str, backend: Backend) -> None:
    """Make `backend` selectable by `name`."""
    BACKENDS[name] = backend


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown tangent backend {name!r}: expected one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
