"""Where the released implementation's tensors are, and its networks' architecture in our words."""

from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "parity_data"
ARCHITECTURE = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 64,
    "depth": 4,
    "num_heads": 4,
    "encoder_depth": 3,
    "num_classes": 10,
    "guidance_scales": (2.5,),
}


def released_architecture(config: dict) -> dict:
    """The release's config (in a parity file's metadata) as arguments of `import_checkpoint`."""
    names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "encoder_depth", "qk_norm")
    return {
        **{name: config[name] for name in names},
        "num_classes": config["label_dim"],
        "guidance_scales": tuple(config["model_guidance_class_ws"]),
    }


NOT_IN_SHAPES = {"num_heads": 4, "encoder_depth": 3}  # of these files' networks


def weights(source: str) -> dict[str, torch.Tensor]:
    """The released names' weights in `official_SOURCE`."""
    data = load_file(DATA / f"official_{source}.safetensors")
    return {k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")}
