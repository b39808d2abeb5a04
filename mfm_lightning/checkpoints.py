"""Weights in and out: our own safetensors files, Lightning checkpoints, and the released MFM, DMF and SiT weights.

Nothing here unpickles code: `.pt`, `.pth` and `.ckpt` files are read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import NETWORKS, VALUE_NETWORKS, DiT

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
PREFIXES = ("model.model.dit.", "model.dit.", "dit.", "module.")
SOURCES = ("mfm", "dmf", "sit")


class CheckpointError(ValueError):
    """A file that is not what it was taken for."""


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors`, `.pt`, `.pth` or `.ckpt` file, by name, on the CPU.

    A dictionary that holds the weights under "ema", "state_dict" or "model" is opened, in that order.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read, or holds anything but plain tensors and numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} is refused: it is not a file of plain tensors ({reason[:120]}). "
            "Save the state dict alone, best as .safetensors."
        ) from error
    for key in ("ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name: expected a state dict")
    return tensors


def import_checkpoint(
    path: str | Path,
    source: str = "mfm",
    *,
    input_size: int = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    hidden_size: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    encoder_depth: int = 8,
    num_classes: int = 1000,
    qk_norm: bool = False,
    guidance_scales: tuple[float, ...] = (2.5,),
    flip_time: bool = True,
) -> MetaFlowMap:
    """Build a DiT of the given architecture from released weights.

    A DMF becomes a Meta Flow Map that equals it as a two-time flow map, a SiT one that equals it on the diagonal; both
    ignore the condition (t, x_t) and the guidance scale until trained.

    Args:
        path: a `.safetensors`, `.pt`, `.pth` or Lightning `.ckpt` file; names may carry a prefix `model.model.dit.`,
            `model.dit.`, `dit.` or `module.`.
        source: "mfm", "dmf" or "sit": whose parameter names the file has.
        flip_time: the weights take t=1 for noise (True for released MFM and DMF weights and for SiT as retrained by the
            DMF and REPA projects; False for the original SiT release).

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if names or shapes do not fit the source or the architecture.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}: expected one of {', '.join(SOURCES)}")
    state = strip_prefixes(load_state_dict(path))
    model = MetaFlowMap(
        DiT(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            encoder_depth=encoder_depth,
            num_classes=num_classes,
            qk_norm=qk_norm,
            guidance_scales=guidance_scales,
            flip_time=flip_time,
        )
    )
    if source == "mfm":
        state, required = from_released_names(state), set(model.network.state_dict())
    else:
        state = _from_one_time_embedding(state)
        required = {k for k in model.network.state_dict() if not k.startswith(_ADDED)}
    _load(model.network, state, required, path, source)
    return model


# What an MFM adds to a DMF or a SiT; a fresh network holds these at their inert values.
_ADDED = (
    "encoder_u",
    "decoder_s",
    "condition_time",
    "condition_patch",
    "condition_gate",
    "guidance_embedding",
)


def strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the wrappers' prefixes; where some carry `dit.`, only those are kept."""
    inside = {k: v for k, v in state.items() if "dit." in k}
    stripped = {}
    for name, tensor in (inside or state).items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        stripped[name] = tensor
    return stripped


def from_released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released MFM parameter names to ours."""
    return _rename(state, RELEASED_NAMES)


def to_released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameter names to the released MFM's."""
    return _rename(state, {ours: theirs for theirs, ours in RELEASED_NAMES.items()})


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    pattern = re.compile(rf"^({'|'.join(re.escape(n) for n in names)})(?=\.)")
    return {pattern.sub(lambda m: names[m.group(1)], name): tensor for name, tensor in state.items()}


def _from_one_time_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # DMF and SiT have one time embedding: the encoder's for s and the decoder's for u.
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("t_embedder."):
            renamed[name.replace("t_embedder", "encoder_s", 1)] = tensor
            renamed[name.replace("t_embedder", "decoder_u", 1)] = tensor
        elif not name.startswith(("logvar_linear.", "projectors.")):  # training-only heads of DMF and REPA
            renamed[name] = tensor
    return _rename(renamed, {k: v for k, v in RELEASED_NAMES.items() if k.startswith("y_")})


def _load(network: nn.Module, state: dict[str, Tensor], required: set[str], path, source: str) -> None:
    own = network.state_dict()
    missing, unexpected = sorted(required - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not hold a {source!r} network of this architecture: "
            f"{len(missing)} names missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    wrong = [k for k in state if state[k].shape != own[k].shape]
    if wrong:
        k = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors of another shape, first {k}: "
            f"{tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network asked for"
        )
    network.load_state_dict(state, strict=False)


def save_network(network: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a network's weights, and in the file's metadata its class and `config`, as safetensors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"network": type(network).__name__, "config": json.dumps(network.config), **(metadata or {})}
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)  # a reader or a kill sees the old file or the new one, whole
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; of ours: `network`, `config`, and `kind` ("base_flow", "meta_flow_map", ...).

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is not a safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def load_network(path: str | Path, known: Mapping[str, type[nn.Module]] = NETWORKS) -> nn.Module:
    """Build the network that `save_network` wrote.

    Args:
        known: the classes that are wanted, by name.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file was not written by `save_network`, or holds a network of another kind.
    """
    header = read_metadata(path)
    name = header.get("network")
    if name is None:
        raise CheckpointError(f"{path} was not written by mfm-lightning: use import_checkpoint for released weights")
    if name not in known:
        raise CheckpointError(f"{path} holds a {name}: expected one of {', '.join(known)}")
    network = known[name](**json.loads(header["config"]))
    _load(network, load_file(path), set(network.state_dict()), path, "mfm-lightning")
    return network


def save_model(model: MetaFlowMap, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """`save_network` of a model's network."""
    return save_network(model.network, path, metadata)


def load_model(path: str | Path) -> MetaFlowMap:
    """Load what `save_model` wrote; raises as `load_network`."""
    return MetaFlowMap(load_network(path))


def load_value(path: str | Path) -> nn.Module:
    """Load an amortised value network V_phi(t, x_t, label); raises as `load_network`."""
    return load_network(path, VALUE_NETWORKS)


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, by which frozen parts are referenced instead of being stored."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
