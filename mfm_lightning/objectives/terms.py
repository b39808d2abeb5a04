"""The terms of the objective (Eq. 33, Table 1), each a small object: student side, target, their difference.

Every term returns the residual `v_student - sg(target)`, `(B, *shape)`; how it is weighed and averaged is not its
business. `sg` is the stop-gradient: targets are computed without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mfm_lightning.interpolant import expand
from mfm_lightning.models import MetaFlowMap, velocity_and_jvp
from mfm_lightning.objectives.pairs import InnerTimes, Pair
from mfm_lightning.teachers import Teacher, teacher_velocity


class Term(Protocol):
    """A part of the objective. `needs_teacher`: raise before training where there is none."""

    needs_teacher: bool

    def __call__(self, model: MetaFlowMap, teacher: Teacher | None, pair: Pair, step: int) -> Tensor: ...


def guided_data_velocity(model: MetaFlowMap, s: Tensor, x: Tensor, pair: Pair, eps: Tensor) -> Tensor:
    """x1 - eps + (1 - 1/g) sg(v_cond - v_uncond): the data's velocity with model guidance (Eq. 69), `(B, *shape)`."""
    target = pair.x1 - eps
    if not (pair.guidance > 1).any():
        return target
    with torch.no_grad():
        conditional = model.velocity(s, s, x, pair.t, pair.x_t, pair.label, pair.guidance)
        unconditional = model.velocity(s, s, x, pair.t, pair.x_t)
    return target + expand(1 - 1 / pair.guidance, x) * (conditional - unconditional)


class FlowMatching:
    """The base flow: v_{s,s}(I_s; 0, x_0) regresses on x1 - eps. The condition is pure noise, to be ignored."""

    needs_teacher = False

    def __init__(self, times: InnerTimes | None = None) -> None:
        self.times = times or InnerTimes()

    def __call__(self, model, teacher, pair: Pair, step: int) -> Tensor:
        zero = torch.zeros_like(pair.t)
        pair = Pair(pair.x1, zero, torch.randn_like(pair.x1), pair.label, pair.guidance)
        return DataDiagonal(self.times)(model, teacher, pair, step)


class DataDiagonal:
    """v_{s,s} regresses on x1 - eps, with model guidance where the pair has a scale above 1."""

    needs_teacher = False

    def __init__(self, times: InnerTimes | None = None) -> None:
        self.times = times or InnerTimes()

    def __call__(self, model, teacher, pair: Pair, step: int) -> Tensor:
        s = self.times.one(len(pair.x1), pair.x1.device)
        eps, x = pair.inner_state(s)
        target = guided_data_velocity(model, s, x, pair, eps)
        return model.velocity(s, s, x, pair.t, pair.x_t, pair.label, pair.guidance) - target


class DistilledDiagonal:
    """v_{s,s} regresses on the GLASS velocity of the frozen, class-guided teacher."""

    needs_teacher = True

    def __init__(self, times: InnerTimes | None = None) -> None:
        self.times = times or InnerTimes()

    def __call__(self, model, teacher, pair: Pair, step: int) -> Tensor:
        s = self.times.one(len(pair.x1), pair.x1.device)
        _, x = pair.inner_state(s)
        target = teacher_velocity(teacher, s, x, pair.t, pair.x_t, pair.label, pair.guidance)
        return model.velocity(s, s, x, pair.t, pair.x_t, pair.label, pair.guidance) - target


class Consistency:
    """Base of the consistency terms: draws s <= u and the inner state.

    Args:
        times: inner times.
        backend: how tangents are computed, a name in `mfm_lightning.tangents.BACKENDS`.
    """

    needs_teacher = False

    def __init__(self, times: InnerTimes | None = None, backend: str = "auto") -> None:
        self.times, self.backend = times or InnerTimes(), backend

    def __call__(self, model, teacher, pair: Pair, step: int) -> Tensor:
        s, u = self.times.two(len(pair.x1), pair.x1.device, step)
        eps, x = pair.inner_state(s)
        k = self.times.num_equal(len(s))  # u = s in the first k
        parts = []
        if k:
            parts.append(self.diagonal(model, teacher, pair.take(slice(k)), s[:k], x[:k], eps[:k]))
        if k < len(s):
            parts.append(self.residual(model, teacher, pair.take(slice(k, None)), s[k:], u[k:], x[k:], eps[k:]))
        return torch.cat(parts)

    def diagonal(self, model, teacher, pair: Pair, s: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """The residual at u = s; a term that needs no tangent there says so."""
        return self.residual(model, teacher, pair, s, s, x, eps)

    def residual(self, model, teacher, pair: Pair, s: Tensor, u: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """v_{s,u}(x) - sg(target) at given times, inner state x and inner noise eps."""
        raise TypeError(f"{type(self).__name__} is a base class: use one of the named consistency terms")


class Semigroup(Consistency):
    """v_{s,u} = gamma v_{s,w} + (1-gamma) v_{w,u}(X_{s,w}),  w = s + gamma (u-s),  gamma ~ U(0, 1)."""

    def residual(self, model, teacher, pair, s, u, x, eps) -> Tensor:
        condition = (pair.t, pair.x_t, pair.label, pair.guidance)
        gamma = torch.rand_like(s)
        w = s + gamma * (u - s)
        with torch.no_grad():
            first = model.velocity(s, w, x, *condition)
            second = model.velocity(w, u, x + expand(w - s, x) * first, *condition)
            target = expand(gamma, x) * first + expand(1 - gamma, x) * second
        return model.velocity(s, u, x, *condition) - target


class _Lagrangian(Consistency):
    """d/du X_{s,u}(x) = v_{u,u}(X_{s,u}(x)), as v_{s,u} = sg(v_{u,u}(X_{s,u}) - (u-s) d/du v_{s,u})."""

    def residual(self, model, teacher, pair, s, u, x, eps) -> Tensor:
        v, dv = velocity_and_jvp(
            model, s, u, x, pair.t, pair.x_t, (torch.zeros_like(s), torch.ones_like(u), torch.zeros_like(x)),
            pair.label, pair.guidance, self.backend,
        )  # fmt: skip
        gap = expand(u - s, x)
        with torch.no_grad():
            target = self.end_velocity(model, teacher, pair, u, x + gap * v) - gap * dv
        return v - target


class LagrangianSelf(_Lagrangian):
    __doc__ = _Lagrangian.__doc__ + " The right side is the student's own diagonal."

    def end_velocity(self, model, teacher, pair, u, x) -> Tensor:
        return model.velocity(u, u, x, pair.t, pair.x_t, pair.label, pair.guidance)


class LagrangianTeacher(_Lagrangian):
    __doc__ = _Lagrangian.__doc__ + " The right side is the teacher's GLASS velocity."
    needs_teacher = True

    def end_velocity(self, model, teacher, pair, u, x) -> Tensor:
        return teacher_velocity(teacher, u, x, pair.t, pair.x_t, pair.label, pair.guidance)


class _Eulerian(Consistency):
    """v_{s,u} = sg(v_s + (u-s) (d/ds v_{s,u} + grad v_{s,u} . v_s)), v_s the velocity at the start."""

    def residual(self, model, teacher, pair, s, u, x, eps) -> Tensor:
        with torch.no_grad():
            start = self.start_velocity(model, teacher, pair, s, x, eps)
        v, dv = velocity_and_jvp(
            model, s, u, x, pair.t, pair.x_t, (torch.ones_like(s), torch.zeros_like(u), start),
            pair.label, pair.guidance, self.backend,
        )  # fmt: skip
        return v - (start + expand(u - s, x) * dv).detach()

    def diagonal(self, model, teacher, pair, s, x, eps) -> Tensor:
        with torch.no_grad():
            start = self.start_velocity(model, teacher, pair, s, x, eps)
        return model.velocity(s, s, x, pair.t, pair.x_t, pair.label, pair.guidance) - start


class EulerianSelf(_Eulerian):
    __doc__ = _Eulerian.__doc__ + " From the student's own diagonal."

    def start_velocity(self, model, teacher, pair, s, x, eps) -> Tensor:
        return model.velocity(s, s, x, pair.t, pair.x_t, pair.label, pair.guidance)


class EulerianTeacher(_Eulerian):
    __doc__ = _Eulerian.__doc__ + " From the teacher by GLASS."
    needs_teacher = True

    def start_velocity(self, model, teacher, pair, s, x, eps) -> Tensor:
        return teacher_velocity(teacher, s, x, pair.t, pair.x_t, pair.label, pair.guidance)


class MeanFlow(_Eulerian):
    __doc__ = _Eulerian.__doc__ + " From the data: x1 - eps, with model guidance (Eq. 69)."

    def start_velocity(self, model, teacher, pair, s, x, eps) -> Tensor:
        return guided_data_velocity(model, s, x, pair, eps)


TERMS: dict[str, Callable[..., Term]] = {
    "flow_matching": FlowMatching,
    "data_diagonal": DataDiagonal,
    "distilled_diagonal": DistilledDiagonal,
    "semigroup": Semigroup,
    "lagrangian_self": LagrangianSelf,
    "lagrangian_teacher": LagrangianTeacher,
    "eulerian_self": EulerianSelf,
    "eulerian_teacher": EulerianTeacher,
    "mean_flow": MeanFlow,
}
