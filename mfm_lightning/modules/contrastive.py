"""Training of a small CLIP on captioned images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import data_of, datamodule_of
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.networks.image_text import ImageTextEncoder


class Contrastive(TrainingModule):
    """Trains a CLIP (Radford et al., arXiv 2103.00020) on images and captions. Images of one batch with the same
    caption are no negatives of each other: each image chooses among the batch's different captions, and each caption
    among the images, all that have it being right. Beside `model.safetensors` the run leaves `clip/`, a folder that
    transformers and the reward `clip_score` (weights: FOLDER) read.

    Args:
        network: the CLIP.
        optimization: the optimiser and its learning rate.
    """

    exported_kind = "image_text_encoder"

    def __init__(self, network: ImageTextEncoder, optimization: Optimization | None = None) -> None:
        super().__init__(optimization)
        self.network, self.num_classes = network, 0

    @property
    def trained(self) -> ImageTextEncoder:
        return self.network

    def setup(self, stage: str) -> None:
        shape, size = getattr(datamodule_of(self.trainer), "state_shape", None), self.network.size
        if shape is None or tuple(shape) != (3, size, size):
            raise ValueError(
                f"data of shape {shape}, but the CLIP takes {(3, size, size)} (--data.size, --data.channels)"
            )
        self.state_shape = tuple(shape)
        super().setup(stage)

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        if conditions.prompts is None:
            raise ValueError("a CLIP is trained on captions: give the data captions (CaptionedImages)")
        prompts = conditions.expand(len(x1)).prompts or ()
        texts = list(dict.fromkeys(prompts))
        target = torch.tensor([texts.index(text) for text in prompts], device=x1.device)
        logits = self.network(data_of(self).decode(x1), texts).float()
        of_images = F.cross_entropy(logits, target)
        right = F.one_hot(target, len(texts)).T.float()
        of_texts = F.cross_entropy(logits.T, right / right.sum(dim=1, keepdim=True))
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        return {"loss": (of_images + of_texts) / 2, "accuracy": accuracy}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError("there is nothing to predict: the reward clip_score scores images with the run's clip/")
