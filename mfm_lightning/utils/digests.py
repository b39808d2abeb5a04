"""Tensors and settings by what they hold."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def digest(*tensors: Tensor) -> str:
    """SHA-256 of tensors with their shapes and types."""
    every = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        every.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        every.update(plain.flatten().view(torch.uint8).numpy().data)
    return every.hexdigest()


def digest_of(plain: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
