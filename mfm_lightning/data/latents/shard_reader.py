"""Samples of shards as raw bytes, read from front to back, with what is wrong with each."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from io import FileIO
from typing import Any

import numpy as np

from mfm_lightning.data.latents.index import LatentIndex
from mfm_lightning.data.latents.urls import join, local_path, open_url

log = logging.getLogger(__name__)
_CHUNK = 1 << 20


class CorruptSampleError(ValueError):
    """A sample that is not what the index says: of which shard, which sample, and why."""


class ShardReader:
    """Reads rows of shards into a buffer; keeps the last shard open, for the next rows are mostly behind those.

    Args:
        index: of the folder.
        folder: path or URL.
        allow_pipe: run the command of a `pipe:` folder.
    """

    def __init__(self, index: LatentIndex, folder: str, allow_pipe: bool = False) -> None:
        self.index, self.folder, self.allow_pipe, self.layout = index, folder, allow_pipe, index.layout
        self._open: tuple[int, Any, int] | None = None  # shard, stream, bytes read

    def read(self, shard: int, rows: np.ndarray, buffer: np.ndarray) -> dict[int, str]:
        """Fill `buffer` `(len(rows), stride)` uint8 with these rows, in ascending order, of a shard.

        Returns:
            what is wrong, by the position in `rows`; the others are well-formed, with the label that the index has.
        """
        wrong: dict[int, str] = {}
        at = 0
        for first, last in _runs(rows):
            part = buffer[at : at + last - first]
            try:
                got = self._fill(shard, first * self.layout.stride, part.data.cast("B"))
                reason = "the shard ends before it"
            except (OSError, ValueError) as error:  # not there, or the download broke off
                got, reason = 0, f"the shard cannot be read ({error})"
                self.close()
            whole = got // self.layout.stride
            wrong.update({at + i: reason for i in range(whole, len(part))})
            labels = self.index.shards[shard].labels[first : first + whole]
            wrong.update({at + i: why for i, why in check_samples(part[:whole], labels, self.layout).items()})
            at += len(part)
        return wrong

    def announce(self, shard: int, rows: np.ndarray) -> None:
        """Let the operating system fetch these rows from disk meanwhile, where it can; nothing goes wrong here."""
        path = local_path(join(self.folder, self.index.shards[shard].name))
        if path is None or not len(rows) or not hasattr(os, "posix_fadvise"):
            return
        begin, end = (int(row) * self.layout.stride for row in (rows[0], rows[-1] + 1))
        try:
            with FileIO(path) as file:
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)
        except OSError as error:  # reading says so, too
            log.debug("announcing %s: %s", path, error)

    def close(self) -> None:
        if self._open is not None:
            try:
                self._open[1].close()
            except OSError as error:  # a download that is cut short on purpose may complain
                log.debug("closing a shard: %s", error)
            self._open = None

    def _fill(self, shard: int, begin: int, buffer: memoryview) -> int:
        """Bytes read from `begin` on: fewer than the buffer's at the end of the file."""
        url = join(self.folder, self.index.shards[shard].name)
        path = local_path(url)
        local = path is not None
        if self._open is None or self._open[0] != shard or (self._open[2] > begin and not local):
            self.close()
            stream = FileIO(path) if path is not None else open_url(url, self.allow_pipe)
            self._open = (shard, stream, 0)
        _, stream, at = self._open
        if local:
            stream.seek(begin)
        else:
            while at < begin and (skipped := stream.read(min(_CHUNK, begin - at))):
                at += len(skipped)
        got = 0
        while got < len(buffer):
            if local:
                count = stream.readinto(buffer[got:])
            else:
                data = stream.read(min(_CHUNK, len(buffer) - got)) if at == begin else b""
                count = len(data)
                buffer[got : got + count] = data
            if not count:
                break
            got += count
        self._open = (shard, stream, begin + got)
        return got


def check_samples(samples: np.ndarray, labels: np.ndarray, layout: Any) -> dict[int, str]:
    """What is wrong with samples `(n, stride)` uint8 whose labels should be `(n,)`, by their position."""
    if not len(samples):
        return {}
    wrong: dict[int, str] = {}
    text = np.zeros((len(samples), 8), dtype=np.uint8)
    for i, label in enumerate(labels.tolist()):
        digits = b"%d" % label
        text[i, : len(digits)] = np.frombuffer(digits, np.uint8)
    at = layout.label_at
    _note(wrong, (samples[:, at : at + 8] != text).any(axis=1), "its label is not the index's")
    expected = np.frombuffer(layout.npy_header, np.uint8)
    at = layout.npy_at
    _note(wrong, (samples[:, at : at + len(expected)] != expected).any(axis=1), "it is no array of the index's shape")
    if layout.text is not None:
        expected, at = np.frombuffer(layout.text.header, np.uint8), layout.embedding_at
        bad = (samples[:, at : at + len(expected)] != expected).any(axis=1)
        _note(wrong, bad, "its caption's embedding is of another form than the index's")
    for at in layout.header_at:
        _note(wrong, ~_checksums_hold(samples[:, at : at + 512]), "its tar header is damaged")
    return wrong


def _checksums_hold(headers: np.ndarray) -> np.ndarray:
    """Whether tar headers `(n, 512)` have the sum that they state in octal, their own field counted as spaces."""
    field = headers[:, 148:156]
    pairs = headers.view(np.uint64)  # eight bytes at once: four sums of 16 bits, which 64 of them do not fill
    low = np.uint64(0x00FF00FF00FF00FF)
    sums = ((pairs & low) + (pairs >> np.uint64(8) & low)).sum(axis=1).view(np.uint16).reshape(-1, 4)
    total = sums.sum(axis=1, dtype=np.int64) - field.sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    stated = (field[:, :6].astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1))
    return total == stated


def _note(wrong: dict[int, str], bad: np.ndarray, reason: str) -> None:
    wrong.update({int(i): reason for i in np.flatnonzero(bad)})


def _runs(rows: np.ndarray) -> Sequence[tuple[int, int]]:
    """Ascending rows as stretches `first..last-1` without gaps."""
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1)
    firsts = rows[np.concatenate([[0], breaks + 1])]
    lasts = rows[np.concatenate([breaks, [len(rows) - 1]])] + 1
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))
