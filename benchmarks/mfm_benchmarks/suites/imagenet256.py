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
    """`AlignmentSuite` on latents, with FID; says what is missing where weights are not there. Parameters that are not
    named here are those of `AlignmentSuite`; a decoder and a quality must be given.

    Args:
        quality: features for single classes' few samples, so better few (192) than FID's 2,048.
        samples: the K-step samples of all classes that FID is measured on.
        fid: features and real images for it; `quality` where None.
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
        fid: Quality | None = None,
        best_of_n: BestOfNPool | None = None,
        scales: Sequence[float] = (1.0, 2.5, 5.0),
        num_samples: int = 128,
        seeds: Sequence[int] = (0,),
        frechet_limit: float = 1.5,
        batch_size: int | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(
            model,
            rewards,
            methods,
            best_of_n,
            scales,
            num_samples,
            seeds,
            quality,
            frechet_limit,
            batch_size,
            block=block,
        )
        if model.decoder is None:
            raise ValueError("model.decoder: give one, for rewards look at images")
        self.samples, self.fid = samples or SampleQuality(), fid or quality

    def missing(self) -> list[str]:
        found = [*super().missing(), *self.samples.missing()]
        if self.fid is not self.quality:
            found += [line.replace("quality.", "fid.", 1) for line in self.fid.missing()]
        return found

    def prepare(self) -> None:
        super().prepare()
        if self.fid is not self.quality:
            self.fid.prepare(self.device)

    def shrink(self) -> None:
        super().shrink()
        self.samples.shrink()

    def cells(self) -> Sequence[Cell]:
        identity = {key: self._identity[key] for key in ("model", "decoder")} | {"fid": self.fid.identity}
        cells = self.samples.cells(
            lambda: self._subject.model, self.model.built_decoder, self.fid, self.device, identity
        )
        return [*super().cells(), *cells]

    def report(self, results: Results) -> Sequence[Block]:
        return [*super().report(results), *self.samples.blocks(results, self.fid)]
