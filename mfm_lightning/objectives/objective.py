"""L = L_diag + L_cons (Eq. 33): named terms with their weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.objectives.pairs import InnerSample, InnerTimes, Pair, PairSampler
from mfm_lightning.objectives.teachers import Teacher, teacher_velocity
from mfm_lightning.objectives.terms import TERMS, Consistency, Term
from mfm_lightning.tangents import get_backend
from mfm_lightning.utils.names import nearest


@dataclass
class WeightedTerm:
    """A term of the objective by name, and how much it counts.

    Args:
        name: a key of `mfm_lightning.objectives.TERMS`, or the path of a `Term` of your own, such as my_terms.MyTerm.
        p: power of the adaptive weight 1 / (|residual|^2 + c)^p (Eq. 73); 0 for none. Where None: 0 for terms on data
            (flow_matching, data_diagonal, mean_flow), 1 for all others. On data p > 0 draws the minimiser away from
            the mean of the target x1 - eps, which is the velocity, towards its mode: the weight counts a sample for
            less, the further it is from the prediction. The paper's recipe on ImageNet has p > 0 on data, too.
        c: of the adaptive weight, positive.
        clip: coordinates of the residual whose size is above it count linearly (a Huber loss), so that its gradient is
            that of the residual clipped: sCM's clipped tangent (Lu & Song, arXiv 2410.11081, Section 4.1). That paper's
            normalised tangent is p = 0.5. No clipping where None.
        weight: factor of the term.
        start_step: steps of training before the term sets in (e.g. a diagonal-only warm-up).
        options: arguments of the term by name, such as `steps` of ode_teacher or `alpha_steps` of the Eulerian
            ones; those of a term of your own.

    Raises:
        ValueError: for an unknown name, options that the term does not take, or a clip that is not positive.
    """

    name: str
    p: float | None = None
    c: float = 0.01
    clip: float | None = None
    weight: float = 1.0
    start_step: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip {self.clip} of {self.name!r} must be positive; leave it out for none")
        taken = [name for name in signature(self.kind).parameters if name != "backend"]  # refuses an unknown name, too
        if self.name in TERMS and (unknown := [name for name in self.options if name not in taken]):
            has = f"has the options {', '.join(taken)}" if taken else "has no options"
            raise ValueError(f"objective {self.name!r} {has}, got {', '.join(unknown)}")

    @cached_property
    def kind(self) -> type[Term]:
        """The class that the name stands for."""
        if self.name in TERMS:
            return TERMS[self.name]
        module, _, attribute = self.name.rpartition(".")
        if not module:
            meant = nearest(self.name, TERMS)
            hint = f"did you mean {meant!r}? " if meant else ""
            raise ValueError(
                f"unknown objective {self.name!r}: {hint}expected one of {', '.join(TERMS)}, or the path of a Term"
            )
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"objective {self.name!r} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Term)):
            raise ValueError(f"objective {self.name!r} is no subclass of mfm_lightning.objectives.Term")
        return found

    def build(self, backend: str) -> Term:
        """The term; a consistency term takes the objective's tangent `backend`."""
        kind = self.kind
        settings = {"backend": backend, **self.options} if issubclass(kind, Consistency) else self.options
        try:
            return kind(**settings)
        except TypeError as error:
            raise ValueError(f"objective {self.name!r}: {error}") from error

    @property
    def power(self) -> float:
        """p, or what stands for None."""
        return (0.0 if self.kind.noisy_target else 1.0) if self.p is None else self.p


def squared_error(residual: Tensor, clip: float | None = None) -> Tensor:
    """Sum over the state's dimensions, `(B, *shape) -> (B,)`, in float32.

    Args:
        residual: `(B, *shape)`.
        clip: size of a coordinate above which it counts linearly, by the slope that the square has there.
    """
    flat = residual.float().flatten(1)
    if clip is None:
        return flat.square().sum(dim=1)
    return 2 * torch.nn.functional.huber_loss(flat, torch.zeros_like(flat), reduction="none", delta=clip).sum(dim=1)


def adaptive_loss(error: Tensor, p: float, c: float = 0.01) -> Tensor:
    """error / sg(error + c)^p (Eq. 73), `(B,)`."""
    return error / (error.detach() + c) ** p


@dataclass
class Objective:
    """A sum of weighted terms on pairs drawn from data.

    Args:
        terms: the terms and their weights.
        pairs: how noisy states are drawn from data.
        inner_times: how inner times are drawn.
        backend: how tangents are computed, a name in `mfm_lightning.tangents.BACKENDS`.
        share_inner: all terms look at one inner sample, so that the teacher is evaluated once for the diagonal and the
            consistency term. The diagonal's times are then those of the consistency term, the smaller of two draws.

    Attributes:
        built_terms: the objects that `terms` name, in their order.

    Raises:
        ValueError: for no term, an unknown tangent backend, no term at the first step, or consistency terms with
            nothing that pins the diagonal as long as they train: semigroup, lagrangian_self and eulerian_self hold for
            the flow map of any velocity, so that a constant map has loss 0. flow_matching pins them only where
            all condition times are 0.
    """

    terms: list[WeightedTerm] = field(
        default_factory=lambda: [WeightedTerm("distilled_diagonal"), WeightedTerm("eulerian_teacher")]
    )
    pairs: PairSampler = field(default_factory=PairSampler)
    inner_times: InnerTimes = field(default_factory=InnerTimes)
    backend: str = "auto"
    share_inner: bool = False

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("an objective needs at least one term")
        get_backend(self.backend)
        self.built_terms = [term.build(self.backend) for term in self.terms]
        self._check_pinned()

    def _check_pinned(self) -> None:
        active = [(t, term) for t, term in zip(self.terms, self.built_terms, strict=True) if t.weight > 0]
        if not any(settings.start_step <= 0 for settings, _ in active):
            raise ValueError("no term trains at the first step: one needs start_step 0 and a weight above 0")
        at_zero = self.pairs.condition_times.always_zero
        pinning = [t.start_step for t, term in active if term.pins_diagonal and (at_zero or not term.base_flow_only)]
        first = min(pinning, default=None)
        for settings, term in active:
            if not term.pins_diagonal and (first is None or first > settings.start_step):
                others = [name for name, kind in TERMS.items() if kind.pins_diagonal and not kind.base_flow_only]
                raise ValueError(
                    f"nothing pins the diagonal v_(s,s) when {settings.name!r} starts to train (step "
                    f"{settings.start_step}), and a constant map satisfies it: add one of {', '.join(others)}, with a "
                    "weight above 0, that starts no later; a term of your own that pins it has pins_diagonal = True"
                )

    @property
    def needs_teacher(self) -> list[str]:
        """Names of the terms that need a teacher."""
        return [t.name for t, term in zip(self.terms, self.built_terms, strict=True) if term.needs_teacher]

    @property
    def base_flow_only(self) -> bool:
        """Whether nothing trains the condition (t, x_t), so that the result draws no posteriors."""
        return all(term.base_flow_only for term in self.built_terms)

    def __call__(
        self, model: MetaFlowMap, teacher: Teacher | None, x1: Tensor, conditions: Conditions, step: int = 0
    ) -> dict[str, Tensor]:
        """Loss of each active term and their weighted sum under "loss", of squared errors that are sums over a state's
        coordinates; `error/NAME` is the error without its weight, and "mse" the mean of errors a coordinate.

        Args:
            model: that is trained.
            teacher: for the terms that need one.
            x1: data `(B, *shape)`.
            conditions: of the data, a row for each sample or one for all.
            step: training step, for warm-up and annealing.
        """
        pair = self.pairs.sample(x1, conditions, model.null_conditions)
        results: dict[str, Tensor] = {}
        total = torch.zeros((), device=x1.device)
        shared = self._draw(pair, two=True, step=step) if self.share_inner else None
        for settings, term in zip(self.terms, self.built_terms, strict=True):
            if step < settings.start_step:
                continue
            residual = self.residual(term, model, teacher, pair, step, shared)
            error = squared_error(residual, settings.clip)
            key = settings.name.rpartition(".")[2]
            results[key] = adaptive_loss(error, settings.power, settings.c).mean()
            results[f"error/{key}"] = squared_error(residual.detach()).mean()
            total = total + settings.weight * results[key]
        errors = [error for name, error in results.items() if name.startswith("error/")]
        return {"loss": total, "mse": torch.stack(errors).mean() / x1[0].numel(), **results}

    def residual(
        self,
        term: Term,
        model: MetaFlowMap,
        teacher: Teacher | None,
        pair: Pair,
        step: int = 0,
        shared: InnerSample | None = None,
    ) -> Tensor:
        """A term's residual `(B, *shape)` on an inner sample of its own, or on one that is `shared`."""
        own = term.condition(pair)
        # a term that looks at other conditions has nothing to share
        inner = shared if shared is not None and own is pair else self._draw(own, isinstance(term, Consistency), step)
        if term.teacher_at_start and inner.teacher_velocity is None:
            if teacher is None:
                raise ValueError("this objective needs a teacher")
            inner.teacher_velocity = teacher_velocity(teacher, inner.s, inner.x, own.t, own.x_t, own.conditions)
        return term(model, teacher, own, inner)

    def _draw(self, pair: Pair, two: bool, step: int) -> InnerSample:
        num, device = len(pair.x1), pair.x1.device
        if not two:
            return pair.inner(self.inner_times.one(num, device), step=step)
        return pair.inner(*self.inner_times.two(num, device, step), self.inner_times.num_equal(num), step)
