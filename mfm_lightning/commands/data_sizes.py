"""Sizes of a network that its config leaves to the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)
NAMES = ("state_shape", "input_size", "in_channels", "num_classes")


def missing_sizes(network: Any) -> list[str]:
    """Which sizes a network's parsed config leaves out: arguments of these `NAMES` that are null."""
    arguments = network.get("init_args") if hasattr(network, "get") else None
    return [] if arguments is None else [name for name in NAMES if name in arguments and arguments[name] is None]


def fill_sizes(network: Any, data: Any) -> None:
    """Put what is missing into a network's parsed config, and say so.

    Args:
        data: the DataModule, which says `state_shape` and `num_classes`.

    Raises:
        ValueError: if it does not, or the network is one of square images and its states are none.
    """
    missing, name = missing_sizes(network), type(data).__name__
    sizes = data_sizes(data, missing, network["class_path"])
    for key in missing:
        network["init_args"][key] = sizes[key]
    log.info("network: %s, of the data (%s)", ", ".join(f"{key} {sizes[key]}" for key in missing), name)


def data_sizes(data: Any, wanted: list[str], network: str) -> Mapping[str, Any]:
    """The sizes of a network that fits a DataModule; raises as `fill_sizes`.

    Args:
        wanted: of `NAMES`.
        network: its class path, for messages.
    """
    name, needs = type(data).__name__, f"{network} needs {', '.join(wanted)}"
    shape, classes = getattr(data, "state_shape", None), getattr(data, "num_classes", None)
    if classes is None and "num_classes" in wanted:
        raise ValueError(f"{needs}, and the data ({name}) do not say num_classes: set it in network.init_args")
    if wanted == ["num_classes"]:
        return {"num_classes": classes}
    if shape is None:
        raise ValueError(f"{needs}, and the data ({name}) do not say a state_shape: set them in network.init_args")
    shape = tuple(shape)
    if "state_shape" not in wanted and (len(shape) != 3 or shape[1] != shape[2]):
        raise ValueError(f"{needs} of square images, and the data ({name}) have states {shape}: take another network")
    return {"state_shape": list(shape), "in_channels": shape[0], "input_size": shape[-1], "num_classes": classes}
