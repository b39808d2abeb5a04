"""FID of K-step samples of the Meta Flow Map (paper, section 7), without any reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mfm_benchmarks.blocks import Block, Table
from mfm_benchmarks.measure import noise
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import resampled
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder
from mfm_lightning.samplers import sample_refinement


@dataclass
class SampleQuality:
    """Samples by the refinement sampler (Algorithm 1), classes in equal shares.

    Args:
        num_samples: of each K; FID is usually on 50,000.
        steps: K.
        batch_size: samples at once.
        chunk: samples of one stored result.
        guidance: class-guidance scale; None for none.
        replicates: of the interval; each costs about as much as the distance.
    """

    num_samples: int = 50_000
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    batch_size: int = 50
    chunk: int = 1000
    guidance: float | None = 2.5
    replicates: int = 20

    def shrink(self) -> None:
        self.num_samples, self.steps, self.replicates = min(self.num_samples, 256), self.steps[:1], 5

    def cells(
        self,
        model: Callable[[], MetaFlowMap],
        decoder: Decoder,
        quality: Quality,
        device: torch.device,
        identity: dict[str, Any],
    ) -> list[Cell]:
        self._cells: dict[int, list[Cell]] = {}
        for k in self.steps:
            for begin in range(0, self.num_samples, self.chunk):
                n = min(self.chunk, self.num_samples - begin)
                settings = {**identity, "steps": k, "begin": begin, "n": n, "guidance": self.guidance}

                def compute(k: int = k, begin: int = begin, n: int = n) -> Outcome:
                    return self._features(model(), decoder, quality, device, k, begin, n)

                cell = Cell(f"{k}-step samples {begin + 1} to {begin + n}", settings, compute)
                self._cells.setdefault(k, []).append(cell)
        return [cell for cells in self._cells.values() for cell in cells]

    @torch.no_grad()
    def _features(
        self, model: MetaFlowMap, decoder: Decoder, quality: Quality, device: torch.device, k: int, begin: int, n: int
    ) -> Outcome:
        x0 = noise(n, model.state_shape, 31_337 + begin, device)
        label = (torch.arange(begin, begin + n, device=device) % model.num_classes) if model.num_classes else None
        generators, features = sample_generators((31_337, 1), range(begin, begin + n)), []
        for rows in torch.arange(n).split(self.batch_size):
            given = Conditions() if label is None else Conditions(label=label[rows], guidance=self.guidance)
            states = sample_refinement(model, x0[rows], k, model.check(given), [generators[i] for i in rows])
            features.append(quality.features(decoder(states)))
        return Outcome({}, {"features": torch.cat(features)})

    def blocks(self, results: Results, quality: Quality) -> list[Block]:
        rows, real = [], quality.gaussian
        for k, cells in self._cells.items():
            if (done := results.all(cells)) is None:
                continue  # a part has not its share of each class
            features = torch.cat([outcome.tensors["features"] for outcome in done])
            distance = resampled(frechet_of_features, features, real, replicates=self.replicates)
            rows.append({"steps": k, "samples": len(features), "FID": distance})
        caption = "Refinement samples (Algorithm 1) with classes in equal shares, against the reference features."
        return [Table("sample_quality", "FID of K-step samples", rows, caption)]
