"""What bounds a training step on paper: operations, bytes and the least time of each part; no weights, data or GPU.

    python -m mfm_benchmarks.roofline --network imagenet256/mfm_xl2 --batch 45

Each operation of torch is counted as it is called, on tensors without content: those of matrix products, and the bytes
that it reads and writes. Its least time is the larger of operations by peak and bytes by bandwidth (Williams et al.,
"Roofline", 2009); that of a part is the sum. Where everything between matrix products is fused into them, their own
time remains. The parts are those of `mfm benchmark training-speed`, which measures them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mfm_benchmarks.costs import network_of
from mfm_lightning.commands.planning import Allocations, on_paper
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.tangents import velocity_and_jvp
from mfm_rewards.execution import Precision

FLOAT = 4  # bytes of weights, gradients, moments and EMA
ATTENTION = {  # products of a fused kernel, of which torch counts those of GPUs alone
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}


NO_CONTENT = ("empty", "new_empty", "detach", "_unsafe_view")  # operations that read and write nothing


@dataclass
class Work:
    """What a part does.

    Attributes:
        flops: of its matrix products.
        moved: bytes that its operations read and write.
        seconds: least time of all operations, each by itself.
        products: least time of the matrix products alone.
    """

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    products: float = 0.0


class Counter(TorchDispatchMode):
    """Counts operations and bytes of what is called under it; `peak` in FLOP/s, `bandwidth` in B/s."""

    def __init__(self, peak: float, bandwidth: float) -> None:
        super().__init__()
        self.peak, self.bandwidth, self.work = peak, bandwidth, Work()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet = function._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        if factor := ATTENTION.get(packet.__name__):
            at = 1 if "backward" in packet.__name__ else 0
            q, k, v = args[at : at + 3]
            rows = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
            flops = factor * rows * (q.shape[-1] + v.shape[-1])
        # prim: a question, such as for the device, which tensors without content pass on like an operation
        still = function.is_view or function.namespace == "prim" or packet.__name__.startswith(NO_CONTENT)
        moved = 0 if still else _bytes(args, kwargs, result)
        self.work.flops += flops
        self.work.moved += moved
        self.work.products += flops / self.peak
        self.work.seconds += max(flops / self.peak, moved / self.bandwidth)
        return result


def _bytes(*what: Any) -> int:
    tensors = [x for x in tree_leaves(what) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


class PaperStep:
    """The parts of a step, of a network on tensors without content; attention's tangent as on a GPU.

    Args:
        config: of `mfm fit`, whose network it is.
        batch: samples.
        precision: of the networks.
    """

    def __init__(self, config: str, batch: int, precision: Precision) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.model = MetaFlowMap(network_of(config))
            self.x, self.s = torch.empty(batch, *self.model.state_shape), torch.empty(batch)
        self.precision: Precision = precision
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @contextmanager
    def on_paper(self) -> Iterator[None]:
        """Where parts are run."""
        with self.fake, on_paper(self.precision):
            yield

    def forward(self) -> Tensor:
        """The network, without a graph."""
        with torch.no_grad():
            return self.model.velocity(self.s, self.s, self.x, self.s, self.x)

    def diagonal(self) -> None:
        """Value, and backward."""
        self.model.zero_grad(set_to_none=True)
        self._diagonal().backward()

    def tangent(self) -> None:
        """Value, derivative along (1, 0, velocity), and backward."""
        self.model.zero_grad(set_to_none=True)
        self._tangent("explicit").backward()

    def _diagonal(self) -> Tensor:
        return self.model.velocity(self.s, self.s, self.x, self.s, self.x).float().square().sum()

    def _tangent(self, backend: str) -> Tensor:
        along = (torch.ones_like(self.s), torch.zeros_like(self.s), self.x)
        v, dv = velocity_and_jvp(self.model, self.s, self.s, self.x, self.s, self.x, along, None, backend)
        return (v - dv.detach()).float().square().sum()

    def work(self, part: Callable[[], object], peak: float, bandwidth: float) -> Work:
        """Of one part."""
        with self.on_paper(), Counter(peak, bandwidth) as counter:
            part()
        return counter.work

    def over_weights(self, tensors: int, bandwidth: float) -> Work:
        """Of an update that reads or writes so many tensors of the weights' size once."""
        moved = tensors * FLOAT * self.parameters
        return Work(0.0, moved, moved / bandwidth, 0.0)

    def both(self, backend: str = "explicit", plain: bool = False) -> None:
        """Both terms and one backward of their sum, as in training."""
        self.model.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            loss = self._diagonal() + self._tangent(backend)
            loss.backward()

    def memory(self, backend: str, plain: bool = False) -> int:
        """Bytes, the most that the two terms hold besides weights and gradients."""
        with self.on_paper(), Allocations(self.model) as allocations:
            self.both(backend, plain)
        return allocations.peak


def parts(step: PaperStep, teacher_rows: float, peak: float, bandwidth: float) -> dict[str, Work]:
    """Of a step of both terms that shares one inner sample, and of all together.

    Args:
        teacher_rows: evaluations of the teacher for each sample.
    """
    forward = step.work(step.forward, peak, bandwidth)
    teacher = Work(*[teacher_rows * value for value in vars(forward).values()])
    found = {
        "diagonal term: forward and backward": step.work(step.diagonal, peak, bandwidth),
        "tangent and backward": step.work(step.tangent, peak, bandwidth),
        "teacher": teacher,
        # read: the gradient twice, weight, gradient, two moments; written: the gradient, weight, moments
        "clipping and optimiser, at least": step.over_weights(10, bandwidth),
        "EMA": step.over_weights(3, bandwidth),
    }
    whole = [sum(vars(work)[name] for work in found.values()) for name in vars(forward)]
    return {"forward, no graph (for comparison)": forward, **found, "step": Work(*whole)}


def largest_batch(step_of: Callable[[int], PaperStep], memory: float, backend: str, plain: bool = False) -> int:
    """Samples whose two terms fit beside weights, gradients, moments, EMA and a teacher; memory is linear."""
    small, large = (step_of(n).memory(backend, plain) for n in (4, 8))
    each, fixed = (large - small) / 4, small - (large - small)
    states = 6 * FLOAT * step_of(4).parameters
    return max(0, int((memory - states - fixed) / each))


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", required=True, help="config of mfm fit, whose network it is")
    parser.add_argument("--batch", type=int, default=45, help="samples on the GPU; the paper's 360 on 8: 45")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s; H100 SXM in dense bf16: 989")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of memory, TB/s; H100 SXM: 3.35")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of the GPU")
    parser.add_argument("--teacher-rows", type=float, default=1.8, help="guided pairs at label dropout 0.2: 1.8")
    given = parser.parse_args()
    peak, bandwidth = given.peak * 1e12, given.bandwidth * 1e12

    def step_of(batch: int) -> PaperStep:
        return PaperStep(given.network, batch, given.precision)

    step = step_of(given.batch)
    print(f"{given.network}: {step.parameters / 1e6:.1f} M parameters, {given.batch} samples in {given.precision}; "
          f"{given.peak:g} TFLOP/s, {given.bandwidth:g} TB/s")  # fmt: skip
    print(
        f"{'part':36} {'TFLOP':>8} {'GB moved':>9} {'FLOP/B':>7} {'ms, op by op':>13} {'ms, products':>13}  of the step"
    )
    found = parts(step, given.teacher_rows, peak, bandwidth)
    for name, work in found.items():
        ratio = work.flops / work.moved if work.moved else 0.0
        print(f"{name:36} {work.flops / 1e12:8.2f} {work.moved / 1e9:9.1f} {ratio:7.0f} {work.seconds * 1e3:13.1f} "
              f"{work.products * 1e3:13.1f}  {work.seconds / found['step'].seconds:10.0%}")  # fmt: skip
    explicit, reference = step.memory("explicit"), step.memory("functorch", plain=True)
    print(f"most that the two terms hold: explicit {explicit / 1e9:.2f} GB, reference (torch.func.jvp, plain "
          f"attention) {reference / 1e9:.2f} GB: {explicit / reference:.2f}")  # fmt: skip
    most = given.memory * 1e9
    batches = largest_batch(step_of, most, "explicit"), largest_batch(step_of, most, "functorch", plain=True)
    print(f"largest batch on {given.memory:g} GB, weights, gradients, moments, EMA and teacher beside it: explicit "
          f"{batches[0]:,}, reference {batches[1]:,}")  # fmt: skip


if __name__ == "__main__":
    main()
