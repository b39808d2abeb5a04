"""Parameter names and layouts of the released MFM, DMF and SiT weights, to ours and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mfm_rewards.weights import CheckpointError

log = logging.getLogger(__name__)

# Released MFM name -> ours. s_embedder/t_embedder are the encoder's inner times s and u, "_second" the decoder's.
RELEASED_NAMES = {
    "s_embedder_second": "decoder_s",
    "t_embedder_second": "decoder_u",
    "s_embedder": "encoder_s",
    "t_embedder": "encoder_u",
    "t_cond_embedder": "condition_time",
    "x_cond_embedder": "condition_patch",
    "x_cond_adaLN": "condition_gate",
    "y_embedder.embedding_table": "label_embedding",
    "guidance_embedder.embedding_table": "guidance_embedding",
}
SOURCES = ("mfm", "dmf", "sit")
ANCHORS = ("x_embedder.proj.weight",)  # a name that each of them has

# What an MFM adds to a DMF or a SiT; a fresh network holds these at their inert values.
ADDED = (
    "encoder_u",
    "decoder_s",
    "condition_time",
    "condition_patch",
    "condition_gate",
    "guidance_embedding",
)
_USUAL_CLASSES = (1, 2, 10, 100, 200, 1000)
_TRAINING_ONLY = ("logvar_linear.", "projectors.")  # heads of DMF and REPA


def from_released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released MFM parameter names to ours."""
    return _rename(state, RELEASED_NAMES)


def to_released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameter names to the released MFM's."""
    return _rename(state, {ours: theirs for theirs, ours in RELEASED_NAMES.items()})


def from_one_time_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DMF's and SiT's names to ours: their one time embedding is the encoder's for s and the decoder's for u."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("t_embedder."):
            renamed[name.replace("t_embedder", "encoder_s", 1)] = tensor
            renamed[name.replace("t_embedder", "decoder_u", 1)] = tensor
        elif not name.startswith(_TRAINING_ONLY):
            renamed[name] = tensor
    return _rename(renamed, {k: v for k, v in RELEASED_NAMES.items() if k.startswith("y_")})


def with_null_label(
    state: dict[str, Tensor], num_classes: int | None, path: str | Path
) -> tuple[dict[str, Tensor], int | None]:
    """The weights with a row of the null label, after those of the classes, and the number of classes.

    A network that was trained without class dropout has none. Its row is then the mean of the others, which changes
    nothing for a class, and means little: it is said.

    Args:
        state: tensors by name.
        num_classes: None where it is not known; the number of rows tells, unless it is a usual number of classes.
        path: of their file, for messages.

    Raises:
        CheckpointError: if it cannot be told, or is another than the rows say.
    """
    table = state.get("label_embedding.weight")
    if table is None or table.dim() != 2:
        return state, num_classes
    rows = len(table)
    if num_classes is None and rows in _USUAL_CLASSES:
        raise CheckpointError(
            f"{path}: the table of labels has {rows} rows: {rows} classes without the null label (trained without "
            f"class dropout), or {rows - 1} and the null label? Give num_classes (--num-classes {rows} or {rows - 1})"
        )
    if num_classes is not None and rows not in (num_classes, num_classes + 1):
        raise CheckpointError(
            f"{path}: the table of labels has {rows} rows: expected {num_classes} classes, and one for the null label"
        )
    if num_classes != rows:
        return state, rows - 1
    log.warning(
        "%s has no row of the null label (trained without class dropout): it is the mean of the %d classes' now, and "
        "samples without a class and class guidance mean little before training with class dropout",
        path,
        rows,
    )
    return {**state, "label_embedding.weight": torch.cat([table, table.mean(dim=0, keepdim=True)])}, rows


def has_sigma(state: dict[str, Tensor]) -> bool:
    """Whether the head gives 2C channels: DiT's and SiT's `learn_sigma`."""
    patch, head = state.get("x_embedder.proj.weight"), state.get("final_layer.linear.weight")
    return patch is not None and head is not None and len(head) == 2 * patch[0].numel()


def drop_sigma(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The velocity's C of a head's 2C channels; its output features are ordered (p, p, 2C), of which SiT uses the first
    C."""
    p, C = state["x_embedder.proj.weight"].shape[2], state["x_embedder.proj.weight"].shape[1]
    head = {
        name: tensor.unflatten(0, (p * p, 2 * C))[:, :C].flatten(0, 1).contiguous()
        for name, tensor in state.items()
        if name.startswith("final_layer.linear.")
    }
    return {**state, **head}


def sources_of(names: Iterable[str]) -> tuple[str, ...]:
    """The sources whose names a file can have."""
    names = set(names)
    if "t_embedder.mlp.0.weight" in names and not {"s_embedder.mlp.0.weight", "encoder_s.mlp.0.weight"} & names:
        return ("dmf", "sit")
    return ("mfm",) if "x_cond_embedder.proj.weight" in names else SOURCES


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    pattern = re.compile(rf"^({'|'.join(re.escape(n) for n in names)})(?=\.)")
    return {pattern.sub(lambda m: names[m.group(1)], name): tensor for name, tensor in state.items()}
