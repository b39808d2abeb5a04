"""Diversity of a few images of one prompt: the mean distance of two of them, in LPIPS or in features that are named."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from mfm_lightning.metrics.distances import pairwise_distance

log = logging.getLogger(__name__)
LPIPS_NETWORKS = {
    "lpips_alex": "alexnet",
    "lpips_vgg": "vgg16",
    "lpips_squeeze": "squeezenet1_1",
}  # torchvision's names
KINDS = ("auto", *LPIPS_NETWORKS, "efficientnet_lite0", "pixels")
LEAST = 64  # pixels a side that LPIPS's networks need
ROWS = 16  # images or pairs at once


class Diversity(nn.Module, ABC):
    """Images `(K, C, H, W)` in [0, 1] of one prompt -> the mean distance `()` of two different ones, float64.

    Attributes:
        kind: one of `KINDS`.
        about: what the distance is, for a report.
    """

    kind: str
    about: str

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Raises ValueError for fewer than two images."""
        if len(images) < 2:
            raise ValueError(f"diversity of {len(images)} image(s): expected two of a prompt or more")
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return self.mean_distance(images.float())

    @abstractmethod
    def mean_distance(self, images: Tensor) -> Tensor:
        """Of images `(K, 3, H, W)`, K at least 2."""


class LPIPS(Diversity):
    """Learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924) as torchmetrics computes it: linear layers on
    torchvision's ImageNet networks. Smaller images are enlarged to 64 pixels a side, which these need.

    Args:
        kind: a name of `LPIPS_NETWORKS`.

    Raises:
        FileNotFoundError: if the network's weights are not where torch keeps downloads.
    """

    def __init__(self, kind: str = "lpips_alex") -> None:
        super().__init__()
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        file, network = network_file(kind), LPIPS_NETWORKS[kind]
        if not file.is_file():
            raise FileNotFoundError(
                f"{kind}: no weights of {network} at {file}; torchvision fetches them: "
                f"torchvision.models.{network}(weights='DEFAULT')"
            )
        self.kind, self.about = kind, f"LPIPS ({network})"
        measure = LearnedPerceptualImagePatchSimilarity(net_type=kind.removeprefix("lpips_"), normalize=True)  # type: ignore[arg-type]
        self.measure = measure.eval().requires_grad_(False)

    def mean_distance(self, images: Tensor) -> Tensor:
        size = [max(LEAST, side) for side in images.shape[2:]]
        if size != list(images.shape[2:]):
            images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)
        first, second = torch.triu_indices(len(images), len(images), offset=1, device=images.device)
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(first), device=images.device).split(ROWS):
            total += len(rows) * self.measure(images[first[rows]], images[second[rows]]).double().cpu()
            self.measure.reset()
        return total / len(first)


class EfficientNetDistance(Diversity):
    """Euclidean distance of the pooled features of ImageNet's EfficientNet-Lite0, scaled to length 1.

    Raises:
        ImportError: without timm, or the weights' package.
    """

    kind = "efficientnet_lite0"
    about = "Euclidean distance of unit features of EfficientNet-Lite0"

    def __init__(self) -> None:
        super().__init__()
        from mfm_rewards.efficientnet import EfficientNetLite0

        self.network = EfficientNetLite0()

    def mean_distance(self, images: Tensor) -> Tensor:
        features = torch.cat([self._features(part) for part in images.split(ROWS)])
        return pairwise_distance(nn.functional.normalize(features, dim=1)).cpu()

    def _features(self, images: Tensor) -> Tensor:
        network = self.network.network
        return network.forward_head(network.forward_features(self.network.preprocess(images)), pre_logits=True)


class PixelDistance(Diversity):
    """Root mean square difference of pixels, which a shift by one pixel changes as much as another picture does."""

    kind = "pixels"
    about = "root mean square difference of pixels"

    def mean_distance(self, images: Tensor) -> Tensor:
        return pairwise_distance(images).cpu() / images[0].numel() ** 0.5


def find_diversity(kind: str = "auto") -> Diversity:
    """The distance of that kind; "auto" is the first that has its weights here: LPIPS by AlexNet, VGG, SqueezeNet,
    EfficientNet-Lite0's features, pixels. Which one, and why not those before, is logged.

    Raises:
        ValueError: for an unknown kind.
        FileNotFoundError, ImportError: for a kind whose weights are not there.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown diversity {kind!r}: expected one of {', '.join(KINDS)}")
    if kind != "auto":
        return _made(kind)
    for name in KINDS[1:]:
        try:
            found = _made(name)
        except (FileNotFoundError, ImportError) as error:
            log.info("diversity: not by %s", error)
        else:
            log.info("diversity of images: %s", found.about)
            return found
    raise AssertionError("pixels need no weights")


def _made(kind: str) -> Diversity:
    if kind in LPIPS_NETWORKS:
        return LPIPS(kind)
    return EfficientNetDistance() if kind == "efficientnet_lite0" else PixelDistance()


def network_file(kind: str) -> Path:
    """Where torch keeps the weights of an LPIPS's network."""
    from torchvision.models import get_model_weights

    url = get_model_weights(LPIPS_NETWORKS[kind])["DEFAULT"].url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
