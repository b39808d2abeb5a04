"""Posterior draws and values of a text-to-image flow's adapter, at noised states of captioned data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.parts.captioned_states import CaptionedStates, captioned_states
from mfm_benchmarks.parts.posterior_recovery import PosteriorRecovery
from mfm_benchmarks.parts.prompt_images import PromptFlow
from mfm_benchmarks.parts.value_estimation import ValueComparison
from mfm_benchmarks.suite import Cell, Results
from mfm_lightning.alignment.target import Target
from mfm_lightning.data import StepDataModule
from mfm_rewards import Reward


class PromptDraws:
    """Draws of the adapter, and of GLASS on the flow's own drift, against rollouts of that drift; the states' captions
    are the conditions, with the suite's guidance.

    Args:
        data: whose test states are noised.
        posterior: how draws are measured; None for not.
        value: how values are measured; None for not.

    Raises:
        ValueError: for nothing to measure.
    """

    def __init__(
        self, data: StepDataModule, posterior: PosteriorRecovery | None, value: ValueComparison | None
    ) -> None:
        if posterior is None and value is None:
            raise ValueError("data are for posterior and value: give one of them, or leave out data")
        self.data, self.posterior, self.value = data, posterior, value
        self._values: dict[str, ValueComparison] = {}

    def shrink(self) -> None:
        for part in (self.posterior, self.value):
            if part is not None:
                part.shrink()

    def read(self, source: PromptFlow) -> list[str]:
        """Read the states; their captions, which the flow must embed.

        Raises:
            ValueError, FileNotFoundError: as `captioned_states`.
        """
        num = max(part.num_states for part in (self.posterior, self.value) if part is not None)
        self.states: CaptionedStates = captioned_states(self.data, source.flow, num, source.seed)
        return self.states.captions

    @property
    def how(self) -> str:
        """For the report, how it was measured."""
        parts = {"posterior draws": self.posterior, "values": self.value}
        states = " and ".join(f"{part.num_states} for {name}" for name, part in parts.items() if part is not None)
        return (
            f"Noised states are test states of {type(self.data).__name__} in a random order, {states}, with their "
            "captions as conditions. GLASS and rollouts use the flow's own drift; MFM uses the adapter."
        )

    def cells(
        self,
        source: PromptFlow,
        rewards: Mapping[str, Reward],
        scales: Mapping[str, float],
        identities: Mapping[str, Any],
    ) -> list[Cell]:
        """Of draws, and of the values of each reward.

        Args:
            rewards: by name; those of `scales` are taken, with these scales.
            identities: what they depend on, by name, as JSON.
        """
        x1, captions = self.states.x1.to(source.device), self.states.captions
        model, conditions, found = source.adapted, source.encoded(captions), []
        if model is None:
            raise ValueError("draws and values need the adapter's Meta Flow Map: give mfm")
        # rollouts and GLASS are of the flow alone: another adapter leaves them as they are
        identity, of_map = {**source.flow.identity, "guidance": source.guidance}, {"mfm": source.mfm}
        identity |= {"negative": source.negative}

        def target(name: str) -> Target:
            return Target(model, rewards[name], source.flow.decoder, conditions, reward_scale=scales[name])

        if self.posterior is not None:
            mine = {**identity, "captions": captions[: self.posterior.num_states]}
            found += self.posterior.cells(target(next(iter(scales))), x1, mine, of_map)
        for name, part in self._values_of(scales).items():
            mine = {**identity, "captions": captions[: part.num_states], "reward": [*identities[name], scales[name]]}
            found += part.cells(target(name), x1, mine, name, of_map)
        return found

    def _values_of(self, names: Iterable[str]) -> dict[str, ValueComparison]:
        """The part on values, of each reward."""
        self._values = {} if self.value is None else {name: copy.deepcopy(self.value) for name in names}
        return self._values

    def blocks(self, results: Results) -> Sequence[Block]:
        """Of what is there."""
        found = [] if self.posterior is None else self.posterior.blocks(results)
        for part in self._values.values():
            found += part.blocks(results)
        return found
