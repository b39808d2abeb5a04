"""The LAION aesthetic score: how beautiful an image is, whatever it shows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mfm_rewards.clip import CLIPReward
from mfm_rewards.execution import Execution
from mfm_rewards.hub import find_file
from mfm_rewards.pretrained import Card
from mfm_rewards.registry import register
from mfm_rewards.weights import load_into, load_state_dict, unwrapped


@register("aesthetic")
class Aesthetic(CLIPReward):
    """Rating by a small head on CLIP ViT-L/14's image features: LAION's improved aesthetic predictor, sac+logos+ava1.

    Args:
        weights: CLIP's: a folder, a file or a Hugging Face id, as of `clip_score`; OpenAI's ViT-L/14 where None.
        head: file of the head's weights, or `org/name/file`.
        hidden_act: activation of CLIP, "gelu" (open_clip) or "quick_gelu" (OpenAI's); where None, that of the config,
            or "quick_gelu" for weights without one.
    """

    card = Card(
        measures="how beautiful the image is, by human ratings",
        values="4 to 7, of 1 to 10",
        licence="Apache-2.0 (head), MIT (CLIP)",
        source="Schuhmann 2022, christophschuhmann/improved-aesthetic-predictor",
        fetch="hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth; "
        "hf download openai/clip-vit-large-patch14 config.json model.safetensors",
        parameters=305,
        activations=0.43,
    )
    needs = ("images",)
    fit = "crop"
    default_weights = "openai/clip-vit-large-patch14"
    default_act = "quick_gelu"

    def __init__(
        self,
        weights: str | None = None,
        head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
        hidden_act: str | None = None,
        allow_download: bool = False,
        execution: Execution | dict[str, Any] | None = None,
    ) -> None:
        path = find_file(head, allow_download)
        super().__init__(weights, hidden_act=hidden_act, allow_download=allow_download, execution=execution)
        self.head = aesthetic_head(self.clip.config.projection_dim)
        own = set(self.head.state_dict())
        state = {name: v.float() for name, v in unwrapped(load_state_dict(path), own, path).items()}
        load_into(self.head, state, own, path, "aesthetic head")
        self.head.eval().requires_grad_(False)

    def score(self, pixels: Tensor) -> Tensor:
        features = self.image_features(pixels)
        return self.head(features.to(next(self.head.parameters()).dtype)).squeeze(-1)


def aesthetic_head(width: int = 768) -> nn.Sequential:
    """The head, with the layers of the released weights; it has no nonlinearities."""
    layers: list[nn.Module] = []
    for features, dropout in ((1024, 0.2), (128, 0.2), (64, 0.1), (16, None), (1, None)):
        layers.append(nn.Linear(width, features))
        if dropout is not None:
            layers.append(nn.Dropout(dropout))
        width = features
    return nn.Sequential(*layers)
