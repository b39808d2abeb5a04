"""CLIP: its classes are transformers'; its weights have transformers' names or those of openai/CLIP and open_clip."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.preprocessing import Preprocessing
from rewards.pretrained import PretrainedReward
from rewards.prompts import PromptCache
from rewards.weights import CheckpointError, find_file, find_folder, load_into, load_state_dict

TOKENIZER = "openai/clip-vit-large-patch14"  # all CLIP models here have its vocabulary
_WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}  # vision towers H, g and bigG; all others have 64 channels a head


class CLIPReward(PretrainedReward):
    """Base class of the rewards that look through CLIP: `image_features` and, cached by prompt, `text_features`. The
    reward is CLIP's logit of image and prompt, unless a class says otherwise.

    Args:
        weights: a folder or Hugging Face id in transformers' layout (config.json, model.safetensors); or a file of
            weights, or `org/name/file`, named as transformers, openai/CLIP or open_clip name them: sizes are inferred.
            The class's `default_weights` where None.
        tokenizer: folder or id of a CLIP tokenizer; where None, that of the weights' folder, else the package
            openai-clip's, which is the same.
        hidden_act: activation of a model whose weights come without a config: "gelu" (open_clip) or "quick_gelu"
            (OpenAI's). The class's `default_act` where None.
        allow_download: fetch what is not there.
        model: a `transformers.CLIPModel`, instead of weights.
        precision, checkpoint_activations, compile, max_rows: as in `PretrainedReward`.

    Raises:
        FileNotFoundError: if the weights are not there, with the command that fetches them.
        CheckpointError: if they are not CLIP's.
        ImportError: without the extra `clip`.
    """

    needs = ("images", "prompts")
    fit = "crop_floor"
    default_weights: str
    default_act = "gelu"

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str | None = None,
        hidden_act: str | None = None,
        allow_download: bool = False,
        precision: str = "fp32",
        checkpoint_activations: bool = False,
        compile: bool = False,
        max_rows: int = 64,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(precision, checkpoint_activations, compile, max_rows)
        self.clip, folder = model, None
        if model is None:
            weights, hidden_act = weights or self.default_weights, hidden_act or self.default_act
            self.clip, folder = load_clip(weights, hidden_act, allow_download)
        self.preprocess = Preprocessing(self.clip.config.vision_config.image_size, self.fit)
        self._texts = PromptCache(self._encode_texts)
        if "prompts" in self.needs:
            length = self.clip.config.text_config.max_position_embeddings
            self._tokenize = load_tokenizer(tokenizer, folder, length, allow_download)
        else:
            del self.clip.text_model, self.clip.text_projection
        self.freeze([self.clip.vision_model.encoder.layers])

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors `(B, D)` of preprocessed images."""
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `(B, D)` of prompts; each is encoded once. Prompts longer than CLIP's 77 tokens are cut off."""
        return self._texts(prompts)

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image and its prompt, `(B,)`."""
        images = self.image_features(pixels)
        return (images * self.text_features(prompts).to(images)).sum(dim=-1)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.logit_scale.exp() * self.cosine(pixels, prompts)

    def _encode_texts(self, prompts: list[str]) -> Tensor:
        ids = self._tokenize(prompts).to(self.clip.logit_scale.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return F.normalize(features.to(self.clip.logit_scale.dtype), dim=-1)

    def _apply(self, fn: Callable, recurse: bool = True) -> CLIPReward:
        self._texts.clear()  # they are where the weights were
        return super()._apply(fn, recurse)


def load_clip(weights: str, hidden_act: str = "gelu", allow_download: bool = False) -> tuple[nn.Module, Path]:
    """A `transformers.CLIPModel`, and the folder its weights are in; see `CLIPReward`."""
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError as error:
        raise ImportError(f"CLIP needs transformers ({error}): pip install 'mfm-lightning[clip]'") from error

    path = _weights_file(weights, allow_download)
    state = _transformers_names(load_state_dict(path), path)
    config = path.parent / "config.json"
    config = json.loads(config.read_text()) if config.is_file() and "vision_config" in config.read_text() else None
    model = CLIPModel(CLIPConfig.from_dict(config or infer_config(state, hidden_act, path)))
    load_into(model, state, set(model.state_dict()), path, "CLIP")
    return model, path.parent


def _weights_file(weights: str, allow_download: bool) -> Path:
    """The file of weights: given, or in the folder that is given."""
    of_a_file = Path(weights).is_file() or (not Path(weights).is_dir() and weights.removeprefix("hf:").count("/") > 1)
    if of_a_file or Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin"):
        return find_file(weights, allow_download)
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
_IGNORED = re.compile(r"position_ids$|^(input_resolution|context_length|vocab_size|attn_mask)$")


def _transformers_names(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights by transformers' names, in float32, from those or openai/CLIP's and open_clip's."""
    state = {name.removeprefix("module."): v for name, v in state.items()}
    state = {name: v.float() for name, v in state.items() if not _IGNORED.search(name)}
    if "vision_model.embeddings.patch_embedding.weight" in state:
        return state
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
            # their projections are matrices to multiply with from the right
            renamed[name] = value.T if name in ("visual_projection.weight", "text_projection.weight") else value
    return renamed


def infer_config(state: dict[str, Tensor], hidden_act: str, path: str | Path = "the weights") -> dict[str, Any]:
    """The content of a CLIP's config.json, from the shapes of weights with transformers' names.

    Raises:
        CheckpointError: if a weight that tells a size is missing.
    """

    def tower(name: str) -> dict[str, Any]:
        layers = {m[1] for key in state if (m := re.match(rf"{name}\.encoder\.layers\.(\d+)\.", key))}
        intermediate, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
        heads = _WIDE_HEADS.get(width, max(1, width // 64))
        sizes = {"hidden_size": width, "intermediate_size": intermediate, "num_attention_heads": heads}
        return {**sizes, "num_hidden_layers": len(layers), "hidden_act": hidden_act, "projection_dim": projected}

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


def load_tokenizer(
    tokenizer: str | None, folder: Path | None, length: int, allow_download: bool = False
) -> Callable[[Sequence[str]], Tensor]:
    """What turns N prompts into token ids `(N, length)`; see `CLIPReward`."""
    vocabulary = ["tokenizer.json|vocab.json"]
    if tokenizer is None and folder is not None and any((folder / n).is_file() for n in vocabulary[0].split("|")):
        tokenizer = str(folder)
    if tokenizer is None:
        try:
            with warnings.catch_warnings():  # of a deprecated module that it imports
                warnings.simplefilter("ignore")
                import clip
        except ImportError:
            tokenizer = TOKENIZER
        else:
            return lambda prompts: clip.tokenize(list(prompts), length, truncate=True).long()
    from transformers import CLIPTokenizerFast

    found = find_folder(tokenizer, vocabulary, ["vocab.json", "merges.txt"], allow_download, what="CLIP tokenizer")
    tokens = CLIPTokenizerFast.from_pretrained(str(found))

    def tokenize(prompts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokens(list(prompts), **options).input_ids

    return tokenize
