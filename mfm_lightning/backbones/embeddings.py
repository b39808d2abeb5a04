"""Embeddings of prompts: rows of a batch, and a folder that keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_lightning.utils.atomic import whole_file

Embedding = dict[str, Tensor]  # "text" (1, L, D), and some of "mask" (1, L) and "pooled" (1, P)


class EmbeddingCache:
    """The embeddings of prompts, by all that they depend on: a safetensors file each.

    Args:
        folder: made when something is kept; None keeps them in memory.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, Embedding] = {}

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is there."""
        key = _key(settings)
        return key in self._kept if self.folder is None else (self.folder / f"{key}.safetensors").is_file()

    def find(self, settings: Mapping[str, Any]) -> Embedding | None:
        """One of them; None where it is not there."""
        if not self.has(settings):
            return None
        key = _key(settings)
        return self._kept[key] if self.folder is None else load_file(self.folder / f"{key}.safetensors")

    def keep(self, settings: Mapping[str, Any], embedding: Embedding) -> None:
        """Keep one."""
        if self.folder is None:
            self._kept[_key(settings)] = embedding
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {name: str(value) for name, value in settings.items()}
        with whole_file(self.folder / f"{_key(settings)}.safetensors") as path:
            save_file({name: value.contiguous() for name, value in embedding.items()}, path, about)


def _key(settings: Mapping[str, Any]) -> str:
    text = json.dumps(dict(settings), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stacked(rows: Sequence[Embedding]) -> Embedding:
    """The rows of one batch; shorter texts are padded with zeros, which their masks leave out.

    Raises:
        ValueError: if texts without masks have different lengths.
    """
    longest = max(row["text"].shape[1] for row in rows)
    return {name: torch.cat([_padded(row, name, longest) for row in rows]) for name in rows[0]}


def _padded(row: Embedding, name: str, length: int) -> Tensor:
    value = row[name]
    if name == "pooled" or value.shape[1] == length:
        return value
    if "mask" not in row:
        raise ValueError(f"texts of {value.shape[1]} and {length} tokens without masks cannot be one batch")
    padding = value.new_zeros(1, length - value.shape[1], *value.shape[2:])
    return torch.cat([value, padding], dim=1)
