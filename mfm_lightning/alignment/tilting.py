"""Flow Map Trajectory Tilting: particles along the base SDE, tilted by the reward of where the flow map leads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.method import (
    TimeGrid,  # noqa: F401 (configs look up the types of inherited fields here)
    positive,
    with_particles,
)
from mfm_lightning.alignment.particles import Particles, kept_indices, resampled_indices, top_indices
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import FlowMapGradient, effective_sample_size, log_mean_exp
from mfm_lightning.interpolant import Generators, as_times, diffusion, expand, randn
from mfm_lightning.samplers import euler_maruyama


@dataclass(kw_only=True)
class TrajectoryTilting(Particles):
    """Flow Map Trajectory Tilting (FMTT; Sabour et al., arXiv 2511.22688): the path of distributions
    p_t(x) e^{t r(X_{t,1}(x))}, from the base's at t = 0 to the tilted one at t = 1.

    Particles move by dx = (b + h score + h t grad r(X_{t,1})) dt + sqrt(2 h) dW, h = sigma^2/2, and their log-weights
    grow by r(X_{t,1}(x)) dt: the flow map's end does not change along the base flow, so that nothing else is left of
    Jarzynski's equality. Exact in the limit of steps and particles, for the plain flow map and drift of one model. The
    last step has h = 0: it is the flow map itself, whose end is scored.

    With `keep_top` it is the paper's search in place of its sampling: where particles would be resampled, those whose
    flow map's end has the highest rewards go on instead, each as often as the others. It finds high rewards, not the
    tilted distribution: there is no `log_normaliser` then, and `keep: best` returns what was found.

    Evaluations a particle: 5 K - 3 for K steps.

    Args:
        max_rows: memory budget, at most so many particles differentiated at once.
        keep_top: number n of particles that go on, which divides num_particles; where None, particles are resampled.
            All of them is no selection: neither that nor resampling.

    Raises:
        ValueError: for a setting out of range, or a keep_top that does not divide num_particles.
    """

    max_rows: int | None = None
    keep_top: int | None = None
    needs_flow_map = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rows is not None:
            positive(max_rows=self.max_rows)
        if self.keep_top is not None and (self.keep_top < 1 or self.num_particles % self.keep_top):
            raise ValueError(
                f"keep_top {self.keep_top} must be at least 1 and divide num_particles {self.num_particles}"
            )

    @property
    def needs_reward_gradient(self) -> bool:
        return self.grid.steps > 1

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return tilt_trajectories(target, x0, self, generator)


@torch.no_grad()
def tilt_trajectories(
    target: Target, x0: Tensor, method: TrajectoryTilting | None = None, generator: Generators = None
) -> AlignmentResult:
    """Weigh, resample and move; what a `TrajectoryTilting` does when it is called.

    Args:
        target: the flow map, and the reward.
        x0: noise `(B, *shape)` of each sample's first particle; the others' is drawn.
        method: the settings; `TrajectoryTilting()` where None.
        generator: of all noise but x0.

    Returns:
        `log_normaliser` `(B,)` estimates log E[e^r]; None with a `keep_top` that selects.

    Raises:
        RewardError: as `AlignmentMethod`.
        TypeError: if the model has no flow map.
    """
    method = method or TrajectoryTilting()
    method.check(target.reward)
    M, B, pairs, look_ahead = (
        method.num_particles,
        len(x0),
        method.grid.pairs(target.model),
        FlowMapGradient(method.max_rows),
    )
    x, best = with_particles(x0, M, generator), Best(x0)
    of_particles, K = target.expand(x), len(pairs)
    run = Run(
        target, "trajectory_tilting", particles=M, steps=K, ess_threshold=method.ess_threshold, keep=method.keep,
        keep_top=method.keep_top,
    )  # fmt: skip
    log_weights, log_normaliser = x0.new_zeros(B, M, dtype=torch.float32), x0.new_zeros(B, dtype=torch.float32)
    rewards = torch.zeros_like(log_weights)
    for k, (now, then) in enumerate(pairs):
        with run.step(k, K, now, x):
            if then < 1:
                estimate = look_ahead(of_particles, now, x)
                rewards, gradient = estimate.value.reshape(B, M), estimate.gradient
                assert estimate.best is not None
                best.merge(estimate.best)
            else:
                x, gradient = of_particles.base_flow_map(now, 1.0, x), None
                rewards = of_particles.rewards(x).reshape(B, M)
                best.update(x.reshape(B, M, *x0.shape[1:]), rewards)
        log_weights = log_weights + rewards * (then if k == 0 else then - now)  # what is before the first time, too
        ess = effective_sample_size(log_weights)
        poor = (ess < method.ess_threshold * M * (1 + 1e-6)) & (gradient is not None)  # what is kept is by weight
        run.note(now, reward=rewards / target.reward_scale, ess=ess, resampled=poor)
        if gradient is None:
            break
        if poor.any() and method.keep_top != M:
            top = method.keep_top
            flat = resampled_indices(log_weights, poor, generator) if top is None else top_indices(rewards, poor, top)
            x, gradient = x[flat], gradient[flat]
            log_normaliser = log_normaliser + torch.where(poor, log_mean_exp(log_weights), 0.0)
            log_weights = torch.where(poor[:, None], 0.0, log_weights)
        t = as_times(now, x)
        half = diffusion(t, method.max_diffusion)
        tilt = expand(half, x) * now * gradient
        x, deviation = euler_maruyama(now, then, x, of_particles.drift(t, x), half, tilt, share=0.0)
        assert deviation is not None  # then < 1
        x = x + deviation * randn(x.shape, x, generator)
    kept = kept_indices(method.keep, log_weights, rewards, generator)
    chosen = x.reshape(B, M, *x0.shape[1:])[torch.arange(B, device=x.device)[:, None], kept].flatten(0, 1)
    exact = method.keep_top in (None, M)  # what is selected by rank is no sample of the tilted distribution
    total = log_normaliser + log_mean_exp(log_weights) if exact else None
    return run.finish(chosen, total, best if method.return_best else None)
