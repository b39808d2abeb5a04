"""What is left out because it is damaged: each file once, however often and by whichever process it is met."""

from __future__ import annotations

import logging
import zlib
from typing import Literal, get_args

import torch

log = logging.getLogger(__name__)
Corrupt = Literal["raise", "skip"]  # what a DataModule does at a damaged sample
_WARNINGS = 10  # in each process; all are counted
_PLACES = 1 << 20


def check_corrupt(corrupt: str) -> None:
    """Raises ValueError for a word that is none of `Corrupt`."""
    if corrupt not in get_args(Corrupt):
        raise ValueError(f"corrupt {corrupt!r}: expected one of {', '.join(get_args(Corrupt))}")


class Skipped:
    """Samples and shards that were skipped, by this process and its workers together; `len` is their number.

    A table in shared memory has a byte for each hash of a place, so that no process waits for another one. Of 1,000
    places one may be taken for another, of 100 none.
    """

    def __init__(self) -> None:
        self._seen = torch.zeros(_PLACES, dtype=torch.bool).share_memory_()
        self._warned = 0

    def __len__(self) -> int:
        return int(self._seen.sum())

    def add(self, place: str, message: str) -> None:
        """Count a place, and say the first few; no effect for one that is counted.

        Args:
            place: the same wherever it is met.
            message: what is wrong with it.
        """
        number = zlib.crc32(place.encode()) % _PLACES
        if self._seen[number]:
            return
        self._seen[number] = True
        self._warned += 1
        if self._warned <= _WARNINGS:
            log.warning("skipped: %s%s", message, "; further ones are only counted" * (self._warned == _WARNINGS))
