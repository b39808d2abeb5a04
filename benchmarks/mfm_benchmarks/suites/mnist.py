"""The paper's MNIST experiment (7.1.2, F.2) with inverse problems and the cost of reaching Best-of-N."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.methods import MethodSettings
from mfm_benchmarks.models import ModelSettings
from mfm_benchmarks.parts.best_of_n import BestOfNPool
from mfm_benchmarks.parts.frequencies import FrequencyComparison
from mfm_benchmarks.parts.inverse_problems import InverseProblems
from mfm_benchmarks.parts.posterior_recovery import PosteriorRecovery
from mfm_benchmarks.parts.sample_quality import SampleQuality
from mfm_benchmarks.parts.value_estimation import ValueComparison
from mfm_benchmarks.quality import ClassifierQuality
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suite import Cell, Results
from mfm_benchmarks.suites.alignment import AlignmentSuite, RewardSettings
from mfm_benchmarks.suites.digits import DigitsSuite


class MnistSuite(DigitsSuite):
    """Rewards by cost, class frequencies under a class mixture, inverse problems, posterior recovery, value estimates,
    and the Fréchet distance of K-step samples, on one model.

    Args:
        model: what all methods run on.
        reward: a class mixture with `weights`.
        quality: the classifier that counts classes and gives features (not the reward's), and the data whose test split
            is noised and measured.
        rewards: by the names of the report; compared by cost.
        methods: of the comparison by cost.
        frequencies: the part on class frequencies.
        inverse: the part on inverse problems.
        posterior: the part on posterior draws.
        value: the part on value estimates.
        samples: the part on K-step samples.
        best_of_n: the baseline of the comparison by cost.
        scales: lambda, factors of the rewards' own multipliers.
        num_samples: samples of a run and seed of the comparison by cost.
        seeds: of its noise.
        frechet_limit: its headline takes settings whose Fréchet distance is at most so many times Best-of-N's.
        batch_size: samples of a method at once.
        quick_samples: num_samples of --quick.
    """

    name = "mnist"
    title = "MNIST: rewards by cost, class mixture, inverse problems, values"
    about = (
        "MNIST at 28x28, without labels. Measured are: the cost at which each method exceeds Best-of-N; how close it "
        "comes to the class shares that the reward log Σ w_i p(y_i | x) asks for; whether it finds all digits that "
        "fit half an image; and how close one-step posterior draws and values are to rollouts."
    )

    def __init__(
        self,
        model: ModelSettings,
        reward: Spec,
        quality: ClassifierQuality,
        rewards: dict[str, RewardSettings],
        methods: dict[str, MethodSettings],
        frequencies: FrequencyComparison | None = None,
        inverse: InverseProblems | None = None,
        posterior: PosteriorRecovery | None = None,
        value: ValueComparison | None = None,
        samples: SampleQuality | None = None,
        best_of_n: BestOfNPool | None = None,
        scales: Sequence[float] = (1.0,),
        num_samples: int = 128,
        seeds: Sequence[int] = (0,),
        frechet_limit: float = 1.5,
        batch_size: int | None = None,
        quick_samples: int = 128,
    ) -> None:
        super().__init__(model, reward, quality, frequencies, posterior, value)
        self.inverse = inverse or InverseProblems()
        self.samples = samples or SampleQuality(2000, guidance=None, replicates=400)
        self.by_cost = AlignmentSuite(
            model, rewards, methods, best_of_n, scales, num_samples, seeds, quality, frechet_limit, batch_size,
            quick_samples,
        )  # fmt: skip

    @property
    def noise(self) -> str:
        return f"{super().noise}; {self.by_cost.noise}"

    @property
    def skipped(self) -> dict[str, str]:
        return self.by_cost.skipped

    def shrink(self) -> None:
        super().shrink()
        self.inverse.shrink()
        self.samples.shrink()
        self.by_cost.rewards = dict(itertools.islice(self.by_cost.rewards.items(), 1))
        self.by_cost.shrink()

    def missing(self) -> list[str]:
        self.by_cost.device, self.by_cost.output = self.device, self.output
        return [*self.by_cost.missing(), *self.samples.missing()]

    def prepare(self) -> None:
        self.by_cost.prepare()  # with the quality
        self._subject = self.by_cost.subject
        self._loaded = self._subject.load(self.reward)

    def cells(self) -> Sequence[Cell]:
        measured = {**self._subject.identity, **self.quality.identity}
        return [
            *self.by_cost.cells(),
            *super().cells(),
            *self.inverse.cells(self.target, self.clean_states, self.quality.classify, self.device, measured),
            *self.samples.cells(
                lambda: self._subject.model, self.model.built_decoder, self.quality, self.device, measured
            ),
        ]

    def report(self, results: Results) -> Sequence[Block]:
        by_cost = self.by_cost.report(results)
        mixture, *rest = self.parts(results)
        found = [*by_cost, *mixture, *self.inverse.blocks(results), *(block for blocks in rest for block in blocks)]
        return [*found, *self.samples.blocks(results, self.quality)]
