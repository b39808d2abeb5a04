"""The ways to compute attention's tangent beside each other, by number of tokens: cells of work, and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mfm_benchmarks.blocks import Block, Table
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_benchmarks.timing import Step, interleaved, peak_bytes
from mfm_lightning.metrics.measured import of_runs, ratio_of_runs
from mfm_lightning.networks.attention_tangents import attention_tangent, check_attention_tangent
from mfm_rewards.execution import DTYPES, Precision

FORWARD = "attention itself"
CAPTION = (
    "The derivative of attention along random directions of q, k and v, for heads of one layer with random content. "
    "'chunked': plain products, some heads at a time. 'fused': by the backward pass of torch's fused attention with "
    "heads twice as wide. 'triton': by the kernel of jvp-flash-attention (GPUs alone). Peak memory is of what the "
    "tangent allocates. 'error' is relative to the norm of torch.func.jvp's derivative in float64, of one sample."
)


@dataclass(frozen=True)
class AttentionSize:
    """Heads of a layer.

    Args:
        tokens: in a sample.
        heads: of the layer.
        head_size: width of a head.
        batch: samples on a CPU.
        gpu_batch: samples on a GPU.
    """

    tokens: int
    heads: int = 16
    head_size: int = 72
    batch: int = 1
    gpu_batch: int = 32


class AttentionTangents:
    """Time, memory and error of each way.

    Args:
        sizes: heads of layers by the names of the report.
        precisions: of q, k and v.
        rounds: how often each way is timed; all take turns.
    """

    def __init__(
        self, sizes: dict[str, AttentionSize], precisions: Sequence[Precision], rounds: int, device: torch.device
    ) -> None:
        self.sizes, self.precisions, self.rounds, self.device = sizes, precisions, rounds, device
        self._cells: dict[tuple[str, Precision], Cell] = {}

    @property
    def skipped(self) -> dict[str, str]:
        """Ways that are not measured here, and why."""
        if not self.sizes or "triton" in self.kinds:
            return {}
        lacks = "no GPU is there" if self.device.type != "cuda" else "jvp-flash-attention is not installed"
        return {"attention's tangent by triton": lacks}

    @property
    def kinds(self) -> list[str]:
        """Ways that can be measured here."""
        there = self.device.type == "cuda" and find_spec("jvp_flash_attention") is not None
        return ["chunked", "fused", *(["triton"] if there else [])]

    def cells(self, identity: dict[str, Any]) -> list[Cell]:
        """One for each size and precision.

        Args:
            identity: what outcomes depend on besides.
        """
        self._cells = {
            (name, precision): Cell(
                f"attention's tangent {name} {precision}",
                {**identity, "attention": asdict(size), "precision": precision, "kinds": self.kinds},
                partial(self._compute, size, precision),
                alone=True,
            )
            for name, size in self.sizes.items()
            for precision in self.precisions
        }
        return list(self._cells.values())

    def _compute(self, size: AttentionSize, precision: Precision) -> Outcome:
        batch = size.gpu_batch if self.device.type == "cuda" else size.batch
        torch.manual_seed(0)
        shape = (6, batch, size.heads, size.tokens, size.head_size)
        parts = torch.randn(shape, device=self.device).to(DTYPES[precision]).unbind(0)
        value = scaled_dot_product_attention(parts[0], parts[1], parts[2])
        ways = {kind: self._way(kind, parts, value) for kind in self.kinds}
        steps: dict[str, Step] = {
            FORWARD: lambda: scaled_dot_product_attention(parts[0], parts[1], parts[2]),
            **ways,
        }
        seconds, failures = interleaved(steps, self.rounds, self.device)
        memory = {name: peak_bytes(steps[name], self.device) for name in seconds}
        one, exact = [x[:1] for x in parts], self._exact([x[:1].double() for x in parts])
        error = {}
        for kind in ways:
            if kind in seconds:
                found = self._way(kind, one, value[:1])()
                error[kind] = float((found.double() - exact).norm() / exact.norm())
        return Outcome({"seconds": seconds, "failures": failures, "memory": memory, "error": error, "batch": batch})

    @staticmethod
    def _way(kind: str, parts: Sequence[Tensor], value: Tensor) -> Callable[[], Tensor]:
        checked = check_attention_tangent(kind)

        @torch.no_grad()
        def run() -> Tensor:
            q, k, v, dq, dk, dv = parts
            return attention_tangent(checked, q, k, v, dq, dk, dv, value)

        return run

    @staticmethod
    def _exact(parts: Sequence[Tensor]) -> Tensor:
        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

        return torch.func.jvp(plain, tuple(parts[:3]), tuple(parts[3:]))[1]

    def blocks(self, results: Results) -> list[Block]:
        """The table, where there is a result."""
        rows: list[dict[str, Any]] = []
        for (name, precision), cell in self._cells.items():
            if cell not in results:
                continue
            numbers, size = results[cell].numbers, self.sizes[name]
            ways = {kind: s for kind, s in numbers["seconds"].items() if kind != FORWARD}
            fastest = min(ways, key=lambda kind: of_runs(ways[kind]).value) if ways else None
            for kind in (FORWARD, *self.kinds):
                row: dict[str, Any] = {
                    "heads": name, "tokens": size.tokens, "precision": precision, "batch": numbers["batch"], "way": kind
                }  # fmt: skip
                if kind not in numbers["seconds"]:
                    rows.append({**row, "failed": numbers["failures"].get(kind, "")})
                    continue
                row["ms"] = of_runs(numbers["seconds"][kind]) * 1e3
                row["time over the fastest"] = (
                    ratio_of_runs(numbers["seconds"][kind], ways[fastest]) if fastest else None
                )
                row["peak memory, MB"] = numbers["memory"][kind] / 1e6
                row["error"] = numbers["error"].get(kind)
                rows.append(row)
        return [Table("attention", "Attention's tangent", rows, CAPTION)] if rows else []
