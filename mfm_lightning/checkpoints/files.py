"""Models, value networks and classifiers from the safetensors files that were written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from torch import nn

from mfm_lightning.checkpoints.names import find_weights, shipped
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import CLASSIFIERS, VALUE_NETWORKS
from mfm_lightning.networks.classifier import ImageClassifier
from mfm_lightning.networks.files import load_network, read_metadata, said_in, save_network
from mfm_lightning.utils.names import nearest
from mfm_rewards import classifiers


def save_model(model: MetaFlowMap, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """`save_network` of a model's network."""
    return save_network(model.network, path, metadata)


def load_model(path: str | Path, allow_download: bool = False, revision: str | None = None) -> MetaFlowMap:
    """Load what `save_model` wrote, in float32, also where the file has 16 bits.

    Args:
        path: a file, a folder of `save_pretrained`, a name ("mnist", "mnist/flow") or a Hugging Face id
            (`checkpoints.find_weights`).
        allow_download: fetch it from Hugging Face where it is not in the cache on this machine.
        revision: of a Hugging Face repository.

    Raises:
        FileNotFoundError, ImportError: as `find_weights`.
        CheckpointError: as `load_network`.
    """
    file = find_weights(path, allow_download=allow_download, revision=revision)
    return MetaFlowMap.of_file(load_network(file), said_in(file), file)


def load_value(path: str | Path) -> nn.Module:
    """Load an amortised value network V_phi(t, x_t, label).

    Args:
        path: a file, a folder with a `model.safetensors`, or a Hugging Face id in the cache on this machine.

    Raises:
        FileNotFoundError, ImportError: as `find_weights`.
        CheckpointError: as `load_network`.
    """
    return load_network(find_weights(path, "value network", "fit it first (ValueEstimation)"), VALUE_NETWORKS)


def load_classifier(path: str | Path) -> nn.Module:
    """A frozen classifier, from images `(B, C, H, W)` in [0, 1] to logits `(B, K)`; `class_names` are its attribute.

    Args:
        path: a file that `mfm fit` wrote for `Classification`, a name of the package's ("mnist", "mnist/features"), a
            pretrained one ("efficientnet_lite0"), or a Hugging Face id in the cache on this machine.

    Raises:
        FileNotFoundError: if it is nowhere, with the nearest name.
        CheckpointError: as `load_network`.
    """
    if str(path) in classifiers.PRETRAINED and not Path(path).exists():
        return classifiers.load_classifier(str(path))
    meant = nearest(str(path), [*classifiers.PRETRAINED, *{name.split("/")[0] for name in shipped()}])
    file = find_weights(path, "classifier", hint=f"did you mean {meant}?" if meant else "")
    network = cast(ImageClassifier, load_network(file, CLASSIFIERS))  # or one of the user's own
    if names := read_metadata(file).get("class_names"):
        network.class_names = json.loads(names)
    return network.eval().requires_grad_(False)
