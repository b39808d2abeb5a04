"""Batches from worker processes by way of memory that is used again and again.

torch's own way gives each batch fresh shared memory, and to have it from the operating system costs as much as to draw
the latents that it is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BatchRing:
    """Shared memory for the batches of each worker, used in turn.

    A worker may be at work on `prefetch_factor` batches that the reader has not yet asked for, hence it has one more
    slot than that, and one to spare: a batch stays until the reader, who copies it at once, has asked for the next.

    Args:
        workers: processes that write.
        prefetch_factor: of the DataLoader.
        batch_size: rows of a slot.
        state_shape: of a row.
    """

    def __init__(self, workers: int, prefetch_factor: int, batch_size: int, state_shape: tuple[int, ...]) -> None:
        self.slots = prefetch_factor + 2
        self._x1 = torch.empty(workers, self.slots, batch_size, *state_shape).share_memory_()
        self._label = torch.empty(workers, self.slots, batch_size, dtype=torch.long).share_memory_()

    def slot(self, worker: int, number: int, rows: int) -> tuple[Tensor, Tensor]:
        """Where a worker's batch of that number is: x1 `(rows, *state_shape)`, label `(rows,)`."""
        at = worker, number % self.slots
        return self._x1[at][:rows], self._label[at][:rows]

    def take(self, place: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """A copy of a batch, in memory that a GPU can read from where there is one."""
        x1, label = self.slot(*place)
        return (x1.pin_memory(), label.pin_memory()) if torch.cuda.is_available() else (x1.clone(), label.clone())


def as_it_is(place: Any) -> Any:
    """A worker's answer, unchanged: the place of a batch, which torch must not make a tensor of."""
    return place
