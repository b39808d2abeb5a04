"""Fréchet Inception distance during training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import lightning as L
from torch import Tensor

from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.metrics.fid import RunningStatistics, Statistics, reference_statistics
from mfm_lightning.metrics.frechet import frechet
from mfm_lightning.metrics.inception import Inception, find_inception_weights
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules.base import TrainingModule, own_gradients
from mfm_lightning.networks.decoders import LATENTS, Decoder, PixelDecoder
from mfm_lightning.sampling import ModelSampler, SamplePlan
from mfm_lightning.sampling.model_sampler import BY_MODEL
from mfm_lightning.utils.distributed import gather_ranks
from mfm_lightning.utils.images import to_uint8


class SampleFID(L.Callback):
    """FID of samples, at every validation, of the averaged weights where `EMA` is on; logged under `name`.

    Samples are dealt to the ranks, torchmetrics adds up their sums, and rank 0 computes the distance. Sample i
    has the same class and noise each time. FID of few samples is too high, by a bias that falls with their number:
    compare it with FID of as many.

    Args:
        reference: as `reference_statistics` takes it; computed once and kept in `cache`. Several processes must find
            the statistics there: the others would wait for rank 0, longer than their collectives do.
        weights: of Inception; torch-fidelity's own where None.
        allow_download: let torch-fidelity fetch its own.
        num_samples: images, over all ranks.
        batch_size: images at once on each rank.
        sampler: how samples are drawn; by 4-step refinement where None, or a base flow's ODE in 250 steps.
        decoder: states to images; pixels in [-1, 1] where None.
        labels: classes, in turn; all where None.
        num_features: 2048 for FID; an earlier layer's 768, 192 or 64 for few samples.
        cache: folder for the reference's statistics, see `reference_statistics`.
        crop: cut the reference's image files to so many pixels; as they are where None.
        seed: of the noise.
        name: of the logged figure.

    Raises:
        FileNotFoundError: before training, if the reference, its statistics, Inception's weights or the decoder are not
            there.
        ValueError: before training, if settings do not fit the model.
    """

    sampler: ModelSampler  # this and the plan: from `setup` on
    plan: SamplePlan

    def __init__(
        self,
        reference: str,
        weights: str | None = None,
        allow_download: bool = False,
        num_samples: int = 5000,
        batch_size: int = 50,
        sampler: ModelSampler | None = None,
        decoder: Decoder | None = None,
        labels: list[int] | None = None,
        num_features: int = 2048,
        cache: str | None = None,
        crop: int | None = None,
        seed: int = 0,
        name: str = "val/fid",
    ) -> None:
        self.reference, self.weights, self.allow_download = reference, weights, allow_download
        self.num_samples, self.batch_size, self.labels, self.seed = num_samples, batch_size, labels, seed
        self._given_sampler, self.decoder = sampler, decoder or PixelDecoder()
        self.num_features, self.cache, self.crop, self.name = num_features, cache, crop, name
        self.inception: Inception | None = None
        self.real: Statistics | None = None  # on rank 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate") or self.inception is not None:
            return
        model = sampled_model(pl_module)
        kind = getattr(pl_module, "exported_kind", "meta_flow_map")
        self.sampler = self._given_sampler or ModelSampler(*BY_MODEL[kind])
        labels = tuple(self.labels) if self.labels else tuple(range(model.num_classes)) or (0,)
        self.sampler.check(model, labels)
        if self.num_samples < 2 * trainer.world_size:
            raise ValueError(f"{self.num_samples} samples over {trainer.world_size} ranks: give each two at least")
        self.plan = SamplePlan(self.num_samples, labels, self.seed, self.batch_size)
        if said := getattr(datamodule_of(trainer), LATENTS, None):
            self.decoder.check_latents(**said, whose="the latents")
        if missing := self.decoder.missing():
            raise FileNotFoundError(missing[0])
        if not Path(self.reference).exists():
            raise FileNotFoundError(f"no reference at {self.reference}: give real images, or an .npz of mu and sigma")
        if self.allow_download and trainer.local_rank == 0:
            find_inception_weights(self.weights, self.allow_download)
        trainer.strategy.barrier("inception")  # one process of each machine may have fetched them
        device = trainer.strategy.root_device  # where the module will be
        inception = Inception(find_inception_weights(self.weights), self.num_features).to(device)
        problem = None
        if trainer.is_global_zero:
            settings = (self.cache, self.crop, self.batch_size)
            try:
                alone = trainer.world_size == 1
                self.real = reference_statistics(self.reference, inception, *settings, compute=alone)
            except (OSError, ValueError) as error:
                problem = error
        if (problem := gather_ranks(problem)[0]) is not None:  # on every rank, so that none waits for one that is gone
            raise problem
        self.inception = inception

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.inception is None:
            return
        model = sampled_model(pl_module)
        self.decoder.to(pl_module.device)
        with own_gradients():
            drawn = RunningStatistics(self.num_features, over_ranks=True).to(pl_module.device)
            for images in self.images(model, trainer.global_rank, trainer.world_size):
                drawn.update(self.inception(images.to(pl_module.device))[0])
            statistics = drawn.statistics()
            fid = None if self.real is None else frechet(statistics.gaussian, self.real.gaussian)
        fid = cast(float, trainer.strategy.broadcast(fid))  # rank 0's, on every rank
        pl_module.log(self.name, fid, sync_dist=True)

    def images(self, model: MetaFlowMap, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """This rank's samples, bytes; every rank evaluates the model equally often, as sharded models need."""
        per_rank = -(-self.num_samples // world_size)
        for start in range(0, per_rank, self.batch_size):
            numbers = range(start, min(start + self.batch_size, per_rank))
            indices = [rank + world_size * k for k in numbers]
            states = self.sampler(model, self.plan.label(indices), self.plan.generators(indices))
            kept = sum(i < self.num_samples for i in indices)
            if kept:
                yield to_uint8(self.decoder(states[:kept]))


def sampled_model(module: L.LightningModule) -> MetaFlowMap:
    """The model that a LightningModule trains.

    Raises:
        ValueError: if it trains none.
    """
    if isinstance(module, TrainingModule) and isinstance(module.trained, MetaFlowMap):
        return module.trained
    raise ValueError(f"{type(module).__name__} trains no model that samples could be drawn from")
