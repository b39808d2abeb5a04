"""How a network is run: its precision, and what it trades for memory and speed. The one spelling of precision."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import torch

from mfm_rewards.protocol import RewardError, nearest

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> Precision:
    """`precision` as it is.

    Raises:
        ValueError: if it is unknown; the message lists the names.
    """
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(DTYPES)}")
    return precision


def autocast(device: torch.device | str, precision: Precision) -> torch.autocast:
    """A context in which a network computes in `precision`, whatever autocast is around it; "fp32" is no autocast.

    Raises:
        ValueError: for an unknown precision.
    """
    check_precision(precision)
    kind = torch.device(device).type
    if precision == "fp32":
        return torch.autocast(kind, enabled=False)
    if precision == "bf16" and kind == "cpu":
        warn_if_bf16_is_slow()
    return torch.autocast(kind, DTYPES[precision])


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has products of bf16, without which they are slower than those of fp32: AVX-512 BF16 or
    AMX of x86; of others it is taken to be so."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def warn_if_bf16_is_slow() -> None:
    """Say once where this processor multiplies no bf16, so that bf16 costs time in place of saving it."""
    if not cpu_multiplies_bf16():
        log.warning("bf16 is slower than fp32 on this CPU, which has neither AVX-512 BF16 nor AMX: use fp32 here")


@dataclass(frozen=True)
class Execution:
    """How a reward runs its pretrained network.

    Args:
        precision: of the network: "fp32"; "bf16" or "fp16" by autocast. The score is computed from its features in
            float32. Gradients are not scaled: small ones vanish in fp16, so prefer bf16 where they are needed.
        checkpoint_activations: keep only the input of each block for the gradient, and compute the rest again in the
            backward pass: less memory, one more forward pass.
        compile: compile each block with `torch.compile`; on a CPU this needs a C++ compiler.
        max_rows: largest number of images in the network at once, at least 1. It bounds memory, also for gradients:
            parts of a larger batch are computed again in the backward pass.

    Raises:
        ValueError: for a value that is not allowed.
    """

    precision: Precision = "fp32"
    checkpoint_activations: bool = False
    compile: bool = False
    max_rows: int = 64

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for name in ("checkpoint_activations", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.max_rows, int) or self.max_rows < 1:
            raise ValueError(f"max_rows must be a whole number, at least 1, got {self.max_rows!r}")


OPTIONS = tuple(field.name for field in fields(Execution))


def as_execution(execution: Execution | dict[str, Any] | None) -> Execution:
    """An `Execution` from what a config holds: a dictionary of its fields, or None for the defaults.

    Raises:
        RewardError: for an unknown field (the nearest name is suggested), or for something else than a dictionary.
        ValueError: for a value that is not allowed.
    """
    if isinstance(execution, Execution):
        return execution
    if execution is None:
        return Execution()
    if not isinstance(execution, dict):
        raise RewardError(f"execution must be a dictionary such as {{precision: bf16}}, got {execution!r}")
    for name in execution:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise RewardError(
                f"unknown option execution.{name}: did you mean {nearest(str(name), OPTIONS)!r}? Known are {known}"
            )
    return Execution(**execution)
