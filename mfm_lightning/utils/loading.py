"""What worker processes make, with their errors as they are: raised in a worker, one would come with its traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate


class Computed(Dataset):
    """`make(k)` for each k; an error is what comes back: raised in a worker, it would come with its traceback.

    Args:
        make: what is asked for, by its number.
        num: how many there are.
    """

    def __init__(self, make: Callable[[int], Any], num: int) -> None:
        self.make, self.num = make, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, k: int) -> Any:
        try:
            return self.make(k)
        except (OSError, ValueError) as error:
            return error


def raised(items: Iterable[Any]) -> Iterator[Any]:
    """The items, until an error is among them, which is raised."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


class RaisingLoader(DataLoader):
    """A DataLoader that raises the errors among what a `Computed` gives; for batches with `collate_fn=collated`.

    It takes no random number from training's noise, as torch's own does at each start, also of a resumed run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"generator": torch.Generator(), **kwargs})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return raised(super().__iter__())


def collated(samples: list[Any]) -> Any:
    """A batch of samples, or the first error among them."""
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or default_collate(samples)
