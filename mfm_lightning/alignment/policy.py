"""Samples of a fine-tuned policy, beside the methods of inference time."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_lightning.alignment.method import AlignmentMethod, positive
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import load_model
from mfm_lightning.interpolant import Generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.samplers import sample_ode


class PolicySampling(AlignmentMethod):
    """The plain ODE of a fine-tuned policy: aligned by its weights, at the cost of ordinary sampling.

    Args:
        policy: the model; or the `model.safetensors` that fitting `RewardFinetuning` exported, or its Hugging Face id.
        steps: Euler steps.
    """

    def __init__(self, policy: MetaFlowMap | str, steps: int = 50) -> None:
        positive(steps=steps)
        policy = load_model(policy) if isinstance(policy, str) else policy
        self.policy, self.steps = policy.eval().requires_grad_(False), steps

    @torch.no_grad()
    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        target = target.expand(x0)
        run, policy = Run(target, "policy", steps=self.steps), target.with_drift(self.policy.to(x0.device).drift)
        return run.finish(sample_ode(policy.drift, x0, self.steps))
