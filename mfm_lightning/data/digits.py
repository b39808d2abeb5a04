"""scikit-learn's digits: 1,797 real scans of 8x8 pixels in 10 classes, shipped with the package."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.data.images.pixels import to_images
from mfm_lightning.data.stream import shuffled_batch
from mfm_lightning.metrics.classifier import SmallClassifier, train_classifier


class DigitsDataModule(ArrayDataModule):
    """Digits as `(1, 8, 8)` float tensors in [-1, 1] (the scans' 0..16, scaled), labels 0..9.

    A stratified split: 70 % training, 10 % validation, 20 % test, the same for every seed.

    Args:
        batch_size: training batch on each device.
        seed: of the order of training batches.
    """

    name = "digits"

    @property
    def state_shape(self) -> tuple[int, ...]:
        return 1, 8, 8

    @property
    def num_classes(self) -> int:
        return 10

    def setup(self, stage: str | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()  # by scikit-learn's types it may be a tuple
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
        y = torch.tensor(digits.target, dtype=torch.long)
        train, rest = train_test_split(range(len(x)), train_size=0.7, stratify=y, random_state=0)
        val, test = train_test_split(rest, train_size=1 / 3, stratify=y[rest], random_state=0)
        self.splits = {name: (x[i], y[i]) for name, i in {"train": train, "val": val, "test": test}.items()}

    def train_batch(self, step: int) -> Batch:
        return shuffled_batch(*self.splits["train"], self.batch_size, self.rank_seed(), step)

    def decode(self, x: Tensor) -> Tensor:
        """States in [-1, 1] to images in [0, 1]."""
        return to_images(x)


class DigitsClassifier(SmallClassifier):
    """`SmallClassifier` of scikit-learn's digits, trained when it is made (a few seconds, the same for a seed).

    As `classifier: {class_path: mfm_lightning.data.DigitsClassifier}` it serves rewards. Its default seed
    is not that of the evaluation's classifier, so that a reward is not measured by the network that gave it.

    Args:
        seed: of its first weights and of the order of images.
        steps: of training.
    """

    def __init__(self, seed: int = 1, steps: int = 600) -> None:
        super().__init__(1, 8, 10)
        self.load_state_dict(_trained_on_digits(seed, steps))


@cache
def _trained_on_digits(seed: int, steps: int) -> dict[str, Tensor]:
    data = DigitsDataModule()
    data.setup()
    images, labels = data.splits["train"]
    return train_classifier(data.decode(images), labels, data.num_classes, steps, seed).state_dict()
