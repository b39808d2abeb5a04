"""MFM-FT (arXiv 2601.14430, Eq. 43), by the package's own objective: off-policy, one posterior draw a state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_benchmarks.finetuning.method import FineTuning
from mfm_benchmarks.finetuning.problem import Problem
from mfm_lightning.alignment.method import positive
from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import interpolate
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules.finetuning import DiffusionSchedule
from mfm_lightning.modules.normaliser import SLOTS, LogNormaliser, prompt_slots
from mfm_lightning.objectives import ConditionTimes
from mfm_lightning.objectives.finetuning import GRADIENTS, regress
from mfm_rewards import Reward


@dataclass
class MFMFineTuning(FineTuning):
    """What `mfm_lightning.modules.RewardFinetuning` trains on, with its fields: the policy regresses on the drift of
    the distribution that is tilted by e^r, r the scaled reward. The scale is what holds it near the base flow.

    Args:
        gradient: "reward": of the reward through the draws; "free": without.
        batch_size: states of a step.
        num_draws: posterior draws for each state.
        policy_share: share of the states from samples of the policy, in [0, 1]; the rest is data. All are of the
            policy where there are no data.
        buffer_size: samples of the policy that are kept.
        refresh_every: steps between two renewals of the buffer.
        ode_steps: Euler steps of the policy's samples.
        times: outer times of the states; uniform where None.
        half_diffusion: sigma^2/2 by t.
        posterior: source of draws; one step of the flow map where None.
        normaliser_rate: of the running log E[e^r], by class or prompt.

    Raises:
        ValueError: for an unknown gradient or a number out of range.
    """

    gradient: str = "reward"
    batch_size: int = 64
    num_draws: int = 1
    policy_share: float = 0.5
    buffer_size: int = 256
    refresh_every: int = 25
    ode_steps: int = 10
    times: ConditionTimes | None = None
    half_diffusion: DiffusionSchedule = field(default_factory=DiffusionSchedule)
    posterior: Posterior | None = None
    normaliser_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.gradient not in GRADIENTS:
            raise ValueError(f"unknown gradient {self.gradient!r}: expected one of {', '.join(GRADIENTS)}")
        if not 0 <= self.policy_share <= 1:
            raise ValueError(f"policy_share {self.policy_share} must be in [0, 1]")
        positive(
            batch_size=self.batch_size, num_draws=self.num_draws, buffer_size=self.buffer_size,
            refresh_every=self.refresh_every, ode_steps=self.ode_steps,
        )  # fmt: skip

    @property
    def differentiates(self) -> bool:
        return self.gradient == "reward"

    def check(self, reward: Reward, data: bool, model: object = None) -> None:
        super().check(reward, data, model)
        posterior, is_map = self.posterior or FlowMapPosterior(), model is None or isinstance(model, MetaFlowMap)
        has_map = is_map or hasattr(model, "base_flow_map")
        if (posterior.needs_meta_flow_map and not is_map) or (posterior.needs_flow_map and not has_map):
            raise CheckpointError(
                f"a {type(posterior).__name__} draws from a Meta Flow Map, and a {type(model).__name__} is none: give "
                "an adapter's file (flow.mfm), or the method a GlassPosterior"
            )

    def losses(self, problem: Problem) -> Iterator[Tensor]:
        times = self.times or ConditionTimes(power=1.0, zero_rate=0.0)
        posterior = self.posterior or FlowMapPosterior()
        # by class, or by prompt; one for all where there is neither
        classes = max(getattr(problem.policy, "num_classes", 0), SLOTS)
        normaliser = LogNormaliser(classes, self.normaliser_rate).to(problem.device)
        for x1, conditions in self._states(problem):
            t = times.sample(len(x1), x1.device)
            x = interpolate(t, torch.randn_like(x1), x1)
            label = _classes(conditions, t)
            target, half = problem.target(conditions), self.half_diffusion(t)
            with torch.no_grad():
                base = target.drift(t, x)
            found = regress(
                target, t, x, base, lambda given=conditions, t=t, x=x: problem.on_policy(given).drift(t, x), half,
                self.half_diffusion.clamped(t), posterior, self.num_draws,
                lambda r, label=label: normaliser(r, label), self.gradient,
            )  # fmt: skip
            yield found.errors.mean()
            normaliser.update(found.tilt.rewards.flatten(), label.repeat_interleave(self.num_draws))

    def _states(self, problem: Problem) -> Iterator[tuple[Tensor, Conditions]]:
        """Clean states and their conditions, a batch each: data, and samples of the policy from a buffer."""
        B, step = self.batch_size, 0
        k = B if problem.data is None else round(self.policy_share * B)
        buffer, made_for = torch.empty(0), Conditions()
        while True:
            parts = []
            if k:
                if step % self.refresh_every == 0:
                    made_for = problem.draw(self.buffer_size).expand(self.buffer_size, problem.device)
                    buffer = problem.sample(made_for, self.buffer_size, self.ode_steps)
                pick = torch.randint(len(buffer), (k,), device=buffer.device)
                parts.append((buffer[pick], made_for.take(pick).expand(k)))
            if k < B and problem.data is not None:
                x1, given = problem.data(B - k)
                parts.append((x1, given.expand(len(x1), x1.device)))
            step += 1
            (x1, conditions), *more = parts
            for x, given in more:
                x1, conditions = torch.cat([x1, x]), conditions.cat(given)
            yield x1, conditions


def _classes(conditions: Conditions, t: Tensor) -> Tensor:
    """What the normaliser tells samples apart by, `(B,)`."""
    if conditions.label is not None:
        return conditions.label
    if conditions.prompts is not None:
        return prompt_slots(conditions.prompts).to(t.device).expand(len(t))
    return torch.zeros_like(t, dtype=torch.long)
