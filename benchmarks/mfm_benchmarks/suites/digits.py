"""The paper's MNIST experiment (7.1.2) on digits, with posterior recovery and value estimation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.models import ModelSettings, Subject
from mfm_benchmarks.parts.frequencies import FrequencyComparison
from mfm_benchmarks.parts.posterior_recovery import PosteriorRecovery
from mfm_benchmarks.parts.value_estimation import ValueComparison
from mfm_benchmarks.quality import ClassifierQuality
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suite import Cell, Results, Suite, no_result
from mfm_lightning.alignment.target import Target


class DigitsSuite(Suite):
    """Class frequencies under a class-mixture reward, posterior recovery, and value estimates, on one model.

    Args:
        model: what all methods run on.
        reward: a class mixture with `weights`.
        quality: the classifier that counts classes (not the reward's), and the data whose test split is noised.
        frequencies: the part on class frequencies.
        posterior: the part on posterior draws.
        value: the part on value estimates.
    """

    name = "digits"
    title = "Digits: class mixture, posterior draws, values"
    about = (
        "The reward log Σ w_i p(y_i | x) asks for digits in given shares. Measured are: how close each method comes "
        "to the shares, by the number N of posterior draws; how close one-step posterior draws are to rollouts; and "
        "how well they estimate values."
    )

    def __init__(
        self,
        model: ModelSettings,
        reward: Spec,
        quality: ClassifierQuality,
        frequencies: FrequencyComparison | None = None,
        posterior: PosteriorRecovery | None = None,
        value: ValueComparison | None = None,
    ) -> None:
        self.model, self.reward, self.quality = model, reward.value, quality
        if model.labels is not None:
            raise ValueError("model.labels: the reward asks for shares of classes, so samples must have none")
        if "weights" not in self.reward:
            raise ValueError("reward: expected a class mixture with weights, one a class")
        self.frequencies, self.posterior, self.value = (
            frequencies or FrequencyComparison(), posterior or PosteriorRecovery(), value or ValueComparison(),
        )  # fmt: skip

    @property
    def noise(self) -> str:
        return "states and draws of fixed seeds"

    def shrink(self) -> None:
        for part in (self.frequencies, self.posterior, self.value):
            part.shrink()

    def missing(self) -> list[str]:
        return [*self.model.missing(), *self.quality.missing()]

    def fits(self) -> list[Fit]:
        return self.model.jobs()

    def prepare(self) -> None:
        self._subject = Subject(self.model, self.device)
        self._loaded = self._subject.load(self.reward)
        self.quality.prepare(self.device)

    @property
    def target(self) -> Target:
        """Of the class mixture."""
        return self._subject.target(self._loaded, 1)

    @property
    def clean_states(self) -> Tensor:
        """Those of the test split, in a random order."""
        x1, _ = self.quality.splits["test"]
        return x1[torch.randperm(len(x1), generator=torch.Generator().manual_seed(0))].to(self.device)

    def cells(self) -> Sequence[Cell]:
        model = self._subject.identity
        rewarded = {**model, "reward": self.reward, "probe": self._subject.probe(self._loaded)}
        return [
            *self.frequencies.cells(
                self.target, self.quality.classify, self.device, {**rewarded, **self.quality.identity}
            ),
            *self.posterior.cells(self.target, self.clean_states, model),
            *self.value.cells(self.target, self.clean_states, rewarded),
        ]

    def parts(self, results: Results) -> list[list[Block]]:
        """What is made of class frequencies, posterior draws, and values."""
        return [
            self.frequencies.blocks(results, self.reward["weights"]),
            self.posterior.blocks(results),
            self.value.blocks(results),
        ]

    def report(self, results: Results) -> Sequence[Block]:
        found = list(itertools.chain(*self.parts(results)))
        return found or [no_result(results)]
