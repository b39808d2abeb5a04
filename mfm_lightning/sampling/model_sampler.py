"""How samples are drawn from a model, for commands and configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import randn
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.samplers import METHODS, sample_ode, sample_refinement
from mfm_rewards.execution import Precision, autocast, check_precision

KINDS = ("refinement", "ode", "flow_map")
BY_MODEL = {"base_flow": ("ode", 250), "flow_map": ("flow_map", 4), "meta_flow_map": ("refinement", 4)}


@dataclass
class ModelSampler:
    """Samples of a Meta Flow Map or its base flow.

    Args:
        kind: "refinement" (Algorithm 1), "ode" (the base flow's), or "flow_map" (steps of X_{s,u} without condition, as
            of a DMF).
        steps: K refinements, Euler steps, or flow-map steps.
        method: of the ODE: "euler" or "heun".
        guidance: class-guidance scale fed to the network; None for none.
        precision: of the network, "fp32", "bf16" or "fp16"; states stay float32.

    Raises:
        ValueError: for an unknown kind, method or precision, or no steps.
    """

    kind: str = "refinement"
    steps: int = 4
    method: str = "euler"
    guidance: float | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown sampler {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.steps < 1:
            raise ValueError(f"steps ({self.steps}) must be at least 1")
        check_precision(self.precision)

    def check(self, model: MetaFlowMap, labels: Sequence[int]) -> None:
        """Raise ValueError, before any work, if the model does not know the guidance scale or a label."""
        model.check(Conditions(label=torch.tensor(labels), guidance=self.guidance))

    @torch.no_grad()
    def __call__(self, model: MetaFlowMap, label: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples `(B, *shape)`, float32, of labels `(B,)`, each from its own generator."""
        device = model.device
        given = Conditions(label=label, guidance=self.guidance).expand(len(label), device)
        x0 = randn((len(label), *model.state_shape), torch.empty(0, device=device), generators)
        with autocast(device, self.precision):
            if self.kind == "refinement":
                return sample_refinement(model, x0, self.steps, given, generators)
            if self.kind == "flow_map":
                zero = torch.zeros_like(x0)
                return model.sample_posterior(zero, 0.0, 1, self.steps, x0[:, None], given)[:, 0]
            return sample_ode(lambda t, x: model.drift(t, x, given), x0, self.steps, self.method)
