"""The terms of the objective (Eq. 33, Table 1), each a small object: student side, target, their difference.

Every term returns the residual `v_student - sg(target)`, `(B, *shape)`; how it is weighed and averaged is not its
business. `sg` is the stop-gradient: targets are computed without a graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mfm_lightning.interpolant import expand
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.objectives.pairs import InnerSample, Pair
from mfm_lightning.objectives.teachers import Teacher, teacher_velocity
from mfm_lightning.samplers import integrate
from mfm_lightning.tangents import check_backend, velocity_and_jvp

SHARPNESS, LEAST_ALPHA = 25.0, 0.005  # of alpha-Flow's curriculum


def least_alpha(x: Tensor) -> float:
    """Ten times that of the paper where a network computes in bfloat16 at x: v's rounding is divided by alpha."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return 10 * LEAST_ALPHA if dtype == torch.bfloat16 else LEAST_ALPHA


class Term(ABC):
    """A part of the objective.

    Attributes:
        needs_teacher: refused before training where there is none.
        teacher_at_start: the teacher's velocity at (s, x) must be in the inner sample, where terms that look at the
            same sample share it.
        guides_data: it guides the data's velocity by the model itself.
        noisy_target: the target holds x1 - eps, of which the network is to learn the mean given the states; other
            targets are functions of the states.
        pins_diagonal: where its residual vanishes on average, v_{s,s} is the velocity of the data or of the teacher. A
            term without it holds for the flow map of any velocity, a constant one included.
        base_flow_only: it looks at t = 0 alone.
    """

    needs_teacher: bool = False
    teacher_at_start: bool = False
    guides_data: bool = False
    noisy_target: bool = False
    pins_diagonal: bool = False
    base_flow_only: bool = False

    @property
    def teacher_evaluations(self) -> int:
        """Evaluations of the teacher for each sample, at most; those that terms can share included."""
        return int(self.needs_teacher)

    def condition(self, pair: Pair) -> Pair:
        """What the term is conditioned on."""
        return pair

    @abstractmethod
    def __call__(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        """The residual, `(B, *shape)`."""


def guided_data_velocity(model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
    """x1 - eps + (1 - 1/g) sg(v_cond - v_uncond): the data's velocity with model guidance (Eq. 69), `(B, *shape)`."""
    target, guidance = pair.x1 - inner.eps, pair.conditions.guidance
    if guidance is None:
        return target
    guided = (guidance > 1).nonzero().flatten()
    if not len(guided):  # one row with a factor of 0: under FSDP all ranks must call the model alike
        guided = guided.new_zeros(1)
    with_, without = pair.conditions.take(guided), torch.ones_like(guided, dtype=torch.bool)
    with torch.no_grad():
        s, x, t, x_t = (
            value[guided].repeat(2, *[1] * (value.dim() - 1)) for value in (inner.s, inner.x, pair.t, pair.x_t)
        )
        both = with_.cat(with_.drop(without, model.null_conditions))
        conditional, unconditional = model(s, s, x, t, x_t, both).chunk(2)
        shift = expand(1 - 1 / guidance[guided], x) * (conditional - unconditional)
        return target.index_add(0, guided, shift.to(target.dtype))


def asked_velocity(term: str, teacher: Teacher | None, s: Tensor, x: Tensor, pair: Pair) -> Tensor:
    """The teacher's GLASS velocity at (s, x), for a term that asks for it itself; ValueError without a teacher."""
    if teacher is None:
        raise ValueError(f"{term} needs a teacher")
    return teacher_velocity(teacher, s, x, pair.t, pair.x_t, pair.conditions)


class DataDiagonal(Term):
    """v_{s,s} regresses on x1 - eps, with model guidance where the pair has a scale above 1."""

    guides_data = noisy_target = pins_diagonal = True

    def target(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
        return guided_data_velocity(model, pair, inner)

    def __call__(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        target = self.target(model, pair, inner)
        return model(inner.s, inner.s, inner.x, pair.t, pair.x_t, pair.conditions) - target


class FlowMatching(DataDiagonal):
    """The base flow: v_{s,s}(I_s; 0, x_0) regresses on x1 - eps. The condition is pure noise, to be ignored."""

    base_flow_only = True

    def condition(self, pair: Pair) -> Pair:
        return Pair(pair.x1, torch.zeros_like(pair.t), torch.randn_like(pair.x1), pair.conditions)


class DistilledDiagonal(DataDiagonal):
    """v_{s,s} regresses on the GLASS velocity of the frozen, class-guided teacher."""

    needs_teacher = teacher_at_start = True
    guides_data = noisy_target = False

    def target(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
        return inner.at_start


class Consistency(Term):
    """Base of the consistency terms.

    Args:
        backend: how tangents are computed, a name in `mfm_lightning.tangents.BACKENDS`.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def __call__(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        k, parts = inner.num_equal, []
        if k:
            parts.append(self.diagonal(model, teacher, pair.take(slice(k)), inner.take(slice(k))))
        if k < len(inner.s):
            rest = slice(k, None)
            parts.append(self.residual(model, teacher, pair.take(rest), inner.take(rest)))
        return torch.cat(parts)

    def diagonal(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        """The residual at u = s; a term that needs no tangent there says so."""
        return self.residual(model, teacher, pair, inner)

    @abstractmethod
    def residual(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        """v_{s,u}(x) - sg(target) of an inner sample, `(B, *shape)`."""


class Semigroup(Consistency):
    """v_{s,u} = gamma v_{s,w} + (1-gamma) v_{w,u}(X_{s,w}),  w = s + gamma (u-s),  gamma ~ U(0, 1)."""

    def residual(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        s, u, x = inner.s, inner.u, inner.x
        condition = (pair.t, pair.x_t, pair.conditions)
        gamma = torch.rand_like(s)
        w = s + gamma * (u - s)
        with torch.no_grad():
            first = model(s, w, x, *condition)
            second = model(w, u, x + expand(w - s, x) * first, *condition)
            target = expand(gamma, x) * first + expand(1 - gamma, x) * second
        return model(s, u, x, *condition) - target


class _Lagrangian(Consistency):
    """d/du X_{s,u}(x) = v_{u,u}(X_{s,u}(x)), as v_{s,u} = sg(v_{u,u}(X_{s,u}) - (u-s) d/du v_{s,u})."""

    @abstractmethod
    def end_velocity(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, u: Tensor, x: Tensor) -> Tensor: ...

    def residual(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        s, u, x = inner.s, inner.u, inner.x
        along_u = (torch.zeros_like(s), torch.ones_like(u), torch.zeros_like(x))
        v, dv = velocity_and_jvp(model, s, u, x, pair.t, pair.x_t, along_u, pair.conditions, self.backend)
        gap = expand(u - s, x)
        with torch.no_grad():
            target = self.end_velocity(model, teacher, pair, u, x + gap * v) - gap * dv
        return v - target


class LagrangianSelf(_Lagrangian):
    """d/du X_{s,u}(x) = v_{u,u}(X_{s,u}(x)), the right side from the student's own diagonal."""

    def end_velocity(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, u: Tensor, x: Tensor) -> Tensor:
        return model(u, u, x, pair.t, pair.x_t, pair.conditions)


class LagrangianTeacher(_Lagrangian):
    """d/du X_{s,u}(x) = v_{u,u}(X_{s,u}(x)), the right side from the teacher's GLASS velocity.

    X_{s,s}(x) = x by construction, so that the equation has one solution: the teacher's flow map. As u -> s it gives
    v_{s,s}, whether or not samples with u = s are among them.
    """

    needs_teacher = pins_diagonal = True

    def end_velocity(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, u: Tensor, x: Tensor) -> Tensor:
        return asked_velocity("lagrangian_teacher", teacher, u, x, pair)


class _Eulerian(Consistency):
    """v_{s,u} = sg(v_s + (u-s) (d/ds v_{s,u} + grad v_{s,u} . v_s)), v_s the velocity at the start.

    With `alpha_steps` the derivative is at first a difference by an Euler step over a share alpha of the way to u,
    w = s + alpha (u-s):

        v_{s,u} = sg(v_s + (v_{w,u}(x + (w-s) v_s) - v_{s,u}) / alpha + v_{s,u} - v_{w,u}(x + (w-s) v_s)),

    which is v_{s,u} = v_s at alpha = 1 and the derivative at alpha -> 0 (alpha-Flow, Zhang et al., arXiv 2510.20771).
    Its error is of first order in alpha, and on data biased by the noise of v_s, too. Alpha falls from 1 to 0 by that
    paper's sigmoid, 1 / (1 + e^(25 (k / alpha_steps - 1/2))) at step k, with what is within 0.005 of an end put to it
    (0.05 in bfloat16). Between the ends there is no tangent, but one more evaluation; at 1 neither. Not of the paper:
    its weight alpha within the adaptive one, and its limit of the target.

    Args:
        backend: how tangents are computed.
        alpha_steps: of training, after which alpha is 0; 0 for the derivative from the first step.

    Raises:
        ValueError: for what is no number of steps.
    """

    def __init__(self, backend: str = "auto", alpha_steps: int = 0) -> None:
        super().__init__(backend)
        if not isinstance(alpha_steps, int) or alpha_steps < 0:
            raise ValueError(f"alpha_steps {alpha_steps!r} must be a whole number that is not negative")
        self.alpha_steps = alpha_steps

    def alpha(self, step: int, least: float = LEAST_ALPHA) -> float:
        """Of a training step: 0, 1, or between `least` and 1 - `least`."""
        if step >= self.alpha_steps:
            return 0.0
        found = 1 / (1 + math.exp(SHARPNESS * (step / self.alpha_steps - 0.5)))
        return found if least <= found <= 1 - least else float(round(found))

    @abstractmethod
    def start_velocity(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor: ...

    def residual(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        s, u, x = inner.s, inner.u, inner.x
        with torch.no_grad():
            start = self.start_velocity(model, pair, inner)
        if alpha := self.alpha(inner.step, least_alpha(x)):
            check_backend(self.backend, model)  # now, not where the derivative sets in
            return self._difference(model, pair, inner, start, alpha)
        along_s = (torch.ones_like(s), torch.zeros_like(u), start)
        v, dv = velocity_and_jvp(model, s, u, x, pair.t, pair.x_t, along_s, pair.conditions, self.backend)
        return v - (start + expand(u - s, x) * dv).detach()

    def _difference(self, model: MetaFlowMap, pair: Pair, inner: InnerSample, start: Tensor, alpha: float) -> Tensor:
        """The residual with a difference in place of the derivative; alpha in (0, 1]."""
        s, u, x = inner.s, inner.u, inner.x
        v = model(s, u, x, pair.t, pair.x_t, pair.conditions)
        if alpha == 1:
            return v - start
        with torch.no_grad():
            step = alpha * (u - s)
            later = model(s + step, u, x + expand(step, x) * start, pair.t, pair.x_t, pair.conditions)
            target = start + (1 / alpha - 1) * (later - v)
        return v - target

    def diagonal(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        with torch.no_grad():
            start = self.start_velocity(model, pair, inner)
        return model(inner.s, inner.s, inner.x, pair.t, pair.x_t, pair.conditions) - start


class EulerianSelf(_Eulerian):
    """v_{s,u} = sg(v_s + (u-s) (d/ds v_{s,u} + grad v_{s,u} . v_s)), v_s from the student's own diagonal.

    Args:
        backend: how tangents are computed.
        alpha_steps: of training, in which differences become the derivative (alpha-Flow, arXiv 2510.20771); 0 for none.
    """

    def start_velocity(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
        return model(inner.s, inner.s, inner.x, pair.t, pair.x_t, pair.conditions)


class EulerianTeacher(_Eulerian):
    """v_{s,u} = sg(v_s + (u-s) (d/ds v_{s,u} + grad v_{s,u} . v_s)), v_s from the teacher by GLASS.

    It pins the diagonal as `LagrangianTeacher` does.

    Args:
        backend: how tangents are computed.
        alpha_steps: of training, in which differences become the derivative (alpha-Flow, arXiv 2510.20771); 0 for none.
    """

    needs_teacher = teacher_at_start = pins_diagonal = True

    def start_velocity(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
        return inner.at_start


class ODETeacher(Consistency):
    """v_{s,u}(x) = (X_{s,u}(x) - x) / (u - s), X_{s,u} the teacher's GLASS flow from s to u, solved step by step.

    What knowledge distillation does to a one-step sampler (Luhman & Luhman, arXiv 2101.02388), for all s <= u: no
    derivative, and no bias by the network's own; 2 `steps` evaluations of the teacher. At u = s it is its velocity.

    Args:
        backend: of tangents, which are not needed.
        steps: of Heun between s and u, at least 1.

    Raises:
        ValueError: for less than one step.
    """

    needs_teacher = pins_diagonal = True

    def __init__(self, backend: str = "auto", steps: int = 4) -> None:
        super().__init__(backend)
        if steps < 1:
            raise ValueError(f"steps {steps} of ode_teacher must be at least 1")
        self.steps = steps

    @property
    def teacher_evaluations(self) -> int:
        return 2 * self.steps

    def residual(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        s, u, x = inner.s, inner.u, inner.x

        def velocity(share: Tensor, mean: Tensor) -> Tensor:
            """d/dr of the mean velocity r -> (X_{s, s + r (u-s)} - x) / (u-s): nothing divides by u - s."""
            state = x + expand(u - s, x) * mean
            return asked_velocity("ode_teacher", teacher, s + share * (u - s), state, pair).to(x.dtype)

        grid = [k / self.steps for k in range(self.steps + 1)]
        with torch.no_grad():
            target = integrate(velocity, torch.zeros_like(x), grid, "heun")
        return model(s, u, x, pair.t, pair.x_t, pair.conditions) - target

    def diagonal(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, inner: InnerSample) -> Tensor:
        target = asked_velocity("ode_teacher", teacher, inner.s, inner.x, pair)
        return model(inner.s, inner.s, inner.x, pair.t, pair.x_t, pair.conditions) - target


class MeanFlow(_Eulerian):
    """v_{s,u} = sg(v_s + (u-s) (d/ds v_{s,u} + grad v_{s,u} . v_s)), v_s = x1 - eps of the data, with model guidance
    (Eq. 69). The target is affine in v_s, so that its mean is that of `EulerianTeacher` with the exact velocity.

    Args:
        backend: how tangents are computed.
        alpha_steps: of training, in which differences become the derivative (alpha-Flow, arXiv 2510.20771); 0 for none.
            A difference is not affine in v_s.
    """

    guides_data = noisy_target = pins_diagonal = True

    def start_velocity(self, model: MetaFlowMap, pair: Pair, inner: InnerSample) -> Tensor:
        return guided_data_velocity(model, pair, inner)


TERMS: dict[str, type[Term]] = {
    "flow_matching": FlowMatching,
    "data_diagonal": DataDiagonal,
    "distilled_diagonal": DistilledDiagonal,
    "semigroup": Semigroup,
    "lagrangian_self": LagrangianSelf,
    "lagrangian_teacher": LagrangianTeacher,
    "eulerian_self": EulerianSelf,
    "eulerian_teacher": EulerianTeacher,
    "ode_teacher": ODETeacher,
    "mean_flow": MeanFlow,
}
