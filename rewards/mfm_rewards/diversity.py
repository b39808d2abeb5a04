"""A reward of images beside each other: how far an image is from the others of its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfm_rewards.classifiers import load_classifier
from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register


@register("diversity")
class Diversity(Reward):
    """Mean distance of an image to the others of its group (those of one prompt, or the particles of one sample), times
    `scale`; 0 for one that is alone in it.

    The distance is the root mean square of the differences of pixels, or of the outputs of a network. The sum over a
    group of K images is then 2 / (K - 1) times the sum over its pairs. The distance of equal images is 0, and so is its
    gradient there.

    Args:
        features: a classifier, as `classifier` takes it, whose outputs are compared; pixels where None.
        scale: factor of the reward.
    """

    needs = ("images", "groups")

    def __init__(self, features: nn.Module | dict[str, Any] | str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.features, self.scale = None if features is None else load_classifier(features), scale

    def forward(self, images: Tensor, groups: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            x = (x if self.features is None else self.features(x)).flatten(1)
            x = x / x.shape[1] ** 0.5
            values = 0 * x.sum(dim=1)  # NaN where the image is
            for group in groups.unique():
                rows = (groups == group).nonzero().flatten()
                if len(rows) > 1:
                    # not by products of matrices, which are wrong for images that are close
                    distances = torch.cdist(x[rows], x[rows], compute_mode="donot_use_mm_for_euclid_dist")
                    values = values.index_add(0, rows, distances.sum(dim=1) / (len(rows) - 1))
            return self.scale * values
