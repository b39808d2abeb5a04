"""A DiT's sizes from the shapes of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mfm_lightning.networks.dit import SIZES
from mfm_rewards.weights import CheckpointError, num_blocks

_BY_SHAPE = {(size["hidden_size"], size["depth"]): size for size in SIZES.values()}


def infer_architecture(state: Mapping[str, Tensor], given: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Keyword arguments of `DiT`, all but `flip_time`: those given, and the rest from shapes.

    Shapes do not tell `num_heads` (unless `qk_norm`) and `encoder_depth`: they are those of the S, B, L or XL of this
    width and depth (Table 5). Of the guidance scales shapes tell the number: one is taken for the release's 2.5.

    Args:
        state: tensors under our names.
        given: what is known already; wins over the shapes, which are then checked when the weights are loaded.
        path: of the file, for errors.

    Raises:
        CheckpointError: if a tensor that a size is read from is missing or has another number of dimensions, or a size
            cannot be told: the message names the keyword.
    """
    found: dict[str, Any] = {k: v for k, v in given.items() if v is not None}

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise CheckpointError(
                f"{path}: names missing, first {name} ({dimensions} dimensions); it holds {len(state)} tensors, first "
                f"{sorted(state)[:3]}"
            )
        if state[name].dim() != dimensions:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, expected {dimensions} dimensions"
            )
        return tuple(state[name].shape)

    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    found.setdefault("hidden_size", hidden)
    found.setdefault("in_channels", channels)
    found.setdefault("patch_size", patch)
    side = math.isqrt(tokens := shape("pos_embed", 3)[1])
    if side * side != tokens:
        raise CheckpointError(f"{path}: pos_embed has {tokens} tokens, which is no square of a whole number")
    found.setdefault("input_size", side * found["patch_size"])
    found.setdefault("num_classes", shape("label_embedding.weight", 2)[0] - 1)
    found.setdefault("depth", num_blocks(state, "blocks."))
    found.setdefault("mlp_ratio", shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden)
    norm = next((n for n in ("scale", "weight") if f"blocks.0.attn.q_norm.{n}" in state), None)
    found.setdefault("qk_norm", {None: False, "scale": "rms", "weight": "layer"}[norm])
    if norm is not None:
        found.setdefault("num_heads", hidden // max(shape(f"blocks.0.attn.q_norm.{norm}", 1)[0], 1))
    size = _BY_SHAPE.get((found["hidden_size"], found["depth"]), {})
    for keyword in ("num_heads", "encoder_depth"):
        found.setdefault(keyword, size.get(keyword))
    unknown = [k for k in ("num_heads", "encoder_depth") if found[k] is None]
    if unknown:
        raise CheckpointError(
            f"{path}: {' and '.join(unknown)} cannot be told from the shapes of a network of hidden_size "
            f"{found['hidden_size']} and depth {found['depth']} (known are {', '.join(SIZES)}): give "
            + " and ".join(f"{k}=..." for k in unknown)
        )
    if "guidance_scales" not in found:
        found["guidance_scales"] = _guidance_scales(state, path)
    return found


def _guidance_scales(state: Mapping[str, Tensor], path: str | Path) -> tuple[float, ...]:
    table = state.get("guidance_embedding.weight")
    number = 1 if table is None else len(table) - 1  # a DMF or a SiT has none, and gets the release's
    if number > 1:
        raise CheckpointError(
            f"{path}: the weights know {number} guidance scales, whose values shapes do not tell: give "
            "guidance_scales=(...), in the order of training"
        )
    return (2.5,) * number
