"""PickScore: which of two images people would pick for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mfm_rewards.clip import CLIPReward
from mfm_rewards.pretrained import Card
from mfm_rewards.registry import register


@register("pickscore")
class PickScore(CLIPReward):
    """Human preference by a CLIP ViT-H/14 trained on Pick-a-Pic: the logit of image and prompt (arXiv 2305.01569)."""

    default_weights = "yuvalkirstain/PickScore_v1"
    card = Card(
        measures="which image people would pick for the prompt",
        values="17 to 24",
        licence="MIT",
        source="Kirstain et al. 2023, arXiv 2305.01569",
        fetch="hf download yuvalkirstain/PickScore_v1 config.json model.safetensors vocab.json merges.txt",
        parameters=986,
        activations=0.52,
    )

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.logit(pixels, prompts)
