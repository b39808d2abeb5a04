"""CLIP's weights, with the names of transformers, openai/CLIP or open_clip, as a transformers model."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_rewards.hub import find_file, find_folder
from mfm_rewards.preprocessing import CLIP_MEAN, CLIP_STD
from mfm_rewards.text_lists import read_text
from mfm_rewards.weights import CheckpointError, load_into, load_state_dict, num_blocks, unwrapped

log = logging.getLogger(__name__)
OPEN_CLIP = "open_clip_config.json"
_WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}  # vision towers H, g and bigG; all other towers have 64 channels a head


def load_clip(
    weights: str,
    hidden_act: str | None = None,
    default_act: str = "gelu",
    allow_download: bool = False,
    released: bool = False,
) -> tuple[nn.Module, Path]:
    """A `transformers.CLIPModel` in float32, and the folder its weights are in.

    Sizes and activation are those of the config beside the weights: `config.json` for transformers' names,
    `open_clip_config.json` for open_clip's; else sizes are read from the shapes, and the activation is a guess, which
    is said.

    Args:
        weights: see `mfm_rewards.clip.CLIPReward`.
        hidden_act: activation, instead of the config's.
        default_act: activation for weights without a config.
        allow_download: download files that are not on this machine.
        released: the weights are those that `default_act` is known of.

    Raises:
        FileNotFoundError: if the weights are not there.
        CheckpointError: if they are not CLIP's, or the config beside them is not.
        ImportError: without transformers.
    """
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError as error:
        raise ImportError(f"CLIP needs transformers ({error}): pip install 'mfm-lightning[clip]'") from error

    path = _weights_file(weights, allow_download)
    state, renamed = transformers_names(load_state_dict(path), path)
    # a config.json beside weights that had to be renamed belongs to another model
    content = _open_clip_config(path, state) if renamed else _config_beside(path)
    if content is None and hidden_act is None and not released:
        log.warning(
            "%s: no config beside it says its activation, %s is taken: hidden_act says another, gelu (open_clip) or "
            "quick_gelu (OpenAI)",
            path,
            default_act,
        )
    config: Any = CLIPConfig.from_dict(content or infer_config(state, default_act, path))
    if hidden_act is not None:
        config.vision_config.hidden_act = config.text_config.hidden_act = hidden_act
    with torch.device("meta"):  # no random weights: they are replaced
        model: Any = CLIPModel(config)
    load_into(model, state, set(model.state_dict()), path, "CLIP", assign=True)
    for tower in (model.vision_model, model.text_model):  # not among the weights
        positions = torch.arange(tower.embeddings.position_ids.shape[1]).unsqueeze(0)
        tower.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model, path.parent


def _open_clip_file(folder: Path) -> Path | None:
    """The weights in a folder that open_clip wrote, where it has none in transformers' layout."""
    if any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        return None
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return next((path for name in names if (path := folder / name).is_file()), None)


def _config_beside(path: Path) -> dict[str, Any] | None:
    content = read_json(path.parent / "config.json")
    return content if "vision_config" in content else None


def _open_clip_config(path: Path, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """The sizes of the shapes, with the activation and the heads of the config that open_clip writes beside them."""
    file = path.parent / OPEN_CLIP
    said_of_it = read_json(file)
    model = said_of_it.get("model_cfg")
    if not isinstance(model, dict):
        return None
    found = infer_config(state, "quick_gelu" if model.get("quick_gelu", False) else "gelu", path)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    of_another = [
        f"{what} {said}, in the weights {there}"
        for what, said, there in (
            ("embed_dim", model.get("embed_dim"), found["projection_dim"]),
            ("vision width", vision.get("width"), found["vision_config"]["hidden_size"]),
            ("text width", text.get("width"), found["text_config"]["hidden_size"]),
        )
        if said not in (None, there)
    ]
    if of_another:
        log.warning("%s is of other weights than %s (%s): left aside", file, path.name, "; ".join(of_another))
        return None
    found["vision_config"]["num_attention_heads"] = found["vision_config"]["hidden_size"] // vision.get(
        "head_width", 64
    )
    found["preprocess_cfg"] = said_of_it.get("preprocess_cfg", {})
    found["text_config"]["num_attention_heads"] = text.get("heads", found["text_config"]["num_attention_heads"])
    return found


def pixel_statistics(config: Any, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that the model was trained with: of the settings beside the weights
    (open_clip's, where `load_clip` took them, or transformers'), else CLIP's own."""
    ours = getattr(config, "preprocess_cfg", {})
    theirs = read_json(folder / "preprocessor_config.json")
    mean, std = ours.get("mean") or theirs.get("image_mean"), ours.get("std") or theirs.get("image_std")
    return tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD)


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where it is not there.

    Raises:
        CheckpointError: if it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except ValueError as error:  # also of its encoding
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object, but a {type(content).__name__}")
    return content


def _weights_file(weights: str, allow_download: bool) -> Path:
    """The file of weights: given, or in the folder that is given."""
    of_a_file = Path(weights).is_file() or (not Path(weights).is_dir() and weights.removeprefix("hf:").count("/") > 1)
    if of_a_file or Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin"):
        return find_file(weights, allow_download)
    if Path(weights).is_dir() and (file := _open_clip_file(Path(weights))):
        return file
    needed = ["config.json", "model.safetensors|pytorch_model.bin"]
    folder = find_folder(weights, needed, ["vocab.json", "merges.txt"], allow_download, what="CLIP model")
    return next(p for name in needed[1].split("|") if (p := folder / name).is_file())


_RENAMED = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
]
_ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
_IGNORED = re.compile(r"position_ids$|^(input_resolution|context_length|vocab_size|attn_mask)$")


def transformers_names(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """Weights by transformers' names, in float32, and whether they had those of openai/CLIP and open_clip before.

    Raises:
        CheckpointError: if they have other names.
    """
    state = unwrapped(state, _ANCHORS, path)
    state = {name: v.float() for name, v in state.items() if not _IGNORED.search(name)}
    if "vision_model.embeddings.patch_embedding.weight" in state:
        return state, False
    if "visual.conv1.weight" not in state or "visual.proj" not in state:
        raise CheckpointError(
            f"{path} holds no CLIP with a vision transformer: neither visual.conv1.weight (openai/CLIP, open_clip) nor "
            f"vision_model.embeddings.patch_embedding.weight (transformers) among {sorted(state)[:3]}"
        )
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if match := re.search(r"\.attn\.in_proj_(weight|bias)$", name):
            for kind, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{name[: match.start()]}.self_attn.{kind}_proj.{match[1]}"] = part
        else:
            # their projections are stored transposed
            renamed[name] = value.T if name in ("visual_projection.weight", "text_projection.weight") else value
    return {name: value.contiguous() for name, value in renamed.items()}, True


def infer_config(state: dict[str, Tensor], hidden_act: str, path: str | Path = "the weights") -> dict[str, Any]:
    """The content of a CLIP's config.json, from the shapes of weights with transformers' names.

    Raises:
        CheckpointError: if a weight that tells a size is missing.
    """

    def tower(name: str) -> dict[str, Any]:
        depth = num_blocks(state, f"{name}.encoder.layers.")
        intermediate, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
        wide = _WIDE_HEADS if name == "vision_model" else {}
        heads = wide.get(width, max(1, width // 64))
        sizes = {"hidden_size": width, "intermediate_size": intermediate, "num_attention_heads": heads}
        return {**sizes, "num_hidden_layers": depth, "hidden_act": hidden_act, "projection_dim": projected}

    try:
        projected = len(state["visual_projection.weight"])
        patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
        patches = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
        vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
        length = len(state["text_model.embeddings.position_embedding.weight"])
        vision = {**tower("vision_model"), "patch_size": patch, "image_size": math.isqrt(patches) * patch}
        text = {**tower("text_model"), "vocab_size": vocabulary, "max_position_embeddings": length}
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error.args[0]}: not a whole CLIP") from error
    tokens = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    return {"vision_config": vision, "text_config": {**text, **tokens}, "projection_dim": projected}
