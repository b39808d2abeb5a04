"""Draws that a trained map's are compared with: exact ones of an oracle, or rollouts of a base flow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.spec import Spec, build
from mfm_benchmarks.suite import Cell, Outcome
from mfm_lightning.alignment.posteriors import FlowMapPosterior, RolloutPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import find_weights, fingerprint, is_there, load_model
from mfm_lightning.data.base import StepDataModule
from mfm_lightning.evaluation.draws import draw, draw_distance, noisy_states
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.oracles import GaussianMixture


@dataclass
class ReferenceDraws:
    """Noisy states x_t and draws of p(x1 | x_t) for each; draws of a trained map are judged by their sliced W2 to them.

    Args:
        oracle: `{class_path, init_args}` of a distribution whose posterior is exact; or
        base: a base flow's file or name, whose SDE is rolled out, with
        data: a DataModule whose test samples are noised.
        times: outer times t.
        num_states: for each time.
        num_draws: for each state.
        rollout_steps: of the SDE.
        max_rows: draws at once.

    Raises:
        ValueError: unless there is an oracle, or a base flow with its data.
    """

    oracle: Spec | None = None
    base: str | None = None
    data: Spec | None = None
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5])
    num_states: int = 32
    num_draws: int = 256
    rollout_steps: int = 100
    max_rows: int = 16384

    def __post_init__(self) -> None:
        if (self.oracle is None) != (self.base is not None and self.data is not None):
            raise ValueError("draws: give an oracle, or a base flow and the data whose samples are noised")

    @property
    def words(self) -> str:
        """What the distance is."""
        what = "exact ones" if self.oracle is not None else f"SDE rollouts of {self.rollout_steps} steps"
        return (
            f"Sliced W2 of one-step draws to {what}, mean over times {self.times} and {self.num_states} states of each"
        )

    def shrink(self) -> None:
        self.num_states, self.num_draws, self.rollout_steps = 8, min(64, self.num_draws), min(20, self.rollout_steps)

    def missing(self, made: Sequence[str] = ()) -> list[str]:
        """What is not there, and not `made` by a job."""
        there = self.base is None or self.base in made or is_there(self.base)
        return [] if there else [f"draws.base: no model at {self.base}"]

    def prepare(self, device: torch.device) -> None:
        """Load what the draws are of."""
        self._device = device
        if self.oracle is not None:
            oracle = build(GaussianMixture, self.oracle.value, "draws.oracle")
            generator = torch.Generator().manual_seed(0)
            clean, self._exact = oracle.sample(self.num_states, generator), oracle
            self.identity: dict[str, Any] = {"oracle": self.oracle.value}
        else:
            assert self.base is not None
            assert self.data is not None
            data = build(StepDataModule, self.data.value, "draws.data")
            data.setup("test")
            clean = _test_samples(data, self.num_states)
            self._base = load_model(self.base).requires_grad_(False).to(device).eval()
            self.identity = {
                "base": fingerprint(find_weights(self.base)), "data": self.data.value, "rollouts": self.rollout_steps,
            }  # fmt: skip
        self._clean = clean
        self.identity |= {"times": self.times, "states": self.num_states, "draws": self.num_draws}

    def _states(self, t: float) -> Tensor:
        return noisy_states(self._clean, t, torch.Generator().manual_seed(1)).to(self._device)

    def cells(self) -> Iterator[Cell]:
        """One for each time."""
        for t in self.times:
            yield Cell(f"reference draws, t = {t:g}", {**self.identity, "t": t}, lambda t=t: self._reference(t))

    def _reference(self, t: float) -> Outcome:
        x_t = self._states(t)
        if self.oracle is not None:
            generator = torch.Generator().manual_seed(2)
            return Outcome(
                {}, {"draws": self._exact.sample_posterior(x_t.cpu(), t, self.num_draws, generator=generator)}
            )
        source = RolloutPosterior(self.rollout_steps)
        return Outcome(
            {}, {"draws": draw(source, Target(self._base, _none), t, x_t, self._noise(x_t, 2), self.max_rows)}
        )

    def _noise(self, x_t: Tensor, seed: int) -> Tensor:
        shape = (len(x_t), self.num_draws, *x_t.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(x_t)

    @torch.no_grad()
    def judge(self, model: MetaFlowMap, references: Sequence[Outcome]) -> Outcome:
        """numbers: `distance`, the mean over times and states; tensors: by time, `(S,)`."""
        found = {}
        for t, reference in zip(self.times, references, strict=True):
            x_t = self._states(t)
            made = draw(FlowMapPosterior(1), Target(model, _none), t, x_t, self._noise(x_t, 3), self.max_rows)
            found[f"t={t:g}"] = draw_distance(made.cpu(), reference.tensors["draws"], 128, seed=0)
        return Outcome({"distance": float(torch.stack(list(found.values())).mean())}, found)


def _test_samples(data: StepDataModule, num: int) -> Tensor:
    """The first clean samples of the test data."""
    found: list[Tensor] = []
    for x1, _ in data.test_dataloader():
        found.append(x1)
        if sum(map(len, found)) >= num:
            break
    return torch.cat(found)[:num]


def _none(x: Tensor) -> Tensor:
    """Draws of a posterior look at none."""
    return x.new_zeros(len(x))
