"""Which process this is, and the little that ranks have to tell each other besides gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """This process among those of a command that needs no communication between them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Process:
        """As torchrun, or SLURM's srun (not the batch script around it), says; else the only one.

        Raises:
            ValueError: if the rank does not lie below the number of processes, or one of these is no number.
        """
        for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
            if all(name in os.environ for name in names[:2]):
                rank, world_size, local_rank = (_number(name) for name in names)
                if not 0 <= rank < world_size:
                    raise ValueError(f"{names[0]}={rank} must lie in 0..{names[1]}-1, and {names[1]} is {world_size}")
                return cls(rank, world_size, local_rank)
        return cls()


def _number(name: str) -> int:
    """An environment variable that says which process this is; 0 where there is none."""
    try:
        return int(os.environ.get(name, 0))
    except ValueError:
        raise ValueError(f"the environment says {name}={os.environ[name]!r}: expected a whole number") from None


def is_first_rank() -> bool:
    """Whether this is the process whose messages are for all ranks: the first, or the only one; also before there is a
    trainer."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # takes seconds, which small commands do not wait

    return not getattr(rank_zero_only, "rank", 0)


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
