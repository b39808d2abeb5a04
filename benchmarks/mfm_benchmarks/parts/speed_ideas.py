"""Ideas for a faster step, measured to decide whether they go into it; another machine may decide otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mfm_benchmarks.parts.training_steps import Training
from mfm_benchmarks.timing import Step
from mfm_lightning.networks import dual
from mfm_lightning.networks.dual import Dual
from mfm_lightning.objectives.teachers import ModelTeacher, teacher_velocity
from mfm_rewards.execution import DTYPES

Pair = tuple[Step, Step]  # the work as it is done, and as it would be done


def ideas(training: Training) -> dict[str, Callable[[], Pair]]:
    """By idea, what makes the two steps to compare; one at a time, for some take memory."""
    found = {
        "a linear layer's value and tangent in one product": _linear,
        "attention's tangent all at once, not in chunks": lambda t: _attention(t, fused=False),
        "attention's tangent by the fused backward kernel": lambda t: _attention(t, fused=True),
        "the student's two passes in one batch": _student,
        "RAdam over lists of tensors (foreach)": lambda t: _optimizers(
            t, torch.optim.RAdam, {"foreach": False}, {"foreach": True}
        ),
        "AdamW not fused": lambda t: _optimizers(t, torch.optim.AdamW, {"fused": True}, {}),
    }
    if training.precision == "fp32":
        found["the teacher in bf16"] = _teacher
    return {name: partial(make, training) for name, make in found.items()}


def _linear(training: Training) -> Pair:
    layer = training.model.network.blocks[0].mlp.fc1
    weight = layer.weight.detach().to(_dtype(training))
    shape = (2, len(training.x1) * _num_tokens(training), layer.in_features)
    x, dx = torch.randn(shape, device=training.device, dtype=weight.dtype)
    two = lambda: (F.linear(x, weight), F.linear(dx, weight))  # noqa: E731
    return two, lambda: F.linear(torch.cat([x, dx]), weight)


def _attention(training: Training, fused: bool) -> Pair:
    attention = training.model.network.blocks[0].attn
    size = attention.proj.in_features // attention.num_heads
    shape = (2, len(training.x1), attention.num_heads, _num_tokens(training), size)
    q, k, v = (Dual(*torch.randn(shape, device=training.device, dtype=_dtype(training))) for _ in range(3))

    @torch.no_grad()
    def chunked() -> None:
        dual.attention(q, k, v)

    @torch.no_grad()
    def whole() -> None:
        kept = dict(dual.MAX_WEIGHTS)
        dual.MAX_WEIGHTS[training.device.type] = 2**40
        try:
            dual.attention(q, k, v)
        finally:
            dual.MAX_WEIGHTS.update(kept)

    @torch.no_grad()
    def by_backward() -> None:
        F.scaled_dot_product_attention(q.value, k.value, v.value)
        fused_attention_tangent(q, k, v)

    return chunked, by_backward if fused else whole


def fused_attention_tangent(q: Dual, k: Dual, v: Dual) -> Tensor:
    """The tangent of attention, `(B, heads, T, d)`, by a kernel that is there for the backward pass.

    With Q = [q, 0], K = [k, v], V = [k, dk] the weights are those of q and k, and the gradient of Q along [dq, q] is
    (S dS) [k, v] - rowsum(S dS) S [k, v], dS the scores' tangent: its second half is what is needed besides S dv.
    """
    size = q.value.shape[-1]
    with torch.enable_grad():
        queries = torch.cat([q.value, torch.zeros_like(q.value)], -1).requires_grad_()
        keys, values = torch.cat([k.value, v.value], -1), torch.cat([k.value, k.tangent], -1)
        output = F.scaled_dot_product_attention(queries, keys, values, scale=size**-0.5)
        (gradient,) = torch.autograd.grad(output, queries, torch.cat([q.tangent, q.value], -1))
    return gradient[..., size:] + F.scaled_dot_product_attention(q.value, k.value, v.tangent)


def _student(training: Training) -> Pair:
    pair, inner = training.sample()
    arguments = (inner.s, inner.s, inner.x, pair.t, pair.x_t, pair.label, pair.guidance)
    twice = [torch.cat([a, a]) for a in arguments]

    def passes(*batches) -> Step:
        def run() -> None:
            training.optimizer.zero_grad(set_to_none=True)
            with training.autocast():
                velocities = [training.model.velocity(*batch) for batch in batches]
                loss = sum(v.float().square().sum() for v in velocities)
            loss.backward()

        return run

    return passes(arguments, arguments), passes(twice)


def _optimizers(training: Training, kind: type, without: dict, with_: dict) -> Pair:
    training.optimizer.zero_grad(set_to_none=True)
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in training.model.parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    return tuple(kind(parameters, lr=1e-6, **options).step for options in (without, with_))


def _teacher(training: Training) -> Pair:
    pair, inner = training.sample()

    def velocity(teacher: ModelTeacher) -> Step:
        arguments = (inner.s, inner.x, pair.t, pair.x_t, pair.label, pair.guidance)
        return lambda: teacher_velocity(teacher, *arguments)

    low = ModelTeacher(training.teacher.model, precision="bf16")
    return velocity(training.teacher), velocity(low)


def _num_tokens(training: Training) -> int:
    return (training.model.state_shape[-1] // training.model.network.patch_size) ** 2


def _dtype(training: Training) -> torch.dtype:
    return DTYPES[training.precision]
