"""Released MFM, DMF and SiT weights as Meta Flow Maps, and back to the release's names."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mfm_lightning.checkpoints.architecture import infer_architecture
from mfm_lightning.checkpoints.released import (
    ADDED,
    ANCHORS,
    SOURCES,
    drop_sigma,
    from_one_time_embedding,
    from_released_names,
    has_sigma,
    sources_of,
    to_released_names,
    with_null_label,
)
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from mfm_lightning.networks.dit import QKNorm
from mfm_lightning.networks.files import read_metadata
from mfm_lightning.utils.atomic import whole_file
from mfm_rewards.hub import find_file
from mfm_rewards.weights import CheckpointError, load_into, read_checkpoint, tensors_of, unwrapped

log = logging.getLogger(__name__)
_CONFIG = "mfm_lightning_config"  # in the metadata of an exported file: what shapes do not tell
_KINDS = {"mfm": "meta_flow_map", "dmf": "flow_map", "sit": "base_flow"}


def import_checkpoint(
    path: str | Path,
    source: str = "mfm",
    *,
    input_size: int | None = None,
    patch_size: int | None = None,
    in_channels: int | None = None,
    hidden_size: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    encoder_depth: int | None = None,
    num_classes: int | None = None,
    qk_norm: QKNorm | None = None,
    guidance_scales: Sequence[float] | None = None,
    flip_time: bool | None = None,
    allow_download: bool = False,
    revision: str | None = None,
) -> MetaFlowMap:
    """Build a DiT from released weights; sizes that are not given are read from the shapes (`infer_architecture`).

    A DMF becomes a Meta Flow Map that equals it as a two-time flow map, a SiT one that equals it on the diagonal; both
    ignore the condition (t, x_t) and the guidance scale until trained. Of a `learn_sigma` head's 2C channels the first
    C, the velocity, are kept.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or Lightning `.ckpt` file, or a Hugging Face repository (`find_file`);
            names may carry prefixes, and what torch.compile and sharding put into them (`unwrapped`).
        source: "mfm", "dmf" or "sit": whose parameter names the file has.
        input_size: height and width of a state.
        patch_size: pixels of a patch along each side.
        in_channels: channels of a state.
        hidden_size: width of the transformer.
        depth: number of blocks.
        num_heads: of attention.
        encoder_depth: number of blocks that see the encoder's condition; the rest see the decoder's.
        num_classes: where a table of labels has no more rows than that, none is of the null label: one is added.
        qk_norm: norm of queries and keys.
        guidance_scales: scales that the network was trained with.
        flip_time: the weights take t=1 for noise (True, the default, for released MFM and DMF weights and for SiT as
            retrained by the DMF and REPA projects; False for the original SiT release).
        allow_download: fetch the file where it is not on this machine.
        revision: of a Hugging Face repository.

    Raises:
        FileNotFoundError: if there is no such file, with what was looked for.
        CheckpointError: if names or shapes do not fit the source or the architecture, or a size must be given.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}")
    given = {
        "input_size": input_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "encoder_depth": encoder_depth,
        "num_classes": num_classes,
        "qk_norm": qk_norm,
        "guidance_scales": guidance_scales,
        "flip_time": flip_time,
    }
    path = find_file(path, allow_download, revision)
    content = read_checkpoint(path, [argparse.Namespace])  # DMF's and SiT's hold their arguments
    state = unwrapped(tensors_of(content, path), ANCHORS, path)
    if source not in (possible := sources_of(state)):
        raise CheckpointError(f"{path} has names of source {' or '.join(map(repr, possible))}, not of {source!r}")
    if source == "mfm":
        given = {**_exported_config(path), **{k: v for k, v in given.items() if v is not None}}
        state = from_released_names(state)
    else:
        state = from_one_time_embedding(state)
        if has_sigma(state):
            state = drop_sigma(state)
            if source == "sit" and flip_time is None:
                log.warning(
                    "%s has a head of 2C channels, as the original SiT release has, whose weights take t=1 for data: "
                    "if it is that, give flip_time=False (mfm import: --no-flip-time)",
                    path,
                )
    classes = given["num_classes"] if given.get("num_classes") is not None else _stated_classes(content)
    if ANCHORS[0] in state:
        state, given["num_classes"] = with_null_label(state, classes, path)
    flip_time = given.pop("flip_time", None)
    config = infer_architecture(state, given, path)
    model = MetaFlowMap(DiT(**config, flip_time=True if flip_time is None else flip_time))
    required = {k for k in model.network.state_dict() if source == "mfm" or not k.startswith(ADDED)}
    load_into(model.network, state, required, path, source)
    return model


def imported_kind(path: str | Path, source: str = "mfm") -> str:
    """What a file's weights are: "meta_flow_map", "flow_map" or "base_flow". A file that `export_checkpoint` wrote says
    it, in the metadata of a `.safetensors`; of others the source does."""
    header = read_metadata(path) if Path(path).suffix == ".safetensors" else {}
    return header.get("kind", _KINDS[source])


def export_checkpoint(model: MetaFlowMap, path: str | Path, prefix: str = "dit.", kind: str = "meta_flow_map") -> Path:
    """Write a model under the released MFM's parameter names; `import_checkpoint` reads it back, bit for bit.

    Args:
        model: whose weights are written.
        path: ends in `.safetensors` (with the kind, and the sizes that shapes do not tell, in the metadata), or in
            `.pt`, `.pth` or `.ckpt` (the tensors under "state_dict").
        prefix: before each name; "dit." for the release.
        kind: of the model, for its next import.

    Raises:
        CheckpointError: if the network is not a DiT, which is all that the release knows.
        ValueError: for another suffix.
    """
    path, network = Path(path), model.network
    if not isinstance(network, DiT):
        raise CheckpointError(f"only a DiT has released names, this is a {type(network).__name__}")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, .pt, .pth or .ckpt")
    if not network.flip_time:
        log.warning(
            "%s takes t=0 for noise, released MFM weights t=1: the release's code must be told, and import_checkpoint "
            "(flip_time=False) unless it reads this file's metadata",
            path,
        )
    if kind != "meta_flow_map" and path.suffix != ".safetensors":
        log.warning(
            "%s cannot say that it is a %s, and will be imported as a Meta Flow Map: a .safetensors file can",
            path,
            kind.replace("_", " "),
        )
    state = to_released_names(network.state_dict())
    state = {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with whole_file(path) as partial:
        if path.suffix == ".safetensors":
            save_file(state, partial, metadata={_CONFIG: json.dumps(network.config), "kind": kind})
        else:
            torch.save({"state_dict": state}, partial)
    return path


def _stated_classes(content: Any) -> int | None:
    """The number of classes in the training script's arguments, where they are beside the weights."""
    arguments = content.get("args") if isinstance(content, dict) else None
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    found = arguments.get("num_classes") if isinstance(arguments, dict) else None
    return found if isinstance(found, int) else None


def _exported_config(path: Path) -> dict[str, object]:
    """What `export_checkpoint` wrote beside the weights; nothing for other files."""
    header = read_metadata(path) if path.suffix == ".safetensors" else {}
    return json.loads(header.get(_CONFIG, "{}"))
