"""Models, value networks and classifiers from the safetensors files that were written here."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import CLASSIFIERS, VALUE_NETWORKS
from mfm_lightning.networks.files import load_network, save_network
from mfm_rewards.weights import CheckpointError


def save_model(model: MetaFlowMap, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """`save_network` of a model's network."""
    return save_network(model.network, path, metadata)


def load_model(path: str | Path) -> MetaFlowMap:
    """Load what `save_model` wrote; raises as `load_network`."""
    network = load_network(path)
    try:
        return MetaFlowMap(network)
    except TypeError as error:
        raise CheckpointError(f"{path} holds no Meta Flow Map: {error}") from error


def load_value(path: str | Path) -> nn.Module:
    """Load an amortised value network V_phi(t, x_t, label); raises as `load_network`."""
    return load_network(path, VALUE_NETWORKS)


def load_classifier(path: str | Path) -> nn.Module:
    """Load a classifier of images in [0, 1]; raises as `load_network`."""
    return load_network(path, CLASSIFIERS)
