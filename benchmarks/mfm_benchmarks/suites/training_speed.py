"""Training steps: time, memory and where they go, for each way of computing tangents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.claims import TIMES
from mfm_benchmarks.parts.adapter_steps import AdapterSize
from mfm_benchmarks.parts.adapter_tangents import AdapterTangents
from mfm_benchmarks.parts.attention_tangents import AttentionSize, AttentionTangents
from mfm_benchmarks.parts.training_steps import GPU_VARIANTS, REFERENCE, VARIANTS, Training, Variant
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, no_result
from mfm_benchmarks.timing import TIMED, Step, count_flops, interleaved, peak_bytes, product_peak
from mfm_lightning.metrics.measured import Measured, of_runs, ratio_of_runs, rounded
from mfm_lightning.networks.attention_tangents import AttentionTangent
from mfm_lightning.networks.dit import architecture
from mfm_rewards.execution import DTYPES, Precision, check_precision

DEFAULT = "explicit"
Batches = int | list[int]
Done = dict[tuple[str, int, str], dict[str, Any]]  # numbers by size, batch and precision


class TrainingSpeedSuite(Suite):
    """Whole steps (both terms of the distilled objective with class guidance, backward, clipping, RAdam, EMA) on random
    weights and data, against the straightforward one.

    Args:
        sizes: models by name, each with its batch: on a GPU `gpu_sizes` are taken. Of several batches all steps are
            compared at the first, which must suit the reference, and the default step is measured alone at the others.
            {} for none.
        gpu_sizes: the same for a GPU, with batches that fill it.
        precisions: some of "fp32", "bf16" and "fp16"; on a GPU `gpu_precisions` are taken.
        gpu_precisions: the same for a GPU.
        rounds: how often each step is timed; all steps take turns.
        input_size: height and width of the latents.
        in_channels: channels of the latents.
        compile: also time the compiled step (a minute or so of compilation each).
        adapters: transformers of text-to-image flows by name, with random weights and a Meta Flow Map's adapter each,
            of which the tangents alone are compared. None for none.
        attention: heads of layers by name, for which the ways to compute attention's tangent are compared. None
            for none.
    """

    name = "training-speed"
    title = "Speed of training steps"
    about = (
        "Time and memory of a training step, by how the tangent is computed and what the terms share, each against a "
        "reference step (torch.func.jvp in grad mode, nothing shared, unfused attention) in the same run; and where "
        "the time goes."
    )
    intervals = TIMED

    def __init__(
        self,
        sizes: dict[str, Batches] | None = None,
        gpu_sizes: dict[str, Batches] | None = None,
        precisions: Sequence[str] = ("fp32", "bf16"),
        gpu_precisions: Sequence[str] = ("bf16",),
        rounds: int = 5,
        input_size: int = 32,
        in_channels: int = 4,
        compile: bool = True,
        adapters: dict[str, AdapterSize] | None = None,
        attention: dict[str, AttentionSize] | None = None,
    ) -> None:
        self.sizes = {"S/2": 8, "B/2": 4} if sizes is None else dict(sizes)
        self.gpu_sizes = {"S/2": 256, "B/2": 128} if gpu_sizes is None else dict(gpu_sizes)
        self.precisions: list[Precision] = [check_precision(p) for p in precisions]
        self.gpu_precisions: list[Precision] = [check_precision(p) for p in gpu_precisions]
        self.rounds, self.input_size, self.in_channels, self.compile = rounds, input_size, in_channels, compile
        self.adapters, self.attention = dict(adapters or {}), dict(attention or {})
        if rounds < 2:
            raise ValueError(f"rounds {rounds}: an interval needs at least 2")
        for size, batches in (*self.sizes.items(), *self.gpu_sizes.items()):
            architecture(size)
            if not all_batches(batches) or min(all_batches(batches)) < 1:
                raise ValueError(f"{size}: {batches}: expected a batch of at least 1, or several")

    def shrink(self) -> None:
        self.sizes, self.gpu_sizes = ({"S/8": 8} if sizes else {} for sizes in (self.sizes, self.gpu_sizes))
        self.rounds, self.compile = 3, False
        self.adapters = dict(itertools.islice(self.adapters.items(), 1))
        self.attention = dict(itertools.islice(self.attention.items(), 1))

    @property
    def skipped(self) -> dict[str, str]:
        lacks = {} if self.compile or not self.sizes else {"explicit, compiled": "compile is off"}
        return {**lacks, **self._attention.skipped}

    def prepare(self) -> None:
        on_gpu = self.device.type == "cuda"
        precisions = self.gpu_precisions if on_gpu else self.precisions
        self._tangents = AdapterTangents(self.adapters, precisions, self.rounds, self.device)
        self._attention = AttentionTangents(self.attention, precisions, self.rounds, self.device)
        sizes = self.gpu_sizes if on_gpu else self.sizes
        self._chosen: list[tuple[str, int, Precision]] = [
            (size, batch, precision)
            for precision in precisions
            for size, batches in sizes.items()
            for batch in all_batches(batches)
        ]
        self._first = {size: all_batches(batches)[0] for size, batches in sizes.items()}
        variants = (*VARIANTS, *(GPU_VARIANTS if on_gpu else ()))
        lacking = set(get_args(AttentionTangent)) - {"auto", *self._attention.kinds}
        self._variants = [v for v in variants if (self.compile or not v.compile) and v.attention not in lacking]

    def cells(self) -> Sequence[Cell]:
        self._steps = {
            (size, batch, precision): Cell(
                f"{size} {precision} batch {batch}",
                {
                    **self._shared(size),
                    "batch": batch,
                    "precision": precision,
                    "variants": repr(self._variants_at(size, batch)),
                },
                partial(self._compute, size, batch, precision),
                alone=True,
            )
            for size, batch, precision in self._chosen
        }
        return [
            *self._steps.values(),
            *self._tangents.cells(self._machine),
            *self._attention.cells(self._machine),
        ]

    @property
    def _machine(self) -> dict[str, Any]:
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        return {"rounds": self.rounds, "threads": threads, "torch": torch.__version__}

    def _shared(self, size: str) -> dict[str, Any]:
        return {"network": self._network(size), **self._machine}

    def _network(self, size: str) -> dict[str, Any]:
        shape = {"input_size": self.input_size, "in_channels": self.in_channels, "num_classes": 1000}
        return {**architecture(size), **shape}

    def _variants_at(self, size: str, batch: int) -> list[Variant]:
        """Which steps are measured."""
        if batch == self._first[size]:
            return self._variants
        return [v for v in self._variants if v.name == DEFAULT]

    def _compute(self, size: str, batch: int, precision: Precision) -> Outcome:
        training = Training(self._network(size), batch, precision, self.device)
        variants = self._variants_at(size, batch)
        compiled = any(variant.compile for variant in variants)
        by_compile = {False: training} | ({True: training.compiled()} if compiled else {})

        def step(variant: Variant) -> Step:
            return lambda: by_compile[variant.compile].step(variant)

        seconds, failures = interleaved({v.name: step(v) for v in variants}, self.rounds, self.device)
        memory, error = {}, {}
        for variant in (v for v in variants if v.name in seconds):
            by_compile[variant.compile].restore()
            memory[variant.name] = peak_bytes(step(variant), self.device)
        by_compile.pop(True, None)
        torch._dynamo.reset()  # it would hold the compiled copy
        training.restore()
        for shared in (False, True):  # what looks at the same samples has the same gradients
            exact = next((v for v in variants if v.backend == "functorch" and v.share == shared), None)
            if exact is None or exact.name not in seconds:  # it is not asked for, or did not fit
                continue
            reference = training.gradients(exact)
            for variant in (v for v in variants if v.share == shared and v.name in seconds and not v.compile):
                difference = training.gradients(variant) - reference
                error[variant.name] = float(difference.norm() / reference.norm())
        training.restore()
        of_step = training.parts()
        parts, lost = interleaved(of_step, self.rounds, self.device)
        explicit = next(v for v in variants if v.name == DEFAULT)
        return Outcome(
            {
                "seconds": seconds,
                "failures": {**failures, **lost},
                "memory": memory,
                "error": error,
                "parts": parts,
                "flops": _flops(lambda: training.step(explicit)),
                "part_flops": {name: _flops(part) for name, part in of_step.items() if name in parts},
                "peak": product_peak(self.device, DTYPES[precision]),
            }
        )

    # -- report --------------------------------------------------------------------------------------------------------

    def report(self, results: Results) -> Sequence[Block]:
        done = {key: results[cell].numbers for key, cell in self._steps.items() if cell in results}
        blocks: list[Block] = []
        if done:
            blocks += [*self._summary(done), *self._headline(done), *self._picture(done), self._claims(done)]
            keys = ["model", "precision", "batch"]
            blocks += [
                Table("steps", "Time and memory of a step", self._step_rows(done), keys=[*keys, "step"]),
                Table("parts", "Where the time goes", self._part_rows(done), PARTS_CAPTION, keys=[*keys, "part"]),
            ]
        blocks += [*self._tangents.blocks(results), *self._attention.blocks(results)]
        return blocks or [no_result(results)]

    def _summary(self, done: Done) -> list[Block]:
        """The default step against the reference, over sizes and precisions."""
        speeds = [s for numbers in done.values() if (s := _speed(numbers, DEFAULT)) is not None]
        memories = [m for numbers in done.values() if (m := _memory(numbers, DEFAULT)) is not None]
        if not speeds or not memories:
            return []
        lowest, highest = (f(s.value for s in speeds) for f in (min, max))
        least, most = min(memories), max(memories)
        several = len(speeds) > 1
        times = f"{rounded(lowest, 2)} to {rounded(highest, 2)}" if several else rounded(lowest, 2)
        shares = f"{rounded(least, 2)} to {rounded(most, 2)}" if several else rounded(least, 2)
        return [
            Summary([
                f"The default training step (explicit tangents, one shared sample) makes {times} times as many steps "
                "per second as the reference step.",
                f"It needs {shares} times the peak memory of the reference step.",
                f"All steps were timed in turns, {self.rounds} rounds on the same machine.",
            ])
        ]  # fmt: skip

    def _headline(self, done: Done) -> list[Block]:
        items = []
        for (size, _, precision), numbers in done.items():
            speed, memory = _speed(numbers, DEFAULT), _memory(numbers, DEFAULT)
            if speed is not None:
                items.append(
                    (f"{rounded(speed.value)} {TIMES}", f"steps per second of the reference step, {size} {precision}")
                )
            if memory is not None:
                items.append(
                    (f"{rounded(memory, 2)} {TIMES}", f"peak memory of the reference step, {size} {precision}")
                )
        return [Headline(items)] if items else []

    def _claims(self, done: Done) -> Claims:
        lines = []
        for (size, batch, precision), numbers in done.items():
            for name in (DEFAULT, "explicit, compiled"):
                speed, memory = _speed(numbers, name), _memory(numbers, name)
                if speed is None:
                    continue
                words = "faster" if speed.low > 1 else "slower" if speed.high < 1 else "no significant difference"
                kept = "" if memory is None else f", with {rounded(memory, 2)} times its peak memory"
                lines.append(
                    f"{size}, {precision}, batch {batch}: {name}, one shared sample: {words}; {speed.text()} times as "
                    f"many steps per second as the reference{kept}."
                )
        return Claims("Differences to the reference step", lines)

    def _picture(self, done: Done) -> list[Block]:
        names = [v.name for v in self._variants]
        panels = {
            f"{size}, {precision}, batch {batch}": {n: s for n in names if (s := _speed(numbers, n)) is not None}
            for (size, batch, precision), numbers in done.items()
        }
        panels = {title: bars for title, bars in panels.items() if bars}
        if not panels:  # the references did not fit
            return []
        ours = [name for name in names if name.startswith(DEFAULT)]
        chart = plots.bars(panels, dict.fromkeys(panels, 1.0), "steps in the time of one reference step", ours)
        return [Picture("speed", "Speed of training steps", chart, STEPS_CAPTION)]

    def _step_rows(self, done: Done) -> list[dict[str, Any]]:
        rows = []
        for (size, batch, precision), numbers in done.items():
            for variant in self._variants_at(size, batch):
                row: dict[str, Any] = {"model": size, "precision": precision, "batch": batch, "step": variant.name}
                if variant.name not in numbers["seconds"]:
                    rows.append({**row, "failed": numbers["failures"].get(variant.name, "")})
                    continue
                seconds = of_runs(numbers["seconds"][variant.name])
                rows.append(
                    {
                        **row,
                        "ms per step": seconds * 1e3,
                        "samples/s": batch / seconds.value,
                        "times faster": _speed(numbers, variant.name),
                        "peak memory, MB": numbers["memory"][variant.name] / 1e6,
                        "memory over the reference": _memory(numbers, variant.name),
                        "gradient error": numbers["error"].get(variant.name),
                        "share of matmul peak": _share(variant, numbers, seconds.value),
                    }
                )
        return rows

    def _part_rows(self, done: Done) -> list[dict[str, Any]]:
        rows = []
        for (size, batch, precision), numbers in done.items():
            unit = numbers["parts"].get("forward, no graph")
            whole = numbers["seconds"].get(DEFAULT)
            for name, seconds in numbers["parts"].items():
                row = {"model": size, "precision": precision, "batch": batch, "part": name}
                row["ms"] = of_runs(seconds) * 1e3
                row["in forward passes"] = None if unit is None else _median_ratio(seconds, unit)
                row["of the explicit step"] = None if whole is None else _median_ratio(seconds, whole)
                if flops := numbers.get("part_flops", {}).get(name):  # results of earlier code have none
                    row["share of matmul peak"] = flops / of_runs(seconds).value / numbers["peak"]
                rows.append(row)
        return rows


def all_batches(batches: Batches) -> list[int]:
    """As a list."""
    return [batches] if isinstance(batches, int) else list(batches)


def _flops(step: Step) -> int | None:
    """Of the matrix products; None where counting does not fit, for it writes attention out."""
    try:
        return count_flops(step)
    except torch.OutOfMemoryError:
        return None


def _share(variant: Variant, numbers: dict[str, Any], seconds: float) -> float | None:
    """Of the peak; None unless the operations were counted and are this step's: with samples of its own, a term asks
    the teacher again."""
    if numbers["flops"] is None or not variant.share or not variant.name.startswith(DEFAULT):
        return None
    return numbers["flops"] / seconds / numbers["peak"]


STEPS_CAPTION = (
    "Whole steps: losses, backward, clipping, RAdam, EMA; random weights, class-guided teacher of the same size. "
    "'reference': torch.func.jvp in grad mode, each term with its own sample and teacher evaluation, the guided pair "
    "for all samples, unfused attention. 'explicit, own samples': the networks' own tangents, fused attention, pairs "
    "only where a label is guided. All others also share one inner sample. Times are means over rounds in which all "
    "steps take turns, with Student's 95 % interval; 'times faster' is the geometric mean of the rounds' ratios. Peak "
    "memory is of tensors besides model, optimiser and EMA, gradients included. 'gradient error' is relative to "
    "torch.func.jvp on the same samples. 'share of matmul peak': operations of the explicit step's matrix products per "
    "second, as a share of a large matrix product measured in the same run. The dashed line is the reference."
)
PARTS_CAPTION = (
    "Parts of a step by themselves, in milliseconds, in no-grad forward passes, and as a share of the step. 'share of "
    "matmul peak': as for steps, by the part's own matrix products; empty for parts that have none."
)


def _speed(numbers: dict[str, Any], name: str) -> Measured | None:
    if name not in numbers["seconds"] or REFERENCE not in numbers["seconds"]:
        return None
    return ratio_of_runs(numbers["seconds"][REFERENCE], numbers["seconds"][name])


def _memory(numbers: dict[str, Any], name: str) -> float | None:
    memory = numbers["memory"]
    return memory[name] / memory[REFERENCE] if name in memory and REFERENCE in memory else None


def _median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return float(torch.tensor(a).median() / torch.tensor(b).median())
