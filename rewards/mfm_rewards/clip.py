"""Rewards that look at images, and texts, through CLIP; the model is transformers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from mfm_rewards.clip_tokens import CLIPTokenizer
from mfm_rewards.clip_weights import load_clip
from mfm_rewards.preprocessing import Preprocessing
from mfm_rewards.pretrained import PretrainedReward, at_least_float32
from mfm_rewards.prompts import PromptCache


class CLIPReward(PretrainedReward):
    """Base class of the rewards that look through CLIP: `image_features` and, cached by prompt, `text_features`. The
    reward is CLIP's logit of image and prompt, unless a class says otherwise.

    Args:
        weights: a folder or Hugging Face id in transformers' layout (config.json, model.safetensors); or a file of
            weights, or `org/name/file`, named as transformers, openai/CLIP or open_clip name them: sizes are inferred.
            The class's `default_weights` where None.
        tokenizer: folder or id of a CLIP tokenizer; see `mfm_rewards.clip_tokens.CLIPTokenizer`.
        hidden_act: activation, "gelu" (open_clip) or "quick_gelu" (OpenAI's); where None, that of the config, or the
            class's `default_act` for weights without one.
        allow_download: fetch what is not there.
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
    ) -> None:
        super().__init__(precision, checkpoint_activations, compile, max_rows)
        weights = weights or self.default_weights
        self.clip, folder = load_clip(weights, hidden_act, self.default_act, allow_download)
        self.preprocess = Preprocessing(self.clip.config.vision_config.image_size, self.fit)
        self._texts = PromptCache(self._encode_texts)
        if "prompts" in self.needs:
            length = self.clip.config.text_config.max_position_embeddings
            self._tokenize = CLIPTokenizer(tokenizer, folder, length, allow_download)
        else:
            del self.clip.text_model, self.clip.text_projection
        self.freeze([self.clip.vision_model.encoder.layers])

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors `(B, D)` of preprocessed images."""
        with self.in_precision(pixels.device):
            features = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(at_least_float32(features), dim=-1)

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
        with self.in_precision(ids.device):
            features = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return F.normalize(at_least_float32(features), dim=-1)

    def _apply(self, fn: Callable, recurse: bool = True) -> CLIPReward:
        self._texts.clear()  # they are where the weights were
        return super()._apply(fn, recurse)
