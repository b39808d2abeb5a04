"""ImageReward: human preference for a prompt, by the package's own model."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mfm_rewards.execution import Execution, autocast
from mfm_rewards.hub import find_file, find_folder
from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.pretrained import Card, PretrainedReward, at_least_float32
from mfm_rewards.prompts import PromptCache
from mfm_rewards.registry import register
from mfm_rewards.weights import CheckpointError, load_into, load_state_dict, num_blocks, unwrapped

MAX_TOKENS = 35  # of a prompt, as in the package


@register("image_reward")
class ImageReward(PretrainedReward):
    """Human preference score of BLIP, image and prompt looked at together (Xu et al., arXiv 2304.05977).

    The model class is that of the package image-reward. Prompts longer than 35 tokens are cut off, as there.

    Args:
        weights: file of the weights, or `org/name/file`; sizes are inferred from it.
        tokenizer: folder or Hugging Face id of BERT's tokenizer; where None, the weights' folder if it has a vocab.txt,
            else bert-base-uncased.
        allow_download: download files that are not on this machine.
        execution: how the network is run: a dictionary of `precision`, `checkpoint_activations`, `compile` and
            `max_rows` (`mfm_rewards.execution.Execution`); its defaults where None.

    Raises:
        FileNotFoundError: if a file is not there, with the command that fetches it.
        CheckpointError: if the weights are not ImageReward's.
        ImportError: without the extra `image-reward`.
    """

    card = Card(
        measures="human preference: fit to the prompt, fidelity, harmlessness",
        values="-2 to 2, of mean 0 and standard deviation 1 on its training data",
        licence="Apache-2.0",
        source="Xu et al. 2023, arXiv 2304.05977",
        fetch="hf download THUDM/ImageReward ImageReward.pt; "
        "hf download google-bert/bert-base-uncased vocab.txt tokenizer_config.json",
        parameters=447,
        activations=0.27,
    )
    needs = ("images", "prompts")
    model: Any  # an `ImageReward.ImageReward`

    def __init__(
        self,
        weights: str = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str | None = None,
        allow_download: bool = False,
        execution: Execution | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(execution)
        path = find_file(weights, allow_download)
        if tokenizer is None:
            tokenizer = str(path.parent) if (path.parent / "vocab.txt").is_file() else "google-bert/bert-base-uncased"
        folder = find_folder(tokenizer, ["vocab.txt"], ["tokenizer_config.json"], allow_download, what="BERT tokenizer")
        held = unwrapped(load_state_dict(path), ["blip.visual_encoder.patch_embed.proj.weight"], path)
        state = {name: v.float() for name, v in held.items() if not name.endswith("position_ids")}
        self.model = build_model(infer_sizes(state, path), folder)
        words, known = len(self.model.blip.tokenizer), self.model.blip.text_encoder.config.vocab_size
        if words > known:
            raise CheckpointError(f"{folder} has {words} tokens, but {path} knows {known}: not its tokenizer")
        own = self.model.state_dict()
        load_into(self.model, state, {n for n in own if not n.endswith("position_ids")}, path, "ImageReward")
        self.preprocess = Preprocessing(self.model.image_size)
        self._tokens = PromptCache(self._tokenize)
        self.freeze([self.model.blip.visual_encoder.blocks, self.model.blip.text_encoder.encoder.layer])

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        # as the package's `score_gard`, which has one precision for the network and the score
        ids, mask = self._tokens(prompts).to(pixels.device).unbind(dim=1)
        with autocast(pixels.device, self.execution.precision):
            seen = self.model.blip.visual_encoder(pixels)
            everywhere = torch.ones(seen.shape[:-1], dtype=torch.long, device=pixels.device)
            read = self.model.blip.text_encoder(
                ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere
            )
        first = at_least_float32(read.last_hidden_state[:, 0])
        value = self.model.mlp(first.to(self.model.mlp.layers[0].weight.dtype)).squeeze(-1)
        return (value - self.model.mean) / self.model.std

    def _tokenize(self, prompts: list[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = self.model.blip.tokenizer(prompts, **options)
        return torch.stack([tokens.input_ids, tokens.attention_mask], dim=1)


def infer_sizes(state: dict[str, Tensor], path: str | Path = "the weights") -> dict[str, Any]:
    """Sizes of an ImageReward, `{"vision": ..., "text": ...}`, from the shapes of its weights.

    Raises:
        CheckpointError: if a weight that tells a size is missing.
    """

    try:
        width, _, patch, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
        patches = state["blip.visual_encoder.pos_embed"].shape[1] - 1
        vocabulary, hidden = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        positions = len(state["blip.text_encoder.embeddings.position_embeddings.weight"])
        intermediate = len(state["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise CheckpointError(f"{path} has no {error.args[0]}: not the weights of an ImageReward") from error
    vision = {
        "img_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "embed_dim": width,
        "depth": num_blocks(state, "blip.visual_encoder.blocks."),
        "num_heads": max(1, width // 64),
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_blocks(state, "blip.text_encoder.encoder.layer."),
        "num_attention_heads": max(1, hidden // 64),
        "max_position_embeddings": positions,
    }
    return {"vision": vision, "text": text}


def build_model(sizes: dict[str, Any], tokenizer: str | Path) -> nn.Module:
    """The package's model with these sizes (`infer_sizes`) and BERT's tokenizer from a folder, without any download.

    The package's constructor has the sizes of a ViT-L, and downloads its tokenizer; both are replaced here.

    Raises:
        ImportError: without the extra `image-reward`.
    """
    package = _package()
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    vit = VisionTransformer(**sizes["vision"]), sizes["vision"]["embed_dim"]
    config = {"add_cross_attention": True, "pad_token_id": 0, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    with (
        tempfile.TemporaryDirectory() as folder,
        _replaced(blip_pretrain, create_vit=lambda *_: vit, init_tokenizer=lambda: _load_tokenizer(tokenizer)),
    ):
        path = Path(folder) / "med_config.json"
        path.write_text(json.dumps({**config, **sizes["text"]}))
        model = package.ImageReward(str(path))
    hidden, image_size = sizes["text"]["hidden_size"], sizes["vision"]["img_size"]
    if hidden != model.mlp.input_size:
        model.mlp = package.MLP(hidden)
    model.image_size, model.preprocess = image_size, package._transform(image_size)
    return model


@contextmanager
def _replaced(module: ModuleType, **functions: Callable) -> Iterator[None]:
    """Put other functions in the place of a module's own, for a while."""
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def _package() -> ModuleType:
    """The package's module. Importing it silences all warnings, so their settings are restored afterwards."""
    with warnings.catch_warnings():
        try:
            from transformers.utils import logging as transformers_logging

            level = transformers_logging.get_verbosity()
            # its __init__ puts the class of this name in the module's place
            package = importlib.import_module("ImageReward.ImageReward")
        except ImportError as error:
            raise ImportError(
                f"image_reward needs the package image-reward ({error}): pip install 'mfm-lightning[image-reward]'"
            ) from error
        transformers_logging.set_verbosity(level)
    return package


def _load_tokenizer(folder: str | Path) -> Any:
    """BERT's, with the two tokens that BLIP adds."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer
