"""Our own safetensors files, in and out; any file of plain tensors is read by `mfm_rewards.weights`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import NETWORKS, VALUE_NETWORKS
from mfm_lightning.utils.atomic import whole_file
from mfm_rewards.weights import CheckpointError, load_into


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
