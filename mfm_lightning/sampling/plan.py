"""Which samples there are, what each is drawn from, and which process draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.interpolant import sample_generators
from mfm_lightning.utils.distributed import Process


@dataclass(frozen=True)
class SamplePlan:
    """Samples number 0 to N-1. Sample i has the label `labels[i % len(labels)]`, so that classes are balanced, and its
    own noise, by (seed, i) alone.

    They are drawn in batches of consecutive indices, dealt to the processes in turn; a batch has the same samples
    whatever the number of processes, so that its pixels are the same, too. With another batch size noise and labels
    stay, and the network's sums may round otherwise.
    """

    num_samples: int
    labels: tuple[int, ...] = (0,)
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"num_samples ({self.num_samples}) and batch_size ({self.batch_size}) must be at least 1")
        if not self.labels:
            raise ValueError("labels must be at least one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} must lie in 0..2^63-1")

    @property
    def batches(self) -> list[range]:
        """All of them; the last may be smaller."""
        starts = range(0, self.num_samples, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num_samples)) for start in starts]

    def share(self, process: Process) -> list[range]:
        """The batches of one process."""
        return self.batches[process.rank :: process.world_size]

    def label(self, indices: Sequence[int]) -> Tensor:
        """`(B,)`."""
        return torch.tensor([self.labels[i % len(self.labels)] for i in indices])

    def generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        """One for each sample, on the CPU, so that noise is the same on every device."""
        return sample_generators(self.seed, indices)
