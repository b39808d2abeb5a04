"""LoRA files of diffusers, merged into a pipeline's transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mfm_rewards.weights import CheckpointError

NAME = "pytorch_lora_weights.safetensors"


def lora_file(path: str | Path) -> Path:
    """The file that is meant by a folder or a file; raises FileNotFoundError where there is none."""
    file = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA at {file}: expected a {NAME}, or a folder with one")
    return file


def merge(pipe: Any, file: Path) -> None:
    """Merge a LoRA into a pipeline's transformer, by diffusers' own loader.

    Raises:
        CheckpointError: for a file that diffusers does not take, or that has parts for text encoders, which are loaded
            apart from the transformer here and would be without them.
        ImportError: without peft.
    """
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file} is no safetensors file: {error}") from error
    if others := [name for name in names if name.startswith("text_encoder")]:
        raise CheckpointError(f"{file} has {len(others)} tensors for text encoders, which are left alone here")
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
        if not hasattr(pipe.transformer, "peft_config"):
            raise ValueError("it has nothing for the transformer")
        pipe.fuse_lora(components=["transformer"])
        pipe.unload_lora_weights()
    except ImportError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(f"{file} is no LoRA of a {type(pipe).__name__}: {first}") from error
