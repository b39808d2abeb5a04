"""What a fine-tuning method is: its settings, and a stream of losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from mfm_benchmarks.finetuning.problem import Problem
from mfm_lightning.alignment.target import require_gradient
from mfm_rewards import Reward


class FineTuning(ABC):
    """A method by its settings. `losses` is the algorithm; what it keeps between steps are its local variables."""

    batch_size: int

    @property
    def differentiates(self) -> bool:
        """Whether it takes the reward's gradient."""
        return False

    @property
    def takes_data(self) -> bool:
        """Whether it cannot do without clean states of the data."""
        return False

    @abstractmethod
    def losses(self, problem: Problem) -> Iterator[Tensor]:
        """Losses `()` without end. Each is differentiated, and the parameters stepped, before the next is asked for."""

    def check(self, reward: Reward, data: bool, model: object = None) -> None:
        """Raise, before any work, if reward, problem or model lack what the method needs.

        Raises:
            RewardError: for a reward without the gradient that the method takes.
            ValueError: without the data that it takes.
            CheckpointError: for a `model` that does not draw what the method needs.
        """
        name = type(self).__name__
        if self.differentiates:
            require_gradient(reward, name)
        if self.takes_data and not data:
            raise ValueError(f"{name} trains on clean states of the data: give data, a DataModule")
