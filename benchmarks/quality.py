"""Features in which sets of images are compared with real ones; they show when a reward was bought by leaving them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfm_lightning.metrics.classifier import train_classifier


class Quality(ABC):
    """Features of images `(B, C, H, W)` in [0, 1], and those of real images."""

    def missing(self) -> list[str]:
        """Files that are not there, each with what would be right."""
        return []

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Load or train what it takes."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """`(B, F)`, on the CPU."""

    @property
    @abstractmethod
    def real(self) -> Tensor:
        """`(M, F)`, on the CPU."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What the features depend on."""


class ClassifierQuality(Quality):
    """The last hidden layer of a small classifier, trained here on the data's training split; not the classifier that
    gives rewards (its seed is another).

    Args:
        data: a DataModule with splits and `decode`.
        seed: of the training.
    """

    def __init__(self, data: L.LightningDataModule, seed: int = 0) -> None:
        self.data, self.seed = data, seed

    def prepare(self, device: torch.device) -> None:
        self.data.setup("test")
        images, labels = self.data.splits["train"]
        images = self.data.decode(images)
        self.classifier = train_classifier(images, labels, self.data.num_classes, seed=self.seed)
        self._real = self.features(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features_module()(part) for part in images.cpu().split(512)])

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The most probable class of each image, `(B,)`."""
        return self.classifier(images.cpu()).argmax(dim=1)

    @property
    def real(self) -> Tensor:
        return self._real

    @property
    def identity(self) -> dict[str, object]:
        return {"classifier": type(self.data).__name__, "seed": self.seed}


class InceptionQuality(Quality):
    """The 2,048 features of FID's Inception network (torchmetrics' port, torch-fidelity's weights).

    Args:
        weights: `pt_inception-2015-12-05-6726825d.pth`, which torch-fidelity fetches and which can be given here.
        reference: a `.safetensors` file with `features` `(M, 2048)` of real images.
        batch_size: images at once.
    """

    def __init__(self, weights: str, reference: str, batch_size: int = 64) -> None:
        self.weights, self.reference, self.batch_size = weights, reference, batch_size

    def missing(self) -> list[str]:
        found = []
        if not Path(self.weights).is_file():
            found.append(
                f"quality.weights: no Inception weights at {self.weights}; they are "
                "pt_inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0"
            )
        if not Path(self.reference).is_file():
            found.append(
                f"quality.reference: no features of real images at {self.reference}; give a .safetensors file with "
                "'features' (M, 2048)"
            )
        return found

    def prepare(self, device: torch.device) -> None:
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], self.weights).to(device).eval()
        self._real = load_file(self.reference)["features"].float()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        found = []
        for part in images.split(self.batch_size):
            part = part.expand(-1, 3, -1, -1) if part.shape[1] == 1 else part
            found.append(self.network((part * 255).round().clamp(0, 255).to(torch.uint8)).float().cpu())
        return torch.cat(found)

    @property
    def real(self) -> Tensor:
        return self._real

    @property
    def identity(self) -> dict[str, object]:
        return {"inception": self.weights, "reference": self.reference}
