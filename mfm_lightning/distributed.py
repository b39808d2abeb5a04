"""The little that ranks have to tell each other besides gradients."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_ranks(mine: Any) -> list[Any]:
    """What every rank has, by rank; called by all of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def own(every: list[Any]) -> Any | None:
    """This rank's part of what `gather_ranks` gave; None if there were another number of ranks then."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)
    return every[rank] if len(every) == size else None
