"""Weights in files: plain tensors in, our own safetensors files in and out.

Nothing here unpickles code: `.pt`, `.pth` and `.ckpt` files are read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import NETWORKS, VALUE_NETWORKS
from mfm_lightning.whole_files import whole_file


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
        with torch.serialization.safe_globals([argparse.Namespace]):  # DMF's and SiT's files hold their arguments, too
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


def load_into(network: nn.Module, state: dict[str, Tensor], required: set[str], path: str | Path, source: str) -> None:
    """Load tensors into a network whose names they have.

    Args:
        required: the names that must be there; all must be the network's.
        path, source: where the tensors are from, for the error.

    Raises:
        CheckpointError: if names or shapes do not fit, with the file, the first names, and both shapes.
    """
    own = network.state_dict()
    missing, unexpected = sorted(required - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        first = (
            [f"{k} {tuple(own[k].shape)}" for k in missing[:3]],
            [f"{k} {tuple(state[k].shape)}" for k in unexpected[:3]],
        )
        raise CheckpointError(
            f"{path} does not hold a {source!r} network of this architecture: {len(missing)} names missing"
            f" {first[0]}, {len(unexpected)} unexpected {first[1]}"
        )
    wrong = [k for k in state if state[k].shape != own[k].shape]
    if wrong:
        shapes = [f"{k}: {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network" for k in wrong[:3]]
        raise CheckpointError(f"{path}: {len(wrong)} tensors of another shape, first {'; '.join(shapes)}")
    network.load_state_dict(state, strict=False)


def save_network(network: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a network's weights, and in the file's metadata its class and `config`, as safetensors."""
    path = Path(path)
    header = {"network": type(network).__name__, "config": json.dumps(network.config), **(metadata or {})}
    tensors = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata=header)
    return path


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; of ours: `network`, `config`, and `kind` ("base_flow",
    "flow_map", "meta_flow_map", ...).

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
    load_into(network, load_file(path), set(network.state_dict()), path, "mfm-lightning")
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
