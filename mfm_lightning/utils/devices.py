"""Which device a command runs on, and what to lower where its memory ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def find_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of that name; "auto", and "cuda" without a number, are the GPU of this process's rank on its machine,
    where there is one.

    Raises:
        ValueError: if it cannot be used here.
    """
    gpus = torch.cuda.device_count()
    if name in ("auto", "cuda") and gpus:
        name = f"cuda:{local_rank % gpus}"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Where memory ends, say what to lower; raises torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise torch.OutOfMemoryError(f"{what} ran out of memory: lower {remedy}. {first}") from error


def finished(device: torch.device) -> float:
    """The time in seconds, once all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
