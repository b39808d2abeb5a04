"""Best-of-N from one pool of the base flow's samples, shared by all rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.measure import clock, judge, noise
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Cell, Outcome
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.samplers import sample_ode


@dataclass
class Candidates:
    """How many candidates there are, and how they are made.

    Args:
        numbers: N, smallest first.
        steps: Euler steps of a candidate.
        max_rows: candidates generated at once.

    Raises:
        ValueError: if the numbers are not different and in order.
    """

    numbers: list[int]
    steps: int
    max_rows: int

    def __post_init__(self) -> None:
        if not self.numbers or self.numbers != sorted(set(self.numbers)) or self.numbers[0] < 1:
            raise ValueError(f"best_of_n.numbers {self.numbers}: expected different numbers, smallest first")

    def parts(self, most: int) -> Iterator[tuple[int, int]]:
        """Where each part of the pool begins and how many candidates of each sample it has, at most `most`; cut where
        one of the numbers ends."""
        begin = 0
        while begin < self.numbers[-1]:
            n = min(most, min(stop for stop in self.numbers if stop > begin) - begin)
            yield begin, n
            begin += n


@dataclass
class BestOfNPool(Candidates):
    """Candidates in as many groups as there are samples (paper, section 7: a pool of 128,000 in 128 groups).

    The first candidate of a group comes from the noise that all methods begin from.

    Args:
        block: candidates in one file.
    """

    numbers: list[int] = field(default_factory=lambda: [1, 3, 10, 30, 100, 300, 1000])
    steps: int = 25
    max_rows: int = 4096
    block: int = 65536

    def shrink(self) -> None:
        self.numbers = [n for n in self.numbers if n <= 30] or self.numbers[:1]

    def cells(
        self, target: Callable[[], Target], num: int, seed: int, device: torch.device, identity: dict[str, Any]
    ) -> Iterator[Cell]:
        """The pool: blocks of `(num, n, *shape)`, cut where one of the numbers ends."""
        for begin, n in self.parts(max(1, min(self.block // num, self.max_rows))):
            name = f"pool, candidates {begin + 1} to {begin + n} of each sample, seed {seed}"
            settings = {**identity, "seed": seed, "begin": begin, "n": n, "steps": self.steps}
            yield Cell(name, settings, lambda begin=begin, n=n: self._generate(target(), num, seed, device, begin, n))

    @torch.no_grad()
    def _generate(self, target: Target, num: int, seed: int, device: torch.device, begin: int, n: int) -> Outcome:
        shape = target.state_shape
        x0 = noise(num * n, shape, 7_919 * (seed + 1) + begin, device).reshape(num, n, *shape)
        if begin == 0:
            x0[:, 0] = noise(num, shape, seed, device)
        target.meter, parts = Meter(), []
        for rows in torch.arange(num).split(max(1, self.max_rows // n)):
            states = x0[rows].flatten(0, 1)
            parts.append(sample_ode(target.take(rows).drift, states, self.steps).reshape(-1, n, *shape))
        return Outcome({"network": target.meter.network}, {"states": torch.cat(parts)})

    @torch.no_grad()
    def choose(
        self, target: Target, blocks: Sequence[Outcome], device: torch.device, quality: Quality | None
    ) -> Outcome:
        """The best of the first N candidates of each sample, for all N.

        Returns:
            numbers: lists over N of `N`, `nfe` and, where the blocks have theirs, `wall_time` (seconds), of a sample;
            tensors: as `judge`, stacked over N.
        """
        num, begin, made = len(blocks[0].tensors["states"]), clock(device), 0.0
        numbers: dict[str, list[float]] = {"N": [], "nfe": [], "wall_time": []}
        tensors: dict[str, list[Tensor]] = {}
        target.meter, network, done = Meter(), 0, 0
        best = torch.zeros_like(blocks[0].tensors["states"][:, 0], device=device)
        best_reward = torch.full((num,), -torch.inf, device=device)
        for block in blocks:
            states = block.tensors["states"].to(device)
            n, values = states.shape[1], []
            for rows in torch.arange(num).split(max(1, self.max_rows // n)):
                values.append(target.take(rows).rewards(states[rows].flatten(0, 1)).reshape(-1, n))
            top, which = torch.cat(values).max(dim=1)
            better = top > best_reward
            best[better], best_reward[better] = states[torch.arange(num, device=device), which][better], top[better]
            network, done = network + block.numbers["network"], done + n
            made += block.numbers.get("cell_seconds", 0.0)
            if done in self.numbers:
                for key, value in judge(target, best, quality).tensors.items():
                    tensors.setdefault(key, []).append(value)
                numbers["N"].append(done)
                numbers["nfe"].append((network + target.meter.reward) / num)
                numbers["wall_time"].append((made + clock(device) - begin) / num)
        if not all("cell_seconds" in block.numbers for block in blocks):
            del numbers["wall_time"]
        return Outcome(numbers, {key: torch.stack(values) for key, values in tensors.items()})
