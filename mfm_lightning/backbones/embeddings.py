"""Embeddings of prompts: rows of a batch, and a folder that keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_lightning.utils.atomic import whole_file

Embedding = dict[str, Tensor]  # "text" (1, L, D), and some of "mask" (1, L) and "pooled" (1, P)


@dataclass(frozen=True)
class Embedded:
    """What data that bring embeddings with them say of those.

    Args:
        flow: that made them: `TextToImageFlow.parts`, and its `name`.
        null: the empty prompt's embedding.
        place: of the data, for messages.
    """

    flow: Mapping[str, Any]
    null: Embedding
    place: str


class EmbeddingCache:
    """The embeddings of prompts, by all that they depend on: a safetensors file each.

    Args:
        folder: made when something is kept; None keeps them in memory.
        megabytes: that they may take in memory: those that were not asked for the longest go first.
    """

    def __init__(self, folder: str | Path | None, megabytes: float = 4000.0) -> None:
        self.folder, self.megabytes = None if folder is None else Path(folder), megabytes
        self._kept: dict[str, Embedding] = {}
        self._bytes = 0

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is there."""
        key = _key(settings)
        return key in self._kept if self.folder is None else (self.folder / f"{key}.safetensors").is_file()

    def find(self, settings: Mapping[str, Any]) -> Embedding | None:
        """One of them; None where it is not there."""
        if not self.has(settings):
            return None
        key = _key(settings)
        if self.folder is not None:
            return load_file(self.folder / f"{key}.safetensors")
        self._kept[key] = found = self._kept.pop(key)  # to the end of those that go
        return found

    def keep(self, settings: Mapping[str, Any], embedding: Embedding) -> None:
        """Keep one."""
        if self.folder is None:
            self._drop(_key(settings))
            self._kept[_key(settings)] = embedding
            self._bytes += size_of(embedding)
            while self._bytes > 1e6 * self.megabytes and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {name: str(value) for name, value in settings.items()}
        with whole_file(self.folder / f"{_key(settings)}.safetensors") as path:
            save_file({name: value.contiguous() for name, value in embedding.items()}, path, about)

    def _drop(self, key: str) -> None:
        if key in self._kept:
            self._bytes -= size_of(self._kept.pop(key))


def size_of(embedding: Embedding) -> int:
    """Bytes of an embedding."""
    return sum(value.nbytes for value in embedding.values())


def _key(settings: Mapping[str, Any]) -> str:
    text = json.dumps(dict(settings), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stacked(rows: Sequence[Embedding]) -> Embedding:
    """The rows of one batch; shorter texts are padded with zeros, which their masks leave out.

    Raises:
        ValueError: if texts without masks have different lengths.
    """
    longest = max(row["text"].shape[1] for row in rows)
    return {name: torch.cat([padded(row, name, longest) for row in rows]) for name in rows[0]}


def padded(row: Embedding, name: str, length: int) -> Tensor:
    """A tensor of an embedding with zeros up to so many tokens; raises as `stacked`."""
    value = row[name]
    if name == "pooled" or value.shape[1] == length:
        return value
    if "mask" not in row:
        raise ValueError(f"texts of {value.shape[1]} and {length} tokens without masks cannot be one batch")
    padding = value.new_zeros(1, length - value.shape[1], *value.shape[2:])
    return torch.cat([value, padding], dim=1)
