"""What a training step will need, without its files, data or devices: parameters, memory, and arithmetic.

The step is run on tensors that have shapes and no content (torch's FakeTensorMode), so that any size is planned in
seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules.execution import TrainingExecution
from mfm_lightning.networks.attention_tangents import as_on_gpus
from mfm_lightning.objectives import END, InnerSample, Objective, Pair, Teacher, squared_error
from mfm_lightning.tangents import resolved
from mfm_rewards.execution import DTYPES, Precision

FLOAT = 4  # bytes: weights, gradients, optimiser state and EMA are float32, under bf16-mixed as well


@dataclass
class Plan:
    """One optimiser step on one of `devices` devices.

    Attributes:
        parameters: that are trained; largest: those of the largest block.
        teacher: parameters of the teacher.
        activations: bytes, the most that a step holds besides weights and gradients.
        most: largest number of samples of a device in a pass that fits into the memory that was given, under DDP and
            under FSDP; 0 where one does not, None where no memory was given.
        reference: bytes of the activations of the straightforward step: the same terms by `torch.func.jvp` for all
            samples, attention as written, and nothing recomputed; None where it was not asked for.
        student_flops, teacher_flops: floating-point operations of matrix products, for all samples of the device.
        batch_size: samples of a device in a pass; accumulate: passes of a step.
        devices: in all.
    """

    parameters: int
    largest: int
    teacher: int
    activations: int
    student_flops: int
    teacher_flops: int
    batch_size: int
    accumulate: int
    devices: int
    most: tuple[int, int] | None = None
    reference: int | None = None

    @property
    def flops(self) -> int:
        """Of a step, on each device."""
        return self.accumulate * (self.student_flops + self.teacher_flops)

    def memory(self, sharded: bool) -> dict[str, int]:
        """Bytes on each device, by what holds them, under DDP or (sharded) FSDP."""
        one = FLOAT * self.parameters // (self.devices if sharded else 1)
        found = {"weights": one, "gradients": one, "optimiser's moments": 2 * one, "EMA": one}
        found |= {"teacher": FLOAT * self.teacher, "activations": self.activations}
        if sharded:
            found["gathered: two blocks, gradients of one"] = 3 * FLOAT * self.largest
        elif self.devices > 1:
            found["DDP's gradient buckets"] = FLOAT * self.parameters
        return found


def plan_training(
    network: nn.Module,
    objective: Objective,
    batch_size: int,
    devices: int = 1,
    accumulate: int = 1,
    precision: Precision = "bf16",
    execution: TrainingExecution | None = None,
    fake: FakeTensorMode | None = None,
    reference: bool = False,
    memory: float | None = None,
) -> Plan:
    """Plan a step of `MFMPretraining`; the teacher is taken to be a network of the same size.

    What the allocator wastes, the CUDA context (about 0.5 GB) and NCCL's buffers come on top.

    Args:
        network: made within the mode `fake`.
        precision: of the step.
        reference: count the memory of the straightforward step, too.
        memory: bytes of a device, for which the largest batch is looked for.
    """
    fake = fake or FakeTensorMode()
    with fake:
        model = MetaFlowMap(network)
        plain = _straightforward(model, objective, batch_size, precision) if reference else None
        if execution is not None and execution.checkpoint_activations:
            TrainingExecution(checkpoint_activations=True).prepare(network)  # compiling would change little here
        trained = [p for p in model.parameters() if p.requires_grad]
        activations = _held(model, objective, batch_size, precision)
        # attention written out, for its fused kernels are not counted everywhere
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            _step(model, objective, batch_size, precision)
        student = counter.get_total_flops()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            x = torch.empty(batch_size, *model.state_shape)
            model.velocity(0.0, 0.5, x, 0.5, x)
        forward = counter.get_total_flops()
        blocks = [sum(p.numel() for p in region.parameters()) for region in getattr(network, "regions", [network])]
    needs = objective.needs_teacher
    plan = Plan(
        parameters=sum(p.numel() for p in trained),
        largest=max(blocks),
        teacher=sum(p.numel() for p in trained) if needs else 0,
        activations=activations,
        student_flops=student + round(forward * _guided_rows(objective)),
        teacher_flops=round(forward * _teacher_rows(objective)) if needs else 0,
        batch_size=batch_size,
        accumulate=accumulate,
        devices=devices,
        reference=plain,
    )
    if memory is not None:
        room = [memory - sum(plan.memory(sharded).values()) + activations for sharded in (False, True)]
        known = {batch_size: activations}
        with fake:
            most = [_largest(lambda n: _held(model, objective, n, precision), space, known) for space in room]
        plan = replace(plan, most=(most[0], most[1]))
    return plan


def _largest(held: Callable[[int], int], room: float, known: dict[int, int]) -> int:
    """The most samples of which no more than `room` bytes are held, to about a hundredth; 0 where one does not fit.

    What is held is nearly linear in the samples, but not wholly: casts of the weights do not grow with them, and chunks
    of attention stop growing. So a line through the two nearest numbers that are known is followed, and each guess is
    planned anew.

    Args:
        held: by the samples, rising.
        known: of it, at least one; those that are asked are added.
    """
    for _ in range(8):
        near, *others = sorted(known, key=lambda n: abs(known[n] - room))[:2]
        rise = (known[near] - known[others[0]]) / (near - others[0]) if others else 0.0
        guess = int(near + (room - known[near]) / (rise if rise > 0 else known[near] / near))
        fits = max((n for n, size in known.items() if size <= room), default=0)
        fails = min((n for n, size in known.items() if size > room), default=guess + 1)
        guess = max(1, min(guess, fails - 1, 100 * max(known)))
        if guess in known or 0 <= guess - fits <= fits // 100:
            break
        known[guess] = held(guess)
    return max((n for n, size in known.items() if size <= room), default=0)


def _held(model: MetaFlowMap, objective: Objective, batch_size: int, precision: Precision) -> int:
    """Bytes, the most that a step holds besides weights and gradients."""
    model.zero_grad(set_to_none=True)
    with Allocations(model) as allocations:
        _step(model, objective, batch_size, precision)
    return allocations.peak


def _straightforward(model: MetaFlowMap, objective: Objective, batch_size: int, precision: Precision) -> int:
    """Of the step that `Plan.reference` describes."""
    with sdpa_kernel(SDPBackend.MATH):
        return _held(model, replace(objective, backend="functorch"), batch_size, precision)


@contextmanager
def on_paper(precision: Precision) -> Iterator[None]:
    """Where tensors without content are computed as a GPU would: what this CPU is slow at is not said."""
    with as_on_gpus(), torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
        yield


def _step(model: MetaFlowMap, objective: Objective, batch_size: int, precision: Precision) -> None:
    x, s = torch.empty(batch_size, *model.state_shape), torch.empty(batch_size)
    label = torch.zeros(batch_size, dtype=torch.long)
    pair, total = Pair(x, s, x, Conditions(label=label)), torch.zeros(())
    # torch.func.jvp takes no part of a tensor without content: all samples have tangents then
    forward_mode = resolved(objective.backend, model) == "functorch"
    equal = 0 if forward_mode else objective.inner_times.num_equal(batch_size)
    with on_paper(precision):
        for term in objective.built_terms:
            # guidance by the teacher or the model itself is forward passes, which leave nothing behind (`_guided_rows`)
            # with the tangents of the end of a curriculum, which take the most memory
            inner = InnerSample(s, s, torch.empty_like(x), torch.empty_like(x), equal, torch.empty_like(x), END)
            total = total + squared_error(term(model, _NoTeacher(), term.condition(pair), inner)).mean()
    total.backward()


class _NoTeacher(Teacher):
    """Drifts of no content, for terms that ask a teacher themselves."""

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        return torch.empty_like(x)

    def to(self, device: torch.device) -> Teacher:
        return self


def _teacher_rows(objective: Objective) -> float:
    """Evaluations of the teacher for each sample of a step."""
    asked = sum(term.teacher_evaluations for term in objective.built_terms)
    at_start = sum(term.teacher_at_start for term in objective.built_terms)
    evaluations = asked - at_start + (min(1, at_start) if objective.share_inner else at_start)
    guided = objective.pairs.guidance_scale != 1
    return evaluations * (1 + (1 - objective.pairs.class_dropout) * guided)


def _guided_rows(objective: Objective) -> float:
    """Evaluations of the student without a graph, for each sample of a step, that guide the data's velocity."""
    guided = (1 - objective.pairs.class_dropout) * (objective.pairs.guidance_scale != 1)
    return 2 * guided * sum(term.guides_data for term in objective.built_terms)


class Allocations(TorchDispatchMode):
    """The most that the tensors made under it take at once, besides the parameters and their gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: MutableMapping[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = 0
        for p in (p for p in model.parameters() if p.requires_grad):
            p.register_post_accumulate_grad_hook(lambda p: self._drop(p.grad.untyped_storage().nbytes()))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
