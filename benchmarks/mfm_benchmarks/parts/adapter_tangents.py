"""The tangents of adapters of text-to-image transformers beside each other: cells of work, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mfm_benchmarks.blocks import Block, Table
from mfm_benchmarks.parts.adapter_steps import WITHOUT, AdapterSize, AdapterTraining
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_benchmarks.timing import interleaved, peak_bytes
from mfm_lightning.metrics.measured import of_runs, ratio_of_runs
from mfm_rewards.execution import Precision

CAPTION = (
    "v with a graph and its derivative along (1, 0, velocity) in (s, u, x), and the backward of a loss of both to the "
    "adapter's weights; all weights are random. 'no tangent': the same of v alone. Explicit rules are named where the "
    "network has them; these transformers have none. Peak memory is of tensors above weights, gradients included. "
    "'error': of the derivative, relative to that of torch.func.jvp."
)


class AdapterTangents:
    """Time, memory and error of each tangent.

    Args:
        sizes: transformers by the names of the report.
        precisions: of the networks.
        rounds: how often each tangent is timed; all take turns.
    """

    def __init__(
        self, sizes: Mapping[str, AdapterSize], precisions: Sequence[Precision], rounds: int, device: torch.device
    ) -> None:
        self.sizes, self.precisions, self.rounds, self.device = sizes, precisions, rounds, device
        self._cells: dict[tuple[str, Precision], Cell] = {}

    def cells(self, identity: dict[str, Any]) -> list[Cell]:
        """One for each transformer and precision.

        Args:
            identity: what outcomes depend on besides.
        """
        self._cells = {
            (name, precision): Cell(
                f"adapter of {name} {precision} batch {size.batch}",
                {**identity, "adapter": asdict(size), "precision": precision},
                partial(self._compute, size, precision),
            )
            for name, size in self.sizes.items()
            for precision in self.precisions
        }
        return list(self._cells.values())

    def _compute(self, size: AdapterSize, precision: Precision) -> Outcome:
        training = AdapterTraining(size, precision, self.device)
        steps = training.steps()
        seconds, failures = interleaved(steps, self.rounds, self.device)
        memory = {}
        for name in seconds:
            training.model.zero_grad(set_to_none=True)  # so that new gradients count, and old ones do not
            memory[name] = peak_bytes(steps[name], self.device)
        error = {name: value for name, value in training.errors().items() if name in seconds}
        return Outcome({"seconds": seconds, "failures": failures, "memory": memory, "error": error})

    def blocks(self, results: Results) -> list[Block]:
        """The table, where there is a result."""
        rows: list[dict[str, Any]] = []
        for (name, precision), cell in self._cells.items():
            if cell in results:
                of = {"transformer": name, "precision": precision, "batch": self.sizes[name].batch}
                rows += [{**of, **row} for row in _rows(results[cell].numbers)]
        title = "Tangents of adapters on text-to-image transformers"
        return (
            [Table("adapters", title, rows, CAPTION, keys=["transformer", "precision", "batch", "tangent"])]
            if rows
            else []
        )


def _rows(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one transformer."""
    seconds, memory = numbers["seconds"], numbers["memory"]
    found = [{"tangent": way, "failed": failed} for way, failed in numbers["failures"].items()]
    if not (tangents := [way for way in seconds if way != WITHOUT]):
        return found
    fastest = min(tangents, key=lambda way: of_runs(seconds[way]).value)
    least = min(memory[way] for way in tangents)
    done = [
        {
            "tangent": way,
            "ms": of_runs(times) * 1e3,
            "time over the fastest": ratio_of_runs(times, seconds[fastest]),
            "peak memory, MB": memory[way] / 1e6,
            "memory over the smallest": memory[way] / least,
            "error": numbers["error"].get(way),
        }
        for way, times in seconds.items()
    ]
    return [*done, *found]
