"""The paper's ImageNet experiments: the alignment suite with its settings, and FID of K-step samples."""

from __future__ import annotations

from collections.abc import Sequence

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.models import ModelSettings
from mfm_benchmarks.parts.best_of_n import BestOfNPool
from mfm_benchmarks.parts.sample_quality import SampleQuality
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Cell, Results
from mfm_benchmarks.suites.alignment import AlignmentSuite, MethodSettings, RewardSettings


class ImageNetSuite(AlignmentSuite):
    """`AlignmentSuite` on latents, with FID; says what is missing where weights are not there.

    Args:
        samples: the K-step samples that FID is measured on.
        others: as `AlignmentSuite`; a decoder and a quality must be given.
    """

    name = "imagenet256"
    title = "ImageNet 256: reward against cost, and FID"
    about = (
        "The paper's ImageNet experiments on your checkpoint: steering, search, Best-of-N and FID of K-step samples."
    )

    def __init__(
        self,
        model: ModelSettings,
        rewards: dict[str, RewardSettings],
        methods: dict[str, MethodSettings],
        quality: Quality,
        samples: SampleQuality | None = None,
        best_of_n: BestOfNPool | None = None,
        scales: list[float] = (1.0, 2.5, 5.0),
        num_samples: int = 128,
        seeds: list[int] = (0,),
        frechet_limit: float = 1.5,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(
            model, rewards, methods, best_of_n, scales, num_samples, seeds, quality, frechet_limit, batch_size
        )
        if model.decoder is None:
            raise ValueError("model.decoder: give one, for rewards look at images")
        self.samples = samples or SampleQuality()

    def shrink(self) -> None:
        super().shrink()
        self.samples.shrink()

    def cells(self) -> Sequence[Cell]:
        identity = {key: self._identity[key] for key in ("model", "decoder", "quality")}
        cells = self.samples.cells(lambda: self._subject.model, self.model.decoder, self.quality, self.device, identity)
        return [*super().cells(), *cells]

    def report(self, results: Results) -> Sequence[Block]:
        return [*super().report(results), *self.samples.blocks(results, self.quality)]
