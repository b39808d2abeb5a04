"""HPSv2.1: which image people prefer for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mfm_rewards.clip import CLIPReward
from mfm_rewards.pretrained import Card
from mfm_rewards.registry import register


@register("hpsv2")
class HPSv2(CLIPReward):
    """Human preference score v2.1 by a CLIP ViT-H/14: the cosine of image and prompt (arXiv 2306.09341).

    Its benchmark reports 100 times this number. Images that are not square are padded with black, as in its own code.
    """

    default_weights = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    card = Card(
        measures="which image people prefer for the prompt",
        values="0.2 to 0.35",
        licence="Apache-2.0",
        source="Wu et al. 2023, arXiv 2306.09341",
        fetch="hf download xswu/HPSv2 HPS_v2.1_compressed.pt; "
        "hf download openai/clip-vit-large-patch14 vocab.json merges.txt",
        parameters=986,
        activations=0.52,
    )
    fit = "pad"

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.cosine(pixels, prompts)
