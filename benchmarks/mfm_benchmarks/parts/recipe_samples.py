"""Samples by which a trained map is judged besides its draws: the Fréchet distance of K-step samples to real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mfm_benchmarks.measure import noise
from mfm_benchmarks.quality import Quality
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder, PixelDecoder
from mfm_lightning.samplers import sample_refinement


@dataclass
class RecipeSamples:
    """Refinement samples (Algorithm 1) of each trained map, all from the same noise, classes in equal shares.

    Args:
        quality: features, and those of real images.
        decoder: states to images; the states themselves where None.
        num_samples: of each map; the distance of few samples is biased upwards, alike for all.
        steps: K.
        batch_size: samples at once.
        guidance: class-guidance scale; None for none.
    """

    quality: Quality
    decoder: Decoder | None = None
    num_samples: int = 1000
    steps: int = 4
    batch_size: int = 250
    guidance: float | None = None

    @property
    def column(self) -> str:
        """Its name in the table."""
        return f"Fréchet, {self.steps} steps"

    @property
    def identity(self) -> dict[str, Any]:
        """What the distance depends on besides the map."""
        own = {"samples": self.num_samples, "steps": self.steps, "guidance": self.guidance}
        return {**own, "decoder": repr(self.decoder), "quality": self.quality.identity}

    def shrink(self) -> None:
        """For --quick."""
        self.num_samples = min(self.num_samples, 128)

    def prepare(self, device: torch.device) -> None:
        """Load what it takes."""
        self.quality.prepare(device)

    @torch.no_grad()
    def judge(self, model: MetaFlowMap) -> float:
        """The Fréchet distance of a map's samples."""
        device = next(model.parameters()).device
        x0, found = noise(self.num_samples, model.state_shape, 31_337, device), []
        label = torch.arange(self.num_samples, device=device) % model.num_classes if model.num_classes else None
        generators = sample_generators((31_337, 1), range(self.num_samples))
        decode = (self.decoder or PixelDecoder()).to(device)
        for rows in torch.arange(self.num_samples).split(self.batch_size):
            given = Conditions() if label is None else Conditions(label=label[rows], guidance=self.guidance)
            states = sample_refinement(model, x0[rows], self.steps, model.check(given), [generators[i] for i in rows])
            found.append(self.quality.features(decode(states)))
        return float(frechet_of_features(torch.cat(found), self.quality.gaussian))
