"""The training of MFM-FT (paper, Eq. 43), whatever the policy is: a network, or a text-to-image flow with a LoRA."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.target import Target, require_gradient
from mfm_lightning.alignment.values import effective_sample_size
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.interpolant import diffusion, randn, sample_generators
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.normaliser import LogNormaliser
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.objectives import ConditionTimes, Pair
from mfm_lightning.objectives.finetuning import GRADIENTS, Regression, control_cost, regress
from mfm_rewards import Reward
from mfm_rewards.composition import parts_of_rewards


@dataclass
class DiffusionSchedule:
    """sigma^2/2 of the objective: (1-t)/t, clamped (Eq. 14), or a constant.

    Args:
        max_value: the clamp, positive. Below t = 1 / (1 + max_value), where it acts, (sigma^2/2) grad e^r is taken
            unclamped, in the gradient-free form.
        constant: taken in place of (1-t)/t (the release: 100, as its sigma^2 = 200); the fixed point is then
            b + constant grad V, no longer the tilted distribution's flow. None for (1-t)/t.

    Raises:
        ValueError: unless both are positive.
    """

    max_value: float = 25.0
    constant: float | None = None

    def __post_init__(self) -> None:
        if self.max_value <= 0 or (self.constant is not None and self.constant <= 0):
            raise ValueError(f"half_diffusion max_value {self.max_value} and constant {self.constant} must be positive")

    def __call__(self, t: Tensor) -> Tensor:
        return diffusion(t, self.max_value) if self.constant is None else torch.full_like(t, self.constant)

    def clamped(self, t: Tensor) -> Tensor:
        """Whether sigma^2/2 is less than the (1-t)/t that is meant, `(B,)`."""
        return (t * self.max_value < 1 - t) & (self.constant is None)


class TiltedTraining(TrainingModule):
    """Base class: a policy is trained on Eq. 43; base, source of draws and reward are frozen.

    Among what is logged, `control_cost` is the mean of `mfm_lightning.objectives.finetuning.control_cost` over the
    states that are trained on. With uniform `times` that is KL(base || policy) where they come from data. Where they
    are the policy's own samples, it is KL(policy || base), once the policy is near its optimum. Of a mix it is neither.
    `reward/NAME` are the parts of a combined reward.

    Args:
        gradient: "reward": of the reward through the draws; "free": for black-box rewards.
        times: outer times t of the states.
        half_diffusion: sigma^2/2 by t.
        num_draws: posterior draws for each state.
        posterior: source of draws; one step of the flow map where None.
        normaliser: of the weights e^r, by class.
        optimization: as `TrainingModule`.
        evaluation: as `TrainingModule`.

    Raises:
        ValueError: for an unknown gradient, no draws, or draws without the gradient that is wanted.
    """

    exported_kind = "base_flow"
    measures_at_validation = True
    identity: dict[str, Any]  # of what is frozen

    def __init__(
        self,
        gradient: str,
        times: ConditionTimes | None,
        half_diffusion: DiffusionSchedule | None,
        num_draws: int,
        posterior: Posterior | None,
        normaliser: LogNormaliser,
        optimization: Optimization | None,
        evaluation: Evaluation | None,
    ) -> None:
        super().__init__(optimization, evaluation)
        if gradient not in GRADIENTS:
            raise ValueError(f"unknown gradient {gradient!r}: expected one of {', '.join(GRADIENTS)}")
        if num_draws < 1:
            raise ValueError(f"num_draws {num_draws} must be at least 1")
        self.gradient, self.num_draws = gradient, num_draws
        self.times = times or ConditionTimes(power=1.0, zero_rate=0.0)
        self.half_diffusion = half_diffusion or DiffusionSchedule()
        self.posterior = posterior or FlowMapPosterior()
        if gradient == "reward" and not getattr(self.posterior, "differentiable", True):
            raise ValueError(
                f"draws of a {type(self.posterior).__name__} have no gradient: take gradient 'free' with them, or "
                "another posterior"
            )
        self.normaliser = normaliser
        self._seen: list[tuple[Tensor, Tensor]] = []  # rewards and classes that the normaliser has yet to take in

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def noised(self, x1: Tensor, conditions: Conditions) -> Pair:
        """Training states of data, with all that base, policy and reward are conditioned on."""

    @abstractmethod
    def drawing(self, conditions: Conditions) -> Target:
        """What draws come from and is paid for them."""

    @abstractmethod
    def base_drift(self, pair: Pair) -> Tensor:
        """b_t(x_t) `(B, *shape)`."""

    @abstractmethod
    def policy_drift(self, pair: Pair) -> Tensor:
        """b_theta(t, x_t) `(B, *shape)`."""

    @abstractmethod
    def classes(self, pair: Pair) -> Tensor:
        """What the normaliser tells samples apart by, `(B,)`."""

    @abstractmethod
    def sample_base(self, noise: Tensor, conditions: Conditions | None = None, steps: int = ...) -> Tensor:
        """Euler samples of the base flow's ODE from noise `(B, *shape)`."""

    @abstractmethod
    def sample_policy(self, noise: Tensor, conditions: Conditions | None = None, steps: int = ...) -> Tensor:
        """The same of the policy's."""

    def check_reward(self, reward: Reward) -> None:
        """Raise RewardError if the gradient is the reward's, and it has none."""
        if self.gradient == "reward":
            require_gradient(reward, "fine-tuning with gradient 'reward'")

    @property
    def trained(self) -> nn.Module:
        return cast(nn.Module, self.policy)  # which a subclass sets

    @property
    def frozen(self) -> dict[str, Any]:
        return self.identity

    # -- training ------------------------------------------------------------------------------------------------------

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for rewards, classes in self._seen:  # with the step, so that an interrupted one leaves no trace
            self.normaliser.update(rewards, classes)
        self._seen.clear()

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        pair = self.noised(x1, conditions)
        half, classes = self.half_diffusion(pair.t), self.classes(pair)
        with torch.no_grad():
            base = self.base_drift(pair)
        target, parts = self.drawing(pair.conditions), {}
        with parts_of_rewards(parts):
            found = regress(
                target, pair.t, pair.x_t, base, lambda: self.policy_drift(pair), half,
                self.half_diffusion.clamped(pair.t), self.posterior, self.num_draws,
                lambda rewards: self.normaliser(rewards, classes), self.gradient,
            )  # fmt: skip
        if training:
            both = found.tilt.rewards, classes[:, None].expand_as(found.tilt.rewards).contiguous()
            rewards, every = self.all_gather(both)
            self._seen.append((rewards.flatten(), every.flatten()))
        each = {f"reward/{name}": values.float().mean() for name, values in parts.items()}
        account = self._account(target.reward_scale, classes, half, base, found)
        return {"loss": found.errors.mean(), **account, **each}

    @torch.no_grad()
    def _account(
        self, scale: float, classes: Tensor, half: Tensor, base: Tensor, found: Regression
    ) -> dict[str, Tensor]:
        policy, tilt, terms = found.policy.detach(), found.tilt, found.terms
        norms = torch.stack([term.flatten(1).norm(dim=1).mean() for term in terms])
        change = (policy - base).flatten(1).square().sum(dim=1)
        normaliser = self.normaliser(tilt.rewards, classes)
        log_weights = (tilt.rewards - normaliser[:, None]).flatten()
        return {
            "reward": (tilt.rewards / scale if scale else tilt.rewards).mean(),
            "control_cost": control_cost(base, policy, half).mean(),
            "relative_change": change.mean() / base.flatten(1).square().sum(dim=1).mean(),
            **{f"share/{name}": n / norms.sum() for name, n in zip(("base", "weight", "reward"), norms, strict=True)},
            "ess": effective_sample_size(log_weights, dim=0) / len(log_weights),
            "log_normaliser": normaliser.mean(),
        }

    # -- samples -------------------------------------------------------------------------------------------------------

    def predicts(self) -> bool:
        return True

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        """Write samples of base and policy for a batch's conditions, from the same noise, each sample's own, to
        `predict/`."""
        if (left := self.predicted.left(batch, batch_idx)) is None:
            return
        x1, given = left
        conditions, index = Conditions.of_batch(given), given[INDEX]
        noise = randn(x1.shape, x1, sample_generators(0, index.tolist()))
        samples = {
            "base": self.sample_base(noise, conditions),
            "policy": self.sample_policy(noise, conditions),
        }
        if conditions.label is not None:
            samples["label"] = conditions.label
        self.predicted.folder.write(index, samples)
