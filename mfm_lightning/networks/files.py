"""A network's safetensors file, in and out; any file of plain tensors is read by `mfm_rewards.weights`."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mfm_lightning.networks import CLASSIFIERS, NETWORKS, VALUE_NETWORKS
from mfm_lightning.utils.atomic import save_tensors
from mfm_rewards.weights import CheckpointError, load_into, no_weights

_OURS: dict[str, type[nn.Module]] = {**NETWORKS, **VALUE_NETWORKS, **CLASSIFIERS}
_KINDS = {"value": VALUE_NETWORKS, "classifier": CLASSIFIERS}  # by what a file says; all others are NETWORKS
_LOADERS = {"load_model": NETWORKS, "load_value": VALUE_NETWORKS, "load_classifier": CLASSIFIERS}
OF_ITS_WEIGHTS = ("step", "command", "imported_from", "accuracy", "measured", "measured_on")  # what a file says of them
# networks of ours in rooms above this one, which their files name by path
_ABOVE = (
    "mfm_lightning.backbones.network.FlowNetwork",
    "mfm_lightning.backbones.lora.LoRANetwork",
    "mfm_lightning.backbones.adapter.FlowAdapter",
)
_LIBRARIES = ("torch", "lightning", "mfm_lightning", "mfm_rewards", "mfm_benchmarks")  # not a user's own


def save_network(
    network: nn.Module,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    kind: type[nn.Module] | None = None,
) -> Path:
    """Write a network's weights, and in the file's metadata its class and `config`, as safetensors.

    Args:
        dtype: of the weights in the file, such as torch.bfloat16; as they are where None. They are loaded in float32.
        kind: the network's class, where it is mixed with others, as FSDP does.

    Raises:
        CheckpointError: if the network cannot be made again from them; `check_network` says so before any training. Or
            if a weight is NaN or infinite, or becomes so by `dtype`.
    """
    state = network.state_dict()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    _check_finite(network, state, path)
    return save_tensors(state, path, {**file_header(network, kind), **(metadata or {})})


def file_header(network: nn.Module, kind: type[nn.Module] | None = None) -> dict[str, str]:
    """What a network's file says of its class and `config`.

    Args:
        kind: its class, where it is mixed with others.

    Raises:
        CheckpointError: as `save_network`.
    """
    return {"network": _class_path(kind or type(network)), "config": _config(network)}


def _check_finite(network: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse what would be written, `state`, if a number of it is not finite."""
    for name, given in network.state_dict().items():
        finite = torch.isfinite(state[name]) if given.is_floating_point() else None
        if finite is None or finite.all():
            continue
        value, kind = given[~finite].flatten()[0].item(), type(network).__name__
        if math.isfinite(value):
            raise CheckpointError(
                f"{path} is not written: weight {name} of the {kind} is {value:g}, more than a {state[name].dtype} can "
                "hold; take bf16 (torch.bfloat16), or leave the dtype out"
            )
        raise CheckpointError(
            f"{path} is not written: weight {name} of the {kind} is {value}. In a run, its last.ckpt has the same; "
            "begin anew with a lower learning rate, or from a checkpoint before"
        )


def check_network(network: nn.Module) -> None:
    """Refuse a network that a file of its weights could not make again: it is made from what the file would say.

    Raises:
        CheckpointError: with what is missing, and how it is given.
    """
    kind = type(network)
    path, config = _class_path(kind), json.loads(_config(network))
    if path in _ABOVE:  # which would load a pretrained flow once more, as `_check_size` would
        return
    try:
        with torch.device("meta"):  # no memory, no time
            again = kind(**config)
    except RuntimeError:  # a constructor that looks at its numbers, as by .item(), needs real ones
        with torch.random.fork_rng([]):
            again = kind(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the network's config {config} does not make a {path} again: {error}. It must hold its constructor's "
            "arguments"
        ) from error
    ours, theirs = ({k: tuple(v.shape) for k, v in made.state_dict().items()} for made in (network, again))
    if different := [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]:
        name = min(different)
        raise CheckpointError(
            f"the network's config {config} makes another {path}: {name} has shape {theirs.get(name)}, the network's "
            f"{ours.get(name)}. It must hold its constructor's arguments"
        )


def _class_path(kind: type[nn.Module]) -> str:
    """What a file calls a class: one of ours by its name, another by its path.

    Raises:
        CheckpointError: if no later process could import it.
    """
    if _OURS.get(kind.__name__) is kind:
        return kind.__name__
    path = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__ == "__main__" or "<locals>" in path:
        raise CheckpointError(
            f"a file of {path} could not be loaded: its class must stand in a module of its own, such as my_networks.py"
        )
    return path


def _config(network: nn.Module) -> str:
    """A network's `config` as JSON."""
    if not isinstance(config := getattr(network, "config", None), dict):
        raise CheckpointError(
            f"a {type(network).__name__} has no config, from which a file of its weights makes it again: set "
            "self.config to the dictionary of its constructor's arguments"
        )
    try:
        return json.dumps(config)
    except TypeError as error:
        raise CheckpointError(
            f"the config of a {type(network).__name__} must be numbers, texts and lists: {error}"
        ) from error


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
        if zipfile.is_zipfile(path):  # as torch.save writes them
            raise CheckpointError(
                f"{path} is not a safetensors file but one of torch.save: of a run's checkpoint, give the "
                "model.safetensors beside it; of released weights, mfm import converts them"
            ) from error
        what = no_weights(Path(path))
        raise CheckpointError(f"{path} {what or f'is not a safetensors file: {error}'}") from error


def said_in(path: str | Path) -> dict[str, str]:
    """`read_metadata` without what belongs to one file or is made anew with each: what a copy of the network says."""
    return {k: v for k, v in read_metadata(path).items() if k not in ("network", "config", "checkpoint")}


def load_network(path: str | Path, known: Mapping[str, type[nn.Module]] = NETWORKS) -> nn.Module:
    """Build the network that `save_network` wrote; in float32, also where the file has 16 bits.

    Args:
        known: the classes of ours that are wanted, by name; a class of the user's own is imported by its path.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file was not written by `save_network`, or holds a network of another kind.
    """
    header = read_metadata(path)
    name = header.get("network")
    if name is None:
        raise CheckpointError(f"{path} was not written by mfm-lightning: use import_checkpoint for released weights")
    if name in known:
        kind = known[name]
    elif "." in name and _networks_of(header) is known:
        kind = _users_class(name, path)
    else:
        loader = next((load for load, kinds in _LOADERS.items() if kinds is _networks_of(header)), "")
        raise CheckpointError(
            f"{path} holds a {name}: expected one of {', '.join(known)}"
            + f"; it is loaded by mfm_lightning.checkpoints.{loader}" * (name in _OURS or "." in name)
        )
    config = _read_config(header, path)
    try:
        if name not in _ABOVE:
            _check_size(kind, config, path)
        network = kind(**config)
    except CheckpointError:
        raise
    except (TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a {name} that the class does not make any more: {error}") from error
    if not hasattr(network, "config"):
        setattr(network, "config", config)  # noqa: B010 # a Module declares tensors and modules alone
    fill_network(network, path)
    return network


def read_header(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The class of a file's network, as the file calls it, and its `config`; raises as `load_network`."""
    header = read_metadata(path)
    return header.get("network", "file of something else"), _read_config(header, path)


def fill_network(network: nn.Module, path: str | Path) -> None:
    """Load a file's weights into a network of its class and config; raises CheckpointError as `load_network`."""
    state = load_file(path)
    if broken := next((k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()), None):
        raise CheckpointError(
            f"{path} holds numbers that are not finite, first in {broken}: its training had broken down"
        )
    load_into(network, state, set(network.state_dict()), path, "mfm-lightning")


def load_any(path: str | Path) -> nn.Module:
    """Build the network of a file, of whatever kind it says it is; raises as `load_network`."""
    return load_network(path, _networks_of(read_metadata(path)))


def _networks_of(header: Mapping[str, str]) -> Mapping[str, type[nn.Module]]:
    """The classes that a file's own is one of, by what it says."""
    ours = next((kinds for kinds in _LOADERS.values() if header.get("network") in kinds), NETWORKS)
    return _KINDS.get(header.get("kind", ""), ours)


def _read_config(header: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(header.get("config", ""))
    except ValueError as error:
        raise CheckpointError(f"{path}: the network's config in its metadata is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the network's config in its metadata is no JSON object: {config!r}")
    return config


def _check_size(kind: type[nn.Module], config: dict[str, Any], path: str | Path) -> None:
    """Refuse a file whose config asks for another network than its tensors are of, before memory is taken for it."""
    limit, ours = Path(path).stat().st_size, kind in _OURS.values()
    # the numbers of our networks are sizes; those of others may be anything
    large = [k for k, v in config.items() if ours and isinstance(v, int) and v > limit]
    if large:
        raise CheckpointError(
            f"{path} asks for a network with {large[0]} {config[large[0]]:,}, and has {limit:,} bytes"
        )
    try:
        with torch.device("meta"):
            wanted = {k: tuple(v.shape) for k, v in kind(**config).state_dict().items()}
    except RuntimeError:  # a constructor that looks at its numbers needs real ones
        return
    with safe_open(path, framework="pt") as file:
        there = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 # it is no dictionary
    if missing := sorted(wanted.keys() - there.keys()):
        raise CheckpointError(
            f"{path} does not hold the network of its config: {len(missing)} names missing, first {missing[0]} "
            f"{wanted[missing[0]]}"
        )
    if wrong := sorted(k for k in wanted if k in there and wanted[k] != there[k]):
        k = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors of another shape, first {k}: {there[k]} in the file, {wanted[k]} in the "
            "network"
        )


def _users_class(name: str, path: str | Path) -> type[nn.Module]:
    """The class at a path that a file names. A file must not be able to call anything else: only a network is taken,
    and none of the libraries that are used here."""
    module, _, attribute = name.rpartition(".")
    if name not in _ABOVE and module.split(".")[0] in (*sys.stdlib_module_names, *_LIBRARIES):
        raise CheckpointError(f"{path} names {name}, which is no network of a user's own")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds a {name}, which cannot be imported: {error}. Run in the folder of that module, or install it"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise CheckpointError(f"{path} names {name}, which is no torch.nn.Module")
    return kind


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, by which frozen parts are referenced instead of being stored."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's weights with their names and shapes; in float32, as `load_network` gives them, so that it
    is the same before a file is written and after it is loaded."""

    def digest(tensor: torch.Tensor) -> bytes:
        plain = tensor.detach().cpu().to(torch.float32) if tensor.is_floating_point() else tensor.detach().cpu()
        return hashlib.sha256(plain.contiguous().flatten().view(torch.uint8).numpy().data).digest()

    state = sorted(network.state_dict().items())
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        digests = list(threads.map(digest, (tensor for _, tensor in state)))
    every = hashlib.sha256()
    for (name, tensor), found in zip(state, digests, strict=True):
        every.update(f"{name} {tuple(tensor.shape)}".encode() + found)
    return every.hexdigest()
