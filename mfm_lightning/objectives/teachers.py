"""Frozen base drifts that a Meta Flow Map is distilled from: a trained model, or an exact oracle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from mfm_lightning.checkpoints import find_weights, fingerprint, load_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.glass import glass_velocity
from mfm_lightning.interpolant import Times, as_times, expand
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.oracles import EmpiricalDistribution, Oracle
from mfm_rewards.execution import Precision, autocast, check_precision


class Teacher(ABC):
    """What objectives ask of a teacher. `identity` names it in checkpoints, which never hold its weights."""

    identity: dict[str, str]
    state_shape: tuple[int, ...]

    @abstractmethod
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """Guided b_t(x), `(B, *shape)`; with a guidance scale of 1, or none: conditional, no guidance."""

    @abstractmethod
    def to(self, device: torch.device) -> Teacher:
        """Move what is frozen to a device."""


def teacher_velocity(
    teacher: Teacher, s: Times, x_s: Tensor, t: Times, x_t: Tensor, conditions: Conditions | None = None
) -> Tensor:
    """GLASS velocity (Eq. 32) of a teacher's guided drift. Drift and velocity are affine in each other, with the same
    coefficients for all conditions, so guiding the one guides the other."""
    return glass_velocity(lambda time, x: teacher.drift(time, x, conditions), s, x_s, t, x_t)


class ModelTeacher(Teacher):
    """A trained Meta Flow Map's base flow, class-guided as b_null + g (b_cond - b_null).

    Args:
        model: the frozen model.
        omega: the model guidance that it was trained with: its conditional drift is un-guided first, as
            (1-omega) b_cond + omega b_null.
        identity: for checkpoints.
        precision: "fp32", "bf16" or "fp16", whatever the student has; as the student where None. In bf16 its drift has
            an error of about 1 %.
    """

    def __init__(
        self,
        model: MetaFlowMap,
        omega: float = 0.0,
        identity: dict[str, str] | None = None,
        precision: Precision | None = None,
    ) -> None:
        if not 0 <= omega < 1:
            raise ValueError(f"omega {omega} must lie in [0, 1)")
        if precision is not None:
            check_precision(precision)
        self.precision: Precision | None = precision
        self.model = model.eval().requires_grad_(False)
        self.omega = omega
        self.identity = identity or {"kind": "model"}
        self.state_shape = model.state_shape

    def to(self, device: torch.device) -> ModelTeacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        t, null = as_times(t, x), self.model.null_conditions
        given = (conditions or Conditions()).filled(null).expand(len(x), x.device)
        guidance = 1.0 if given.guidance is None else given.guidance
        # g = 1 asks for the conditional drift as it is without model guidance
        scale = as_times(guidance, x) * (1 - self.omega)
        # at a scale of 1 the unconditional drift cancels, and without a condition the two are one
        pairs = (~given.is_null(null) & ((scale - 1).abs() > 1e-6)).nonzero().flatten()
        plain = replace(given, guidance=None, prompts=None)
        dropped = plain.take(pairs).drop(torch.ones_like(pairs, dtype=torch.bool), null)
        drifts = self._plain(torch.cat([t, t[pairs]]), torch.cat([x, x[pairs]]), plain.cat(dropped))
        drift, unconditional = drifts[: len(x)], drifts[len(x) :]
        more = expand(scale[pairs] - 1, x) * (drift[pairs] - unconditional)
        return drift.index_add(0, pairs, more.to(drift.dtype))

    def _plain(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        if self.precision is None:
            return self.model.drift(t, x, conditions)
        with autocast(x.device, self.precision):
            return self.model.drift(t, x, conditions).to(x.dtype)


class CheckpointTeacher(ModelTeacher):
    """`ModelTeacher` of a file that `mfm fit` exported, referenced in checkpoints by path and SHA-256.

    Args:
        path: a `model.safetensors`, a name ("mnist/flow") or a Hugging Face id.
        omega: the model guidance that it was trained with; 0 for none.
        precision: "fp32", "bf16" or "fp16", whatever the student has; as the student where None.

    Raises:
        FileNotFoundError: if there is no such file; fit the base flow first.
    """

    def __init__(self, path: str, omega: float = 0.0, precision: Precision | None = None) -> None:
        file = find_weights(path, "teacher", "fit the base flow first (e.g. configs/digits/flow.yaml)")
        identity = {"kind": "model", "path": path, "sha256": fingerprint(file)}
        super().__init__(load_model(file), omega, identity, precision)


class OracleTeacher(Teacher):
    """An exact distribution as teacher.

    Args:
        oracle: a distribution of `mfm_lightning.oracles`.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.identity = {"kind": "oracle", "class": type(oracle).__name__}
        self.state_shape = oracle.state_shape

    def to(self, device: torch.device) -> OracleTeacher:
        if isinstance(self.oracle, EmpiricalDistribution):
            self.oracle = self.oracle.to(device)
        return self

    @torch.no_grad()
    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        conditional = self.oracle.drift(t, x, conditions)
        if conditions is None or conditions.label is None or conditions.guidance is None or not self.oracle.num_classes:
            return conditional
        unconditional = self.oracle.drift(t, x)
        rows = conditions.expand(len(x), x.device).guidance
        scale = expand(as_times(1.0 if rows is None else rows, x), x)
        return unconditional + scale * (conditional - unconditional)
