"""The alignment methods with their settings, as objects that a config can name; each calls the function of its file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_lightning.alignment.best_of_n import best_of_n
from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.search import SELECTIONS, search, search_times
from mfm_lightning.alignment.smc import TRANSITIONS, check_particles, feynman_kac, twisted_smc
from mfm_lightning.alignment.steering import DYNAMICS, steer, time_grid
from mfm_lightning.alignment.target import Target, require_gradient
from mfm_lightning.alignment.values import DenoisedValue, DPSGradient, DrawGradient, GradientEstimator, ValueEstimator
from mfm_lightning.checkpoints import load_model
from mfm_lightning.interpolant import randn
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.samplers import sample_ode
from mfm_rewards import Reward


class AlignmentMethod(ABC):
    """Aligned samples from noise.

    Attributes:
        uses_reward_scale: whether the result depends on the reward's multiplier; not where only the order of rewards
            counts.
    """

    uses_reward_scale: bool = True

    @property
    def needs_reward_gradient(self) -> bool:
        return False

    def check(self, reward: Reward) -> None:
        """Raise RewardError, before any work, if the reward does not give what the method needs."""
        if self.needs_reward_gradient:
            require_gradient(reward, type(self).__name__)

    @abstractmethod
    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult: ...


@dataclass
class TimeGrid:
    """Times of a sampler: see `alignment.time_grid`."""

    steps: int = 100
    start: float = 0.01
    end: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        self.times = time_grid(self.steps, self.start, self.end, self.power)


@dataclass
class Steering(AlignmentMethod):
    """The steered ODE or SDE: see `alignment.steer`. With strength 0 it is the base sampler."""

    estimator: GradientEstimator = field(default_factory=DrawGradient)
    grid: TimeGrid = field(default_factory=TimeGrid)
    dynamics: str = "ode"
    strength: float = 1.0
    steer_from: float = 0.0
    steer_to: float = 1.0
    renormalise: bool = False
    clip: float | None = None
    max_diffusion: float = 25.0

    def __post_init__(self) -> None:
        _one_of("dynamics", self.dynamics, DYNAMICS)

    @property
    def needs_reward_gradient(self) -> bool:
        return bool(self.estimator.needs_reward_gradient and self.strength)

    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        return steer(
            target, x0, self.estimator, self.grid.times, self.dynamics, self.strength, self.steer_from, self.steer_to,
            self.renormalise, self.clip, self.max_diffusion, generator,
        )  # fmt: skip


@dataclass
class Search(AlignmentMethod):
    """MFM-Search (Algorithm 4): see `alignment.search`; `steps` and `power` are those of `search_times`."""

    num_particles: int = 8
    num_draws: int = 4
    steps: int = 10
    power: float = 2.5
    selection: str = "overall"
    stochastic: bool = True
    posterior: Posterior | None = None
    uses_reward_scale = False

    def __post_init__(self) -> None:
        _one_of("selection", self.selection, SELECTIONS)
        _positive(num_particles=self.num_particles, num_draws=self.num_draws, steps=self.steps)

    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        return search(
            target, with_particles(x0, self.num_particles, generator), self.num_particles, self.num_draws,
            search_times(self.steps, self.power), self.selection, self.stochastic, self.posterior, generator,
        )  # fmt: skip


@dataclass
class BestOfN(AlignmentMethod):
    """Best-of-N: see `alignment.best_of_n`. It draws its noise itself, as many as there are x0 for each candidate."""

    num_candidates: int = 100
    steps: int = 100
    max_rows: int = 1024
    uses_reward_scale = False

    def __post_init__(self) -> None:
        _positive(num_candidates=self.num_candidates, steps=self.steps, max_rows=self.max_rows)

    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        return best_of_n(
            target, len(x0), self.num_candidates, self.steps, self.max_rows, generator=generator, device=x0.device
        )


@dataclass
class FeynmanKac(AlignmentMethod):
    """Feynman-Kac steering: see `alignment.feynman_kac`."""

    value: ValueEstimator = field(default_factory=DenoisedValue)
    num_particles: int = 8
    grid: TimeGrid = field(default_factory=TimeGrid)
    transition: str = "sde"
    posterior: Posterior | None = None
    ess_threshold: float = 0.5
    keep: str = "sample"
    max_diffusion: float = 25.0

    def __post_init__(self) -> None:
        _one_of("transition", self.transition, TRANSITIONS)
        check_particles(self.num_particles, self.ess_threshold, self.keep)

    @property
    def needs_reward_gradient(self) -> bool:
        return self.value.needs_reward_gradient

    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        return feynman_kac(
            target, with_particles(x0, self.num_particles, generator), self.value, self.num_particles, self.grid.times,
            self.transition, self.posterior, self.ess_threshold, self.keep, self.max_diffusion, generator,
        )  # fmt: skip


@dataclass
class TwistedSMC(AlignmentMethod):
    """Twisted SMC (TDS): see `alignment.twisted_smc`."""

    estimator: GradientEstimator = field(default_factory=DPSGradient)
    num_particles: int = 8
    grid: TimeGrid = field(default_factory=TimeGrid)
    strength: float = 1.0
    clip: float | None = None
    ess_threshold: float = 0.5
    keep: str = "sample"
    max_diffusion: float = 25.0

    def __post_init__(self) -> None:
        check_particles(self.num_particles, self.ess_threshold, self.keep)

    @property
    def needs_reward_gradient(self) -> bool:
        return self.estimator.needs_reward_gradient

    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        return twisted_smc(
            target, with_particles(x0, self.num_particles, generator), self.estimator, self.num_particles,
            self.grid.times, self.strength, self.clip, self.ess_threshold, self.keep, self.max_diffusion, generator,
        )  # fmt: skip


class PolicySampling(AlignmentMethod):
    """The plain ODE of a fine-tuned policy: aligned by its weights, at the cost of ordinary sampling.

    Args:
        policy: the model, or the `model.safetensors` that fitting `RewardFinetuning` exported.
        steps: Euler steps.
    """

    def __init__(self, policy: MetaFlowMap | str, steps: int = 50) -> None:
        _positive(steps=steps)
        policy = load_model(policy) if isinstance(policy, str) else policy
        self.policy, self.steps = policy.eval().requires_grad_(False), steps

    @torch.no_grad()
    def __call__(self, target: Target, x0: Tensor, generator: torch.Generator | None = None) -> AlignmentResult:
        run, policy = Run(target, "policy", steps=self.steps), target.with_drift(self.policy.to(x0.device).drift)
        return run.finish(sample_ode(policy.drift, x0, self.steps))


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")


def with_particles(x0: Tensor, num_particles: int, generator: torch.Generator | None = None) -> Tensor:
    """`(B*M, *shape)` noise whose first particle of each sample is x0 `(B, *shape)`."""
    others = randn((len(x0), num_particles - 1, *x0.shape[1:]), x0, generator)
    return torch.cat([x0[:, None], others], dim=1).flatten(0, 1)
