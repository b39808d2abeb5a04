"""Weights in and out: our own safetensors files, Lightning checkpoints, and the released MFM, DMF and SiT weights."""

from mfm_lightning.checkpoints.files import load_classifier, load_model, load_value, save_model
from mfm_lightning.checkpoints.importing import export_checkpoint, import_checkpoint, imported_kind
from mfm_lightning.checkpoints.names import find_weights, is_there, shipped
from mfm_lightning.checkpoints.released import (
    RELEASED_NAMES,
    SOURCES,
    from_released_names,
    to_released_names,
)
from mfm_lightning.networks.files import check_network, fingerprint, load_network, read_metadata, save_network
from mfm_rewards.hub import find_file
from mfm_rewards.weights import CheckpointError, load_state_dict

__all__ = [
    "RELEASED_NAMES",
    "SOURCES",
    "CheckpointError",
    "check_network",
    "export_checkpoint",
    "find_file",
    "find_weights",
    "fingerprint",
    "from_released_names",
    "import_checkpoint",
    "imported_kind",
    "is_there",
    "load_classifier",
    "load_model",
    "load_network",
    "load_state_dict",
    "load_value",
    "read_metadata",
    "save_model",
    "save_network",
    "shipped",
    "to_released_names",
]
