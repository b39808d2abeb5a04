"""What a reward and its server send each other: tensors as raw bytes after a JSON header (safetensors' format)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

VERSION = 1  # of requests and answers
INTEGERS = ("labels", "groups")
TYPES = {"float32": torch.float32, "uint8": torch.uint8}


def pack(tensors: dict[str, Tensor], **fields: Any) -> bytes:
    """Tensors, and what can be written as JSON, as bytes.

    Raises:
        TypeError: for a field that JSON cannot hold.
    """
    from safetensors.torch import save

    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"json": json.dumps(fields)})


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the fields; nothing is unpickled.

    Raises:
        ValueError: if they are not whole, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        fields = json.loads(header["__metadata__"]["json"])
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"no tensors with a JSON header: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("no tensors with a JSON header: its fields are no object")
    return tensors, fields
