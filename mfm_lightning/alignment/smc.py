"""Sequential Monte Carlo: particles weighted by an estimate of the value, resampled as they move.

Feynman-Kac steering (Singhal et al., arXiv 2501.06848) moves them by the base process, twisted SMC (TDS; Wu et al.,
arXiv 2306.17775) by the steered one. Both are consistent: with many particles they sample the tilted distribution of
the discretised base process, whatever the estimate of the value; how many it takes depends on the estimate.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.method import (
    TimeGrid,  # noqa: F401 (configs look up the types of inherited fields here)
    norms,
    one_of,
    with_particles,
)
from mfm_lightning.alignment.particles import Particles, kept_indices, resampled_indices
from mfm_lightning.alignment.posteriors import GlassPosterior, Posterior
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.transitions import MARKOV, Correlation, bridge, check_correlation
from mfm_lightning.alignment.values import (
    DenoisedValue,
    DPSGradient,
    Estimate,
    GradientEstimator,
    ValueEstimator,
    effective_sample_size,
    log_mean_exp,
    require_lookahead,
)
from mfm_lightning.interpolant import Generators, as_times, diffusion, randn
from mfm_lightning.samplers import euler_maruyama

TRANSITIONS = ("sde", "glass")
Step = tuple[float, float]  # a time and the next
Moved = tuple[Tensor, Tensor]  # the next states `(B*M, *shape)`, and log p/q of each move `(B*M,)`


@dataclass(kw_only=True)
class ParticleMethod(Particles):
    """Particles weighted by the change of an estimate of the value.

    Raises:
        ValueError: for a setting out of range; for `return_best` where the estimate scores no clean states.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.return_best:
            require_lookahead(self.estimate)

    @property
    @abstractmethod
    def estimate(self) -> ValueEstimator:
        """What weighs a state. In the last step the reward itself is taken."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings of its own, for the result."""

    @abstractmethod
    def move(self, target: Target, step: Step, x: Tensor, estimate: Estimate, generator: Generators) -> Moved:
        """One step of all particles `x` `(B*M, *shape)`, from time `step[0]` to `step[1]`."""

    @property
    def needs_reward_gradient(self) -> bool:
        return self.estimate.needs_reward_gradient

    @property
    def needs_meta_flow_map(self) -> bool:
        return self.estimate.needs_meta_flow_map

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return sequential_monte_carlo(target, x0, self, generator)


@dataclass
class FeynmanKac(ParticleMethod):
    """Feynman-Kac steering: particles move by the base process, weighted by the change of their value.

    Needs no gradient, so it takes black-box rewards (with a value estimator that takes them).

    Args:
        value: estimator of V at a state; the reward of the denoised state by default.
        transition: "sde": Euler-Maruyama steps of the base SDE, the last one the denoiser; "glass": exact transitions
            p(x_t' | x_t), a posterior draw x1 and then the Gaussian p(x_t' | x_t, x1), for few, large steps.
        posterior: draws for the latter; 8 Heun steps of GLASS where None, which keep the variance within modes
            (docs/design.md has the table). Where the model is an oracle, `OraclePosterior` makes transitions exact.
        correlation: of a GLASS transition's noise with the present state's (GLASS Flows, arXiv 2509.25170): "markov",
            that of the base SDE; or one number in [-1, 1] for all steps. 0 takes fresh noise, 1 none: the step is then
            random by its draw alone. Each leaves the marginals as they are.

    Raises:
        ValueError: for a setting out of range; for a correlation with SDE transitions, which have their own.
    """

    value: ValueEstimator = field(default_factory=DenoisedValue)
    _: KW_ONLY
    transition: str = "sde"
    posterior: Posterior | None = None
    correlation: Correlation = MARKOV

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("transition", self.transition, TRANSITIONS)
        check_correlation(self.correlation)
        if self.transition != "glass" and self.correlation != MARKOV:
            raise ValueError(f"correlation {self.correlation} is for GLASS transitions: set transition to 'glass'")

    @property
    def estimate(self) -> ValueEstimator:
        return self.value

    @property
    def needs_meta_flow_map(self) -> bool:
        draws = self.transition == "glass" and self.posterior is not None and self.posterior.needs_meta_flow_map
        return draws or self.value.needs_meta_flow_map

    def describe(self) -> dict[str, Any]:
        kind: dict[str, Any] = {"transition": self.transition}
        if self.transition == "glass":
            kind["correlation"] = self.correlation
        return {"name": "feynman_kac", "value": type(self.value).__name__, **kind}

    def move(self, target: Target, step: Step, x: Tensor, estimate: Estimate, generator: Generators) -> Moved:
        if self.transition == "sde":
            return sde_step(target, step, x, estimate, self.max_diffusion, generator=generator)
        (now, then), posterior = step, self.posterior or GlassPosterior(8, "heun")
        x1 = posterior(target, now, x, randn((len(x), 1, *x.shape[1:]), x, generator))[:, 0]
        mean, variance = bridge(now, then, x, x1, self.correlation)
        return mean + variance**0.5 * randn(x.shape, x, generator), x.new_zeros(len(x))


@dataclass
class TwistedSMC(ParticleMethod):
    """Twisted SMC (TDS): particles move by the steered SDE; weights make up for what is wrong with it.

    Args:
        estimator: of V and its gradient; DPS by default, as in TDS.
        strength: factor of the proposal's steering; the weights account for it.
        clip: largest norm of a step's steering, in standard deviations of the step's noise times sqrt(dimension); None
            for no limit.

    Raises:
        ValueError: for a setting out of range.
    """

    estimator: GradientEstimator = field(default_factory=DPSGradient)
    _: KW_ONLY
    strength: float = 1.0
    clip: float | None = None

    @property
    def estimate(self) -> ValueEstimator:
        return self.estimator

    def describe(self) -> dict[str, Any]:
        return {"name": "twisted_smc", "estimator": type(self.estimator).__name__, "strength": self.strength}

    def move(self, target: Target, step: Step, x: Tensor, estimate: Estimate, generator: Generators) -> Moved:
        return sde_step(target, step, x, estimate, self.max_diffusion, self.strength, self.clip, generator)


def sde_step(
    target: Target,
    step: Step,
    x: Tensor,
    estimate: Estimate,
    max_diffusion: float = 25.0,
    strength: float = 0.0,
    clip: float | None = None,
    generator: Generators = None,
) -> Moved:
    """An Euler-Maruyama step, steered where the estimate has a gradient; the one to 1 is the base's denoiser.

    The last step has no noise, and so no density by which weights could make up for a twist: it is not steered.

    Args:
        target: whose drift it follows.
        step: its time and the next.
        x: states `(B*M, *shape)`.
        estimate: the value, and its gradient or None.
        max_diffusion: as in `TwistedSMC`.
        strength: as in `TwistedSMC`.
        clip: as in `TwistedSMC`.
        generator: of the noise.
    """
    now, then = step
    t = as_times(now, x)
    b = target.drift(t, x) if estimate.drift is None else estimate.drift
    mean, deviation = euler_maruyama(now, then, x, b, diffusion(t, max_diffusion))
    if deviation is None:
        return mean, x.new_zeros(len(x))
    noise = randn(x.shape, x, generator)
    if not strength or estimate.gradient is None:
        return mean + deviation * noise, x.new_zeros(len(x))
    shift = strength * deviation * estimate.gradient  # in standard deviations of the step
    if clip is not None:
        largest = clip * x[0].numel() ** 0.5
        shift = shift * (largest / norms(shift).clamp_min(1e-20)).clamp_max(1.0)
    # N(x'; mean, s^2) / N(x'; mean + s shift, s^2) at x' = mean + s (shift + noise)
    log_ratio = -(shift * noise + shift.square() / 2).flatten(1).sum(dim=1)
    return mean + deviation * (shift + noise), log_ratio


@torch.no_grad()
def sequential_monte_carlo(
    target: Target, x0: Tensor, method: ParticleMethod, generator: Generators = None
) -> AlignmentResult:
    """Weigh, resample and move; what a particle method does when it is called.

    Args:
        target: whose drift particles follow, and the reward.
        x0: noise `(B, *shape)` of each sample's first particle; the others' is drawn.
        method: its settings.
        generator: of all noise but x0.

    Returns:
        The trace has the mean effective number of particles and of resamplings; `log_normaliser` `(B,)` estimates
        log E[e^r] (its exponential without bias, for the discretised base process).

    Raises:
        RewardError: as `AlignmentMethod`.
    """
    method.check(target.reward)
    M, B, pairs = method.num_particles, len(x0), method.grid.pairs(target.model)
    x = with_particles(x0, M, generator)
    of_particles, value, K = target.expand(x), method.estimate, len(pairs)
    described = {"particles": M, "steps": K, "ess_threshold": method.ess_threshold, "keep": method.keep}
    run = Run(target, **{**method.describe(), **described})
    with run.step(0, K, pairs[0][0], x):
        estimate = value(of_particles, pairs[0][0], x, generator)
    best = Best(x0) if method.return_best else None
    log_weights, log_normaliser = estimate.value.reshape(B, M), x.new_zeros(B, dtype=torch.float32)
    for k, (now, then) in enumerate(pairs):
        ess = effective_sample_size(log_weights)
        poor = ess < method.ess_threshold * M * (1 + 1e-6)
        run.note(now, value=estimate.value, ess=ess, resampled=poor)
        if best is not None and estimate.best is not None:
            best.merge(estimate.best)
        if poor.any():
            flat = resampled_indices(log_weights, poor, generator)
            x, estimate = x[flat], _take(estimate, flat)
            log_normaliser = log_normaliser + torch.where(poor, log_mean_exp(log_weights), 0.0)
            log_weights = torch.where(poor[:, None], 0.0, log_weights)
        before = estimate.value
        x, log_ratio = method.move(of_particles, (now, then), x, estimate, generator)
        with run.step(k, K, then, x):
            if then < 1:
                estimate = value(of_particles, then, x, generator)
            else:
                reward = of_particles.rewards(x)
                estimate = Estimate(None, reward, torch.ones_like(reward))
        log_weights = log_weights + (estimate.value - before + log_ratio).reshape(B, M)
    run.note(1.0, value=estimate.value, ess=effective_sample_size(log_weights))
    if best is not None:  # the particles at 1 are scored too
        best.update(x.reshape(B, M, *x0.shape[1:]), estimate.value.reshape(B, M))
    kept = kept_indices(method.keep, log_weights, estimate.value.reshape(B, M), generator)
    chosen = x.reshape(B, M, *x0.shape[1:])[torch.arange(B, device=x.device)[:, None], kept].flatten(0, 1)
    return run.finish(chosen, log_normaliser + log_mean_exp(log_weights), best)


def _take(estimate: Estimate, index: Tensor) -> Estimate:
    parts = {f.name: getattr(estimate, f.name) for f in fields(estimate)}
    return replace(estimate, **{k: v[index] for k, v in parts.items() if isinstance(v, Tensor)}, best=None)
