"""Rewards that look at images, and texts, through CLIP; the model is transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mfm_rewards.clip_tokens import CLIPTokenizer
from mfm_rewards.clip_weights import load_clip, pixel_statistics
from mfm_rewards.execution import Execution, autocast
from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.pretrained import PretrainedReward, at_least_float32
from mfm_rewards.prompts import PromptCache


class CLIPReward(PretrainedReward):
    """Base class of the rewards that look through CLIP. A subclass implements `score` with the features here.

    Args:
        weights: a folder or Hugging Face id in transformers' layout (config.json, model.safetensors); or a file of
            weights, or `org/name/file`, with the names of transformers, openai/CLIP or open_clip: sizes are inferred.
            The released ones (`default_weights`) where None.
        tokenizer: folder or Hugging Face id of a CLIP tokenizer. Where None, the one beside the weights, else that of
            the package openai-clip, else that of openai/clip-vit-large-patch14: they are the same.
        hidden_act: activation, "gelu" (open_clip) or "quick_gelu" (OpenAI's); where None, that of the config
            (`open_clip_config.json` for open_clip's names), or that of the released weights (`default_act`) if there is
            no config, which is said.
        allow_download: download files that are not on this machine.
        execution: how the network is run: a dictionary of `precision`, `checkpoint_activations`, `compile` and
            `max_rows` (`mfm_rewards.execution.Execution`); its defaults where None.

    Raises:
        FileNotFoundError: if the weights are not there, with the command that fetches them.
        CheckpointError: if they are not CLIP's.
        ImportError: without the extra `clip`.
    """

    needs = ("images", "prompts")
    fit = "crop_floor"
    default_weights: str
    default_act = "gelu"
    clip: Any  # a `transformers.CLIPModel`

    def __init__(
        self,
        weights: str | None = None,
        tokenizer: str | None = None,
        hidden_act: str | None = None,
        allow_download: bool = False,
        execution: Execution | dict[str, Any] | None = None,
    ) -> None:
        super().__init__(execution)
        released = weights is None
        self.clip, folder = load_clip(
            weights or self.default_weights, hidden_act, self.default_act, allow_download, released
        )
        mean, std = pixel_statistics(self.clip.config, folder)
        self.preprocess = Preprocessing(self.clip.config.vision_config.image_size, self.fit, mean, std)
        self._texts = PromptCache(self._encode_texts)
        if "prompts" in self.needs:
            length = self.clip.config.text_config.max_position_embeddings
            self._tokenize = CLIPTokenizer(tokenizer, folder, length, allow_download)
        else:
            del self.clip.text_model, self.clip.text_projection
        self.freeze([self.clip.vision_model.encoder.layers])

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors `(B, D)` of preprocessed images."""
        with autocast(pixels.device, self.execution.precision):
            features = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(at_least_float32(features), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors `(B, D)` of prompts; each is encoded once. Prompts longer than CLIP's 77 tokens are cut off."""
        return self._texts(prompts)

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image and its prompt, `(B,)`."""
        images = self.image_features(pixels)
        return (images * self.text_features(prompts).to(images)).sum(dim=-1)

    def logit(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """CLIP's logit of each image and its prompt, `(B,)`: their cosine times CLIP's temperature."""
        return self.clip.logit_scale.exp() * self.cosine(pixels, prompts)

    def _encode_texts(self, prompts: list[str]) -> Tensor:
        ids = self._tokenize(prompts).to(self.clip.logit_scale.device)
        with autocast(ids.device, self.execution.precision):
            features = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return F.normalize(at_least_float32(features), dim=-1)

    def _apply(self, fn: Callable, recurse: bool = True) -> CLIPReward:
        self._texts.clear()  # they are where the weights were
        return super()._apply(fn, recurse)
