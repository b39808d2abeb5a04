"""Samples of a model in place of data."""

from __future__ import annotations

import logging
from functools import cached_property

import torch
from torch import Tensor

from mfm_lightning.checkpoints import load_model
from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.data.images.pixels import to_images
from mfm_lightning.data.stream import shuffled_batch
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.sampling.model_sampler import ModelSampler
from mfm_lightning.utils.console import track

log = logging.getLogger(__name__)


class ModelSamplesDataModule(ArrayDataModule):
    """Samples of a trained model, for jobs that need states and not data: fine-tuning and value networks, whose
    objectives hold at any state, where the model's data are not at hand.

    They are drawn once, when they are first needed; sample i depends on the seed and i alone. Of each class as many, in
    turn; the last tenths are validation and test samples.

    Args:
        model: a `model.safetensors` of `mfm fit`.
        num_samples: in all, at least 10.
        sampler: how they are drawn; 4-step refinement where None.
        pixels: the states are images in [-1, 1], and are decoded so.
        batch_size: training batch on each device.
        seed: of the samples and of the order of batches.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: for fewer samples.
    """

    def __init__(
        self,
        model: str,
        num_samples: int = 2048,
        sampler: ModelSampler | None = None,
        pixels: bool = False,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if num_samples < 10:
            raise ValueError(f"num_samples {num_samples} must be at least 10")
        self.model, self.num_samples, self.pixels = model, num_samples, pixels
        self.sampler = sampler or ModelSampler()

    @cached_property
    def _loaded(self) -> MetaFlowMap:
        return load_model(self.model).eval().requires_grad_(False)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self._loaded.state_shape)

    @property
    def num_classes(self) -> int:
        return self._loaded.num_classes

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "splits"):
            return
        label = torch.arange(self.num_samples) % max(1, self.num_classes)
        parts = track(torch.arange(self.num_samples).split(256), describe=lambda rows: f"samples from {int(rows[0])}")
        x = torch.cat([
            self.sampler(self._loaded, label[rows], sample_generators((self.seed, 17), rows.tolist())).cpu()
            for rows in parts
        ])  # fmt: skip
        ends = (self.num_samples * 8 // 10, self.num_samples * 9 // 10)
        how = f"{self.sampler.kind}, {self.sampler.steps} steps"
        log.info("%d samples of %s in place of data: %s", len(x), self.model, how)
        names, cuts = ("train", "val", "test"), ((0, ends[0]), ends, (ends[1], len(x)))
        self.splits = {name: (x[a:b], label[a:b]) for name, (a, b) in zip(names, cuts, strict=True)}

    def train_batch(self, step: int) -> Batch:
        return shuffled_batch(*self.splits["train"], self.batch_size, self.rank_seed(), step)

    def decode(self, x: Tensor) -> Tensor:
        """States in [-1, 1] to images in [0, 1] where they are `pixels`; else as they are."""
        return to_images(x) if self.pixels else x
