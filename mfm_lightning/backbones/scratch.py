"""A pipeline of diffusers from the settings of its parts, with random weights where a folder has none."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import zlib
from pathlib import Path
from typing import Any

import torch

from mfm_rewards.weights import CheckpointError

log = logging.getLogger(__name__)
LOADED = ("scheduler", "tokenizer", "feature_extractor")  # parts without weights, by the beginnings of their names
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def random_parts(folder: Path, index: dict[str, Any], given: dict[str, Path]) -> list[str]:
    """Names of a pipeline's parts that have a config.json and no weights.

    Args:
        index: of `model_index.json`.
        given: folders of parts that are elsewhere.
    """
    return [
        name
        for name, (_, kind) in _parts(index).items()
        if kind is not None
        and name not in given
        and not name.startswith(LOADED)
        and (folder / name / "config.json").is_file()
        and not any(found for pattern in WEIGHTS for found in (folder / name).glob(pattern))
    ]


def new_pipeline(
    folder: Path,
    pipeline: Any,
    index: dict[str, Any],
    given: dict[str, Path],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A pipeline whose parts have the weights of their folders, or random ones where there are none.

    Args:
        folder: of `model_index.json`, and of each part.
        pipeline: class of diffusers.
        index: of `model_index.json`.
        given: folders of parts that are elsewhere.
        seed: of the random weights, the same for the same names of parts.
        dtype: of the weights.

    Raises:
        CheckpointError: for a part that cannot be made.
    """
    random, made = random_parts(folder, index, given), {}
    for name, (library, kind) in _parts(index).items():
        if kind is None:
            made[name] = None
            continue
        place = given.get(name, folder / name)
        try:
            found = getattr(importlib.import_module(library), kind)
            made[name] = (
                _random(found, place, f"{seed} {name}")
                if name in random
                else found.from_pretrained(place, local_files_only=True)
            )
        except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CheckpointError(f"{name} of the pipeline in {folder}: no {kind} from {place}: {reason}") from error
    if random:
        log.info("%s has no weights of %s: they are random (seed %d)", folder, ", ".join(random), seed)
    options = {name: value for name, value in index.items() if not name.startswith("_") and not _is_part(value)}
    pipe = pipeline(**made, **options)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def bare_pipeline(name: str, **parts: Any) -> Any:
    """A pipeline of that class with these parts, such as transformer and VAE, a scheduler, and nothing else."""
    diffusers: Any = importlib.import_module("diffusers")
    kind = getattr(diffusers, name)
    needed = inspect.signature(kind.__init__).parameters.values()
    empty = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
    return kind(**{**empty, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **parts})


def _random(kind: Any, place: Path, seed: str) -> Any:
    with torch.random.fork_rng([]):
        # not torch.manual_seed: it also seeds accelerators, whose states would not be restored
        torch.default_generator.manual_seed(zlib.crc32(seed.encode()))
        if hasattr(kind, "load_config"):  # of diffusers
            return kind.from_config(kind.load_config(place))
        return kind(kind.config_class.from_pretrained(place))  # of transformers


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _parts(index: dict[str, Any]) -> dict[str, tuple[str, str | None]]:
    return {n: (value[0], value[1]) for n, value in index.items() if not n.startswith("_") and _is_part(value)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return found
