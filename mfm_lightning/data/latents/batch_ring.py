"""Batches from worker processes by way of memory that is used again and again.

torch's own way gives each batch fresh shared memory, and to have it from the operating system costs as much as to draw
the latents that it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.latents.text_form import TextForm

Place = tuple[int, int, int, list[str] | None]  # worker, number of the batch, its rows, its captions


class Rows(NamedTuple):
    """Memory of a batch: x1 `(B, *state_shape)`, label `(B,)`, and the tensors of the captions' embeddings by name."""

    x1: Tensor
    label: Tensor
    text: dict[str, Tensor]

    @classmethod
    def empty(cls, rows: int, state_shape: tuple[int, ...], form: TextForm | None) -> Rows:
        """To be filled."""
        text = {} if form is None else form.empty(rows)
        return cls(torch.empty(rows, *state_shape), torch.empty(rows, dtype=torch.long), text)

    def batch(self, captions: list[str] | None) -> Batch:
        """`(x1, label)`; with captions `(x1, {label, prompts, text, ...})`."""
        if captions is None:
            return self.x1, self.label
        return self.x1, {"label": self.label, "prompts": captions, **self.text}


class BatchRing:
    """Shared memory for the batches of each worker, used in turn.

    A worker may be at work on `prefetch_factor` batches that the reader has not yet asked for, hence it has one more
    slot than that, and one to spare: a batch stays until the reader, who copies it at once, has asked for the next.

    Args:
        workers: processes that write.
        prefetch_factor: of the DataLoader.
        batch_size: rows of a slot.
        state_shape: of a row.
        form: of the captions' embeddings, where there are any.
    """

    def __init__(
        self,
        workers: int,
        prefetch_factor: int,
        batch_size: int,
        state_shape: tuple[int, ...],
        form: TextForm | None = None,
    ) -> None:
        self.slots, self._batch_size = prefetch_factor + 2, batch_size
        self._all = _each(Rows.empty(workers * self.slots * batch_size, state_shape, form), Tensor.share_memory_)

    def slot(self, worker: int, number: int, rows: int) -> Rows:
        """Where a worker's batch of that number is."""
        first = (worker * self.slots + number % self.slots) * self._batch_size
        return _each(self._all, lambda tensor: tensor[first : first + rows])

    def take(self, place: Place) -> Batch:
        """A copy of a batch, in memory that a GPU can read from where there is one."""
        worker, number, rows, captions = place
        copied = Tensor.pin_memory if torch.cuda.is_available() else Tensor.clone
        return _each(self.slot(worker, number, rows), copied).batch(captions)


def _each(rows: Rows, function: Callable[[Tensor], Tensor]) -> Rows:
    return Rows(function(rows.x1), function(rows.label), {name: function(value) for name, value in rows.text.items()})


def as_it_is(place: Any) -> Any:
    """A worker's answer, unchanged: the place of a batch, which torch must not make a tensor of."""
    return place
