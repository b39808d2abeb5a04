"""A small classifier, trained here on the training split, whose features measure image quality."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallClassifier(nn.Module):
    """Two convolutions and a hidden layer for small images in [0, 1]; the hidden layer gives the features.

    Args:
        in_channels: of the images.
        size: their height and width, in pixels.
        num_classes: number of classes.
    """

    num_features = 32

    def __init__(self, in_channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * ((size + 1) // 2) ** 2, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, num_classes)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """`(B, num_features)` of images `(B, C, H, W)` in [0, 1], so many at once."""
        return torch.cat([self.body(part) for part in images.split(batch_size)])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, steps: int = 600, seed: int = 0
) -> SmallClassifier:
    """Train on `(N, C, H, W)` images in [0, 1]; the same result each time, and the global random state is kept."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.default_generator.manual_seed(seed)  # and not those of other devices, which would not be restored
        images, labels = images.detach().clone(), labels.clone()
        model = SmallClassifier(images.shape[1], images.shape[2], num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            pick = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[pick]), labels[pick]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified as labelled."""
    return (model(images).argmax(dim=1) == labels).float().mean().item()
