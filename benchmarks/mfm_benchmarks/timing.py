"""Time, memory and arithmetic of a piece of work."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mfm_benchmarks.measure import clock

Step = Callable[[], object]
TIMED = (
    "Intervals are 95 % intervals by Student's t over the rounds of this run. Each is of one comparison, without a "
    "correction for their number."
)


def interleaved(steps: dict[str, Step], rounds: int, device: torch.device) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each step in each round, all steps in turn, after one untimed; and what went wrong, by name."""
    seconds, failures = {name: [] for name in steps}, {}
    for round_ in range(-1, rounds):
        for name, step in steps.items():
            if name in failures:
                continue
            begin = clock(device)
            try:
                step()
            except Exception as error:  # memory, or a kernel that does not build here: Triton has errors of its own
                failures[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
                seconds.pop(name)
                continue
            if round_ >= 0:
                seconds[name].append(clock(device) - begin)
    return seconds, failures


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that tensors take while a step runs, above what there was before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    record = profiler.profiler and profiler.profiler.kineto_results
    if record is None:
        raise RuntimeError("torch's profiler recorded nothing")
    now = peak = 0
    for _, size in sorted(_allocations(record.experimental_event_tree())):
        now += size
        peak = max(peak, now)
    return peak


def _allocations(events: Iterable) -> Iterable[tuple[int, int]]:
    for event in events:
        if "Allocation" in str(event.tag):
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def count_flops(step: Step) -> int:
    """Floating-point operations of the matrix products of a step."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def product_peak(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """Operations per second of a large matrix product, the best of some rounds."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        begin = clock(device)
        for _ in range(10 if device.type == "cuda" else 1):
            torch.matmul(a, b)
        best = min(best, (clock(device) - begin) / (10 if device.type == "cuda" else 1))
    return 2 * size**3 / best
