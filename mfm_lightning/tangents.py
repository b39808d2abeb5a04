"""Directional derivatives of the average velocity, by a backend that the config selects.

`register_backend` adds another one: a function with the signature of `functorch` below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Backend = Callable[[Velocity, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]


def functorch(velocity: Velocity, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
    """`velocity(s, u, x)` and its derivative along `tangents = (ds, du, dx)`, by torch.func.jvp (the reference)."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        return torch.func.jvp(velocity, primals, tangents)


BACKENDS: dict[str, Backend] = {"functorch": functorch}


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
