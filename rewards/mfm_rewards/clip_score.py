"""CLIP score: how well an image fits a text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mfm_rewards.clip import CLIPReward
from mfm_rewards.pretrained import Card
from mfm_rewards.registry import register


@register("clip_score")
class CLIPScore(CLIPReward):
    """CLIP's logit of image and prompt: their cosine times its temperature, 100 (Radford et al., arXiv 2103.00020).

    The weights are those of OpenAI's ViT-L/14 by default.
    """

    default_weights = "openai/clip-vit-large-patch14"
    default_act = "quick_gelu"
    card = Card(
        measures="how well the image fits the prompt",
        values="15 to 35",
        licence="MIT",
        source="Radford et al. 2021, arXiv 2103.00020",
        fetch="hf download openai/clip-vit-large-patch14 config.json model.safetensors vocab.json merges.txt",
        parameters=428,
        activations=0.43,
    )

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.logit(pixels, prompts)
