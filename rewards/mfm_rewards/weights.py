"""How pretrained weights are read: plain tensors by name, of files in the layouts that training scripts leave."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
# where scripts keep the weights in what they save; of several the average of training comes first
WEIGHTS_KEYS = (
    "ema", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "state_dict", "model_state_dict", "model",
    "module", "params", "net", "network",
)  # fmt: skip
# what torch.compile, FSDP, activation checkpointing and Fabric put into names, at any place
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")

_AVERAGE = re.compile(r"(?:^|[._])ema(?=[._])")


class CheckpointError(ValueError):
    """A file that does not hold the weights that were expected."""


def load_state_dict(path: str | Path, allowed: Sequence[type] = ()) -> dict[str, Tensor]:
    """Tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file, by name, on the CPU.

    A dictionary that holds the weights under one of `WEIGHTS_KEYS` is opened; of several the first, and it is said.

    Args:
        path: of the file.
        allowed: harmless classes that may be beside the tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read, or holds anything but plain tensors and numbers.
    """
    return tensors_of(read_checkpoint(path, allowed), path)


def read_checkpoint(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """What such a file holds, as it is: mostly a dictionary; raises as `load_state_dict`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}" + (", but a folder" if path.is_dir() else ""))
    if what := no_weights(path):
        raise CheckpointError(f"{path} {what}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            return load_plain(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is refused: it is not a file of plain tensors ({error}). "
            "Save the state dict alone, best as .safetensors."
        ) from error


def load_plain(path: str | Path, mmap: bool = False) -> Any:
    """What torch.save wrote, of tensors and numbers alone, on the CPU.

    Args:
        path: of the file.
        mmap: leave the tensors on the disk.

    Raises:
        CheckpointError: with torch's reason alone, for the caller to say of which file.
        OSError: of the storage.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle or archive raises nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(reason[:120]) from error


def no_weights(path: Path) -> str | None:
    """What a file is that came in place of weights; None for one that may be of weights."""
    with open(path, "rb") as file:
        start = file.read(256).lstrip()
    if not start:
        return "is empty: the download or the copy broke off, fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself: git lfs pull fetches it"
    if start[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not weights: the download was answered by a page (a quota, a login), fetch it again"
    return None


def tensors_of(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights in what a file holds; raises CheckpointError if there are none."""
    keys = [key for key in WEIGHTS_KEYS if isinstance(content, Mapping) and _is_state(content.get(key))]
    if len(keys) > 1:
        log.info("%s holds weights under %s: those under %r are taken", path, ", ".join(keys), keys[0])
    if keys:
        return tensors_of(content[keys[0]], path)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    states = [k for k, v in content.items() if _is_state(v)] if isinstance(content, Mapping) and not tensors else []
    if len(states) == 1:  # under a name of the script's own
        log.info("%s: the weights are taken to be those under %r", path, states[0])
        return tensors_of(content[states[0]], path)
    if not tensors:
        holds = f"{', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path} holds no tensors by name, but {holds or 'nothing'}: expected a state dict, or one under "
            f"{', '.join(WEIGHTS_KEYS[:7])}, ..."
        )
    return tensors


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(v, Tensor | Mapping) for v in content.values())


def unwrapped(state: Mapping[str, Tensor], anchors: Iterable[str], path: str | Path) -> dict[str, Tensor]:
    """The tensors of one network, by its own names: without what compiling and sharding put into them, and without
    the names of the modules that it stood in ("module.", "model.model.dit.", of any nesting).

    Args:
        state: tensors by name.
        anchors: names of which the network has one; their prefix is all tensors'. Without any, names stay.
        path: of the file, for messages.

    Raises:
        CheckpointError: if it holds several such networks, none of which is called an average ("ema").
    """
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        (twice, _), *_ = Counter(_WRAPPERS.sub("", name) for name in state).most_common(1)
        raise CheckpointError(f"{path} holds {twice} with and without a wrapper's name: save the one that is wanted")
    found = {name.removesuffix(a) for a in anchors for name in bare if name == a or name.endswith(f".{a}")}
    prefixes = sorted(found, key=lambda prefix: (not _AVERAGE.search(prefix), len(prefix), prefix))
    if not prefixes:
        return bare
    if len(prefixes) > 1:
        average = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
        names = ", ".join(repr(prefix) for prefix in prefixes)
        if len(average) != 1:
            raise CheckpointError(f"{path} holds several such networks, under {names}: save the one that is wanted")
        log.info("%s holds networks under %s: that under %r is taken", path, names, average[0])
    prefix, others = prefixes[0], [prefix for prefix in prefixes[1:] if prefix]
    taken = {name.removeprefix(prefix): tensor for name, tensor in bare.items() if name.startswith(prefix)}
    if not prefix:
        taken = {name: tensor for name, tensor in taken.items() if not name.startswith(tuple(others))}
    elif left := sorted(bare.keys() - {prefix + name for name in taken}):
        log.info("%s: %d tensors beside those under %r are left out, first %s", path, len(left), prefix, left[0])
    return taken


def num_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered parts, from 0, names with a prefix have: 12 for "blocks.0.norm.weight" to "blocks.11...."."""
    heads = (name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix))
    return max((int(head) for head in heads if head.isdigit()), default=-1) + 1


def load_into(
    network: nn.Module,
    state: dict[str, Tensor],
    required: set[str],
    path: str | Path,
    source: str,
    assign: bool = False,
) -> None:
    """Load tensors into a network whose names they have.

    Args:
        network: that takes them.
        state: tensors by name.
        required: the names that must be there; all must be the network's.
        path: the file of the tensors, for the error.
        source: what the tensors should be, for the error.
        assign: take the tensors themselves as weights instead of copying them (for a network on the meta device).

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
    network.load_state_dict(state, strict=False, assign=assign)
