"""How captions and their embeddings lie in a sample of a shard: all samples of a folder take the same bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from mfm_lightning.backbones.embeddings import Embedding, padded
from mfm_rewards.execution import DTYPES

CAPTION_BYTES = 4096  # of a caption in UTF-8, more than the tokens of any text encoder here hold
_TYPES = {**DTYPES, "int64": torch.int64}  # by the names in an index
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True)
class TextForm:
    """What is kept of a caption: its embedding in a file `KEY.safetensors`, and `KEY.txt`, filled up with blanks.

    Args:
        tensors: name, type ("bf16", "fp16", "fp32", "int64") and shape of each; a text `(L, D)`, and some of its mask
            `(L,)` and a pooled vector `(P,)`.
        caption_bytes: of the text.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    caption_bytes: int = CAPTION_BYTES

    @classmethod
    def of(cls, embedding: Embedding, kept: str, tokens: int) -> TextForm:
        """Of embeddings like this one, of rows of one.

        Args:
            kept: floating type in which they are kept.
            tokens: that texts with masks are filled up to; others have all the same number.
        """
        wide = embedding["text"].shape[1] if "mask" not in embedding else max(tokens, embedding["text"].shape[1])
        rows = {name: padded(embedding, name, wide)[0] for name in sorted(embedding)}
        types = {name: kept if row.is_floating_point() else "int64" for name, row in rows.items()}
        return cls(tuple((name, types[name], tuple(row.shape)) for name, row in rows.items()))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> TextForm:
        """What `as_dict` gives; raises KeyError, TypeError or ValueError for anything else."""
        tensors = tuple((str(n), str(kind), tuple(map(int, shape))) for n, kind, shape in found["tensors"])
        if not tensors or any(kind not in _TYPES or not shape for _, kind, shape in tensors):
            raise ValueError(f"captions.tensors {found['tensors']}: expected [name, type, shape] of each")
        return cls(tensors, int(found["caption_bytes"]))

    def as_dict(self) -> dict[str, Any]:
        return {"tensors": [list(tensor) for tensor in self.tensors], "caption_bytes": self.caption_bytes}

    @property
    def tokens(self) -> int:
        """L, of a text."""
        return next(shape[0] for name, _, shape in self.tensors if name == "text")

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of each tensor of a sample."""
        return {name: (_TYPES[kind], shape) for name, kind, shape in self.tensors}

    @property
    def header(self) -> bytes:
        """What every file of embeddings begins with."""
        return _header(self.tensors)

    @property
    def file_bytes(self) -> int:
        """Of a file of embeddings."""
        return len(self.header) + sum(prod(shape) * dtype.itemsize for dtype, shape in self.shapes.values())

    def file(self, embedding: Embedding) -> bytes:
        """The file of an embedding.

        Raises:
            ValueError: for one of other tensors or more tokens, or one that is not finite in the type it is kept in.
        """
        if sorted(embedding) != sorted(self.shapes) or embedding["text"].shape[1] > self.tokens:
            has = {name: tuple(value.shape) for name, value in embedding.items()}
            raise ValueError(f"an embedding of {has}: expected {self.tensors} as of the first")
        rows = {}
        for name, (dtype, shape) in self.shapes.items():
            row = padded(embedding, name, self.tokens)[0].to(dtype).contiguous()
            if row.shape != shape or not torch.isfinite(row.float()).all():
                raise ValueError(
                    f"an embedding's {name} {tuple(row.shape)} is not finite in {_NAMES[dtype]}, or not {shape}: keep "
                    "them in bf16 (--embeddings)"
                )
            rows[name] = row
        return save(rows)

    def read(self, files: np.ndarray, out: Mapping[str, Tensor]) -> None:
        """Put the embeddings of files `(B, file_bytes)` uint8 into tensors `(B, *shape)`."""
        begin = len(self.header)
        for name, first, last in _offsets(self.header):
            part = np.ascontiguousarray(files[:, begin + first : begin + last])
            dtype, shape = self.shapes[name]
            out[name].copy_(torch.from_numpy(part).view(dtype).reshape(len(files), *shape))

    def empty(self, rows: int) -> dict[str, Tensor]:
        """Tensors `(rows, *shape)` to be read into."""
        return {name: torch.empty(rows, *shape, dtype=dtype) for name, (dtype, shape) in self.shapes.items()}

    def caption(self, text: str) -> str:
        """As much of a text as there is room for, without blanks around it."""
        return text.strip().encode()[: self.caption_bytes].decode(errors="ignore").strip()

    def caption_file(self, text: str) -> bytes:
        """The file of such a text."""
        return text.encode().ljust(self.caption_bytes)

    def captions(self, files: np.ndarray) -> list[str]:
        """The texts of files `(B, caption_bytes)` uint8."""
        return [row.tobytes().decode(errors="replace").rstrip(" ") for row in files]


def as_rows(content: bytes) -> Embedding:
    """The embedding in a file, as rows of one."""
    return {name: value[None] for name, value in load(content).items()}


@lru_cache
def _header(tensors: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    content = save({name: torch.zeros(shape, dtype=_TYPES[kind]) for name, kind, shape in tensors})
    return content[: 8 + struct.unpack("<Q", content[:8])[0]]


@lru_cache
def _offsets(header: bytes) -> list[tuple[str, int, int]]:
    found = json.loads(header[8:])
    return [(name, *found[name]["data_offsets"]) for name in found if name != "__metadata__"]
