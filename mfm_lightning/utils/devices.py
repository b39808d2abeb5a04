"""Which device a command runs on."""

from __future__ import annotations

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
