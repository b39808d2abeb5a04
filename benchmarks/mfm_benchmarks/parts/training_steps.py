"""Steps of training on random weights and data, one beside the other: what they take of time and memory, and where."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfm_benchmarks.timing import Step
from mfm_lightning.callbacks import EMA
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times, expand
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import Optimization, TrainingExecution
from mfm_lightning.networks import DiT
from mfm_lightning.networks.attention_tangents import AttentionTangent
from mfm_lightning.networks.base import label_and_guidance
from mfm_lightning.networks.dit import Attention
from mfm_lightning.objectives import InnerSample, Objective, Pair, PairSampler, WeightedTerm
from mfm_lightning.objectives.teachers import ModelTeacher, teacher_velocity
from mfm_lightning.tangents import velocity_and_jvp
from mfm_rewards.execution import Precision, autocast

REFERENCE = "reference"
GUIDANCE = 2.5


@dataclass(frozen=True)
class Variant:
    """A way to make the step.

    backend: of the tangents; share: one inner sample, so one teacher evaluation, for both terms; plain: attention as
    written (softmax of the quadratic matrix) everywhere, and the teacher's class-guided pair for all samples;
    attention: how its tangent is computed.
    """

    name: str
    backend: str = "explicit"
    share: bool = True
    plain: bool = False
    compile: bool = False
    checkpoint: bool = False
    attention: AttentionTangent = "auto"


VARIANTS = (
    Variant(REFERENCE, "functorch", share=False, plain=True),
    Variant("explicit, own samples", share=False),
    Variant("functorch", "functorch"),
    Variant("finite difference", "finite_difference"),
    Variant("explicit"),
    Variant("explicit, checkpointed", checkpoint=True),
    Variant("explicit, compiled", compile=True),
)
GPU_VARIANTS = (  # of which CPUs are slower with the first, and have no second: the table of attention's tangents
    Variant("explicit, fused tangent", attention="fused"),
    Variant("explicit, fused tangent, compiled", attention="fused", compile=True),
    Variant("explicit, triton tangent", attention="triton"),
)


class PlainTeacher(ModelTeacher):
    """b_null + g (b_cond - b_null) as written, for all samples."""

    @torch.no_grad()
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        t, null = as_times(t, x), self.model.null_conditions
        given = (conditions or Conditions()).filled(null).expand(len(x), x.device)
        both = given.cat(given.drop(torch.ones(len(x), dtype=torch.bool, device=x.device), null))
        both = replace(both, guidance=None)
        conditional, unconditional = self.model.drift(torch.cat([t, t]), torch.cat([x, x]), both).chunk(2)
        return unconditional + expand(as_times(label_and_guidance(given)[1], x), x) * (conditional - unconditional)


class Training:
    """A student, a teacher, the paper's optimiser and EMA, and a batch, all random.

    Args:
        network: arguments of the DiT.
        batch: samples.
        precision: of the networks, "fp32", "bf16" or "fp16".
    """

    def __init__(self, network: dict[str, Any], batch: int, precision: Precision, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.precision: Precision = precision
        self.model, teacher = (random_model(network).to(device) for _ in range(2))
        self.teacher, self.plain_teacher = ModelTeacher(teacher), PlainTeacher(teacher)
        self.x1 = torch.randn(batch, *self.model.state_shape, device=device)
        self.given = Conditions(label=torch.randint(self.model.num_classes, (batch,), device=device))
        self.optimizer = Optimization().configure(self.model.parameters(), 1)["optimizer"]
        self._began = [p.detach().clone() for p in self.model.parameters()]
        self.ema = EMA()
        self.ema.start(self.model)

    def compiled(self) -> Training:
        """A copy whose networks are compiled."""
        other = copy.deepcopy(self)
        other.optimizer = Optimization().configure(other.model.parameters(), 1)["optimizer"]
        for model in (other.model, other.teacher.model):
            TrainingExecution(compile=True).prepare(model.network)
        return other

    def restore(self) -> None:
        """Take the weights back to where they began, and drop gradients and settings."""
        self.optimizer.zero_grad(set_to_none=True)
        self._checkpoint_activations(False)
        self._set_attention("auto")
        for p, kept in zip(self.model.parameters(), self._began, strict=True):
            p.data.copy_(kept)

    def _set_attention(self, kind: AttentionTangent) -> None:
        for layer in self.model.modules():
            if isinstance(layer, Attention):
                layer.attention_tangent = kind

    def _checkpoint_activations(self, on: bool) -> None:
        cast(DiT, self.model.network).checkpoint_activations = on  # of `random_model`

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    def backward(self, variant: Variant) -> Tensor:
        """The loss of a fixed batch; its gradients are in the parameters."""
        objective = Objective(
            [WeightedTerm("distilled_diagonal"), WeightedTerm("eulerian_teacher")],
            PairSampler(guidance_scale=GUIDANCE),
            backend=variant.backend,
            share_inner=variant.share,
        )
        self._checkpoint_activations(variant.checkpoint)
        self._set_attention(variant.attention)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        attention = sdpa_kernel(SDPBackend.MATH) if variant.plain else nullcontext()
        with attention, self.autocast():
            teacher = self.plain_teacher if variant.plain else self.teacher
            loss = objective(self.model, teacher, self.x1, self.given)["loss"]
        loss.backward()
        return loss.detach()

    def step(self, variant: Variant) -> None:
        """A whole step."""
        self.backward(variant)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.5)
        self.optimizer.step()
        self.ema.update(self.model, self.ema.num_updates + 1)

    def gradients(self, variant: Variant) -> Tensor:
        """All gradients `(P,)` of the fixed batch."""
        self.backward(variant)
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def sample(self) -> tuple[Pair, InnerSample, Tensor]:
        """A pair and an inner sample, and a velocity in place of the teacher's."""
        torch.manual_seed(1)
        pair = PairSampler(guidance_scale=GUIDANCE).sample(self.x1, self.given, self.model.null_conditions)
        s, u = torch.rand(2, len(self.x1), device=self.device).sort(dim=0).values
        inner = pair.inner(s, u)
        return pair, inner, torch.randn_like(inner.x)

    def parts(self) -> dict[str, Step]:
        """What a step is made of; "forward" is the unit."""
        pair, inner, velocity = self.sample()
        condition = (pair.t, pair.x_t, pair.conditions)
        tangents = (torch.ones_like(inner.s), torch.zeros_like(inner.u), velocity)

        @torch.no_grad()
        def forward() -> None:
            with self.autocast():
                self.model.velocity(inner.s, inner.u, inner.x, *condition)

        def diagonal() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = self.model.velocity(inner.s, inner.s, inner.x, *condition).float().square().sum()
            loss.backward()

        def guided(teacher: ModelTeacher) -> Step:
            def run() -> None:
                with self.autocast():
                    teacher_velocity(teacher, inner.s, inner.x, *condition)

            return run

        def tangent(backend: str) -> Step:
            def run() -> None:
                self.optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    v, dv = velocity_and_jvp(
                        self.model, inner.s, inner.u, inner.x, pair.t, pair.x_t, tangents, pair.conditions, backend,
                    )  # fmt: skip
                    loss = (v - dv.detach()).float().square().sum()
                loss.backward()

            return run

        return {
            "forward, no graph": forward,
            "diagonal term: forward and backward": diagonal,
            "teacher, pairs where needed": guided(self.teacher),
            "teacher, pairs for all": guided(self.plain_teacher),
            "tangent and backward: explicit": tangent("explicit"),
            "tangent and backward: functorch": tangent("functorch"),
            "tangent and backward: finite difference": tangent("finite_difference"),
            "optimiser (RAdam)": self.optimizer.step,
            "EMA": lambda: self.ema.update(self.model, self.ema.num_updates + 1),
        }


def random_model(network: dict[str, Any]) -> MetaFlowMap:
    """A Meta Flow Map of random weights, none of them zero."""
    model = MetaFlowMap(DiT(**network))
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    return model
