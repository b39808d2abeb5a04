"""Steered ODE and SDE: the base dynamics plus the gradient of the value (paper, section 3 and Algorithms 2-3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.method import AlignmentMethod, TimeGrid, norms, not_negative, one_of
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawGradient, GradientEstimator, require_lookahead
from mfm_lightning.interpolant import Generators, as_times, diffusion, expand, randn
from mfm_lightning.samplers import Callback, euler_maruyama

DYNAMICS = ("ode", "sde")
BASE_STEPS = ("euler", "flow_map")


class DivergedError(FloatingPointError):
    """States that left the finite numbers.

    Attributes:
        states: the last ones that had not.
    """

    states: Tensor | None = None


@dataclass
class Steering(AlignmentMethod):
    """The steered ODE, dx = (b + lambda sigma^2/2 grad V) dt, or SDE,
    dx = (b + sigma^2/2 score + lambda sigma^2 grad V) dt + sigma dW, with sigma^2/2 = (1-t)/t (Eq. 14). The SDE's step
    to 1 is the tilted denoiser (`mfm_lightning.samplers.euler_maruyama`).

    Args:
        estimator: of the gradient of V; MFM-G by default.
        grid: times of the steps; 100 uniform ones from 0.01 to 1 by default.
        dynamics: "ode" or "sde".
        strength: lambda; 0 gives the base sampler (and costs only its evaluations).
        steer_from: steer only at times from here.
        steer_to: steer only at times up to here.
        renormalise: give the steering the base drift's norm, sample by sample, times strength (Eq. 136).
        clip: largest norm of the steering, in norms of the base drift; None for no limit.
        max_diffusion: clamp of sigma^2/2 near t=0, at times below 1 / (1 + max_diffusion). There the steering is the
            estimate's product (sigma^2/2) grad V, unclamped, where it has one: MFM-GF, the exact gradient, and MFM-G
            from two draws. Of other gradients the clamp takes away 1 - max_diffusion t/(1-t).
        return_best: report also the best clean state that the estimator scored on the way (`AlignmentResult`'s
            `best_states`). It takes no further evaluations, and leaves the endpoint as it is.
        base_step: how the ODE's base flow goes from t to u: "euler", by its velocity at t; or "flow_map", by its flow
            map X_{t,u}, whose average velocity has no error of discretisation: for few steps, at the same evaluations.

    Raises:
        ValueError: for unknown dynamics or base_step, the flow map's step in the SDE, a negative clip or max_diffusion;
            for `return_best` where no clean state is scored.
    """

    estimator: GradientEstimator = field(default_factory=DrawGradient)
    grid: TimeGrid = field(default_factory=TimeGrid)
    dynamics: str = "ode"
    strength: float = 1.0
    steer_from: float = 0.0
    steer_to: float = 1.0
    renormalise: bool = False
    clip: float | None = None
    max_diffusion: float = 25.0
    return_best: bool = False
    base_step: str = "euler"

    def __post_init__(self) -> None:
        one_of("dynamics", self.dynamics, DYNAMICS)
        one_of("base_step", self.base_step, BASE_STEPS)
        if self.base_step == "flow_map" and self.dynamics != "ode":
            raise ValueError("base_step flow_map is a step of the ODE: the SDE's base dynamics have no flow map")
        not_negative(clip=self.clip, max_diffusion=self.max_diffusion)
        if self.return_best:
            require_lookahead(self.estimator)
            # the model's own times are known with it; they are from 0 to 1
            if not self.strength or not (
                self.grid.of_model or any(self.steers_at(now) for now, _ in self.grid.pairs(None))
            ):
                raise ValueError("return_best: nothing is looked ahead at without steering: see strength, steer_from")

    @property
    def needs_flow_map(self) -> bool:  # type: ignore[override]
        return self.base_step == "flow_map"

    @property
    def needs_reward_gradient(self) -> bool:
        return bool(self.estimator.needs_reward_gradient and self.strength)

    @property
    def needs_meta_flow_map(self) -> bool:
        return bool(self.estimator.needs_meta_flow_map and self.strength)

    def steers_at(self, t: float) -> bool:
        """Whether steps from time t are steered."""
        return bool(self.strength) and self.steer_from <= t <= self.steer_to

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return steer(target, x0, self, generator)

    def term(self, gradient: Tensor, drift: Tensor, t: Tensor, steering: Tensor | None = None) -> Tensor:
        """What is added to the base drift `(B, *shape)`: strength * (sigma^2/2) * gradient, with its remedies.

        Args:
            gradient: of the value.
            drift: of the base flow.
            t: times `(B,)`, below 1.
            steering: the product (sigma^2/2) * gradient, which is taken where sigma^2/2 is clamped; with `renormalise`,
                where no clamp matters, at t = 0 only, where the gradient is zero.
        """
        term = expand(diffusion(t, self.max_diffusion), gradient) * gradient
        if steering is not None:
            clamped = t == 0 if self.renormalise else t * self.max_diffusion < 1 - t
            term = torch.where(expand(clamped, term), steering, term)
        base = norms(drift)
        if self.renormalise:
            # a gradient of zero stays zero: there is no direction to go
            norm = norms(term)
            term = torch.where(norm > 0, term / norm.clamp_min(1e-20) * base, term)
        term = self.strength * term
        if self.clip is not None:
            norm = norms(term)
            term = term * (self.clip * base / norm.clamp_min(1e-20)).clamp_max(1.0)
        return term


@torch.no_grad()
def steer(
    target: Target,
    x0: Tensor,
    method: Steering | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
) -> AlignmentResult:
    """Generate from noise by the steered ODE or SDE; what a `Steering` does when it is called.

    Args:
        target: whose drift is steered, and the reward.
        x0: noise `(B, *shape)`, the state at the first time.
        method: the settings; `Steering()` where None.
        generator: of draws and of the SDE's noise.
        callback: called as `callback(k, x)` after each step.

    Raises:
        RewardError: as `AlignmentMethod`.
        DivergedError: where the states leave the finite numbers.
    """
    method = method or Steering()
    method.check(target.reward)
    pairs, x, target = method.grid.pairs(target.model), x0, target.expand(x0)
    best = Best(x0) if method.return_best else None
    run = Run(
        target, f"steered {method.dynamics}", estimator=type(method.estimator).__name__, steps=len(pairs),
        strength=method.strength, num_draws=getattr(method.estimator, "num_draws", None),
        renormalise=method.renormalise,
    )  # fmt: skip
    for k, (now, then) in enumerate(pairs):
        t, estimate = as_times(now, x), None
        half = diffusion(t, method.max_diffusion)
        if method.steers_at(now):
            with run.step(k, len(pairs), now, x):
                estimate = method.estimator(target, t, x, generator)
        if best is not None and estimate is not None and estimate.best is not None:
            best.merge(estimate.best)
        if method.base_step == "flow_map":
            b = (target.base_flow_map(t, then, x) - x) / (then - now)
        else:
            b = target.drift(t, x) if estimate is None or estimate.drift is None else estimate.drift
        term: Tensor | float = 0.0
        share: Tensor | float = 1.0
        if estimate is not None and estimate.gradient is not None:
            term = method.term(estimate.gradient, b, t, estimate.steering)
            if estimate.steering is not None:  # the SDE's other half is of its own, clamped sigma^2/2
                share = expand(half * t / (1 - t), x)
            size = term.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-20)
            weights = {} if estimate.posterior_ess is None else {"posterior_ess": estimate.posterior_ess}
            run.note(now, value=estimate.value, ess=estimate.ess, **weights, steering_over_drift=size)
        previous = x
        if method.dynamics == "ode":
            x = x + (then - now) * (b + term)
        else:
            x, deviation = euler_maruyama(now, then, x, b, half, term, share)
            if deviation is not None:
                x = x + deviation * randn(x.shape, x, generator)
        _require_finite(x, previous, k, then)
        if callback:
            callback(k, x)
    return run.finish(x, best=best)


def _require_finite(x: Tensor, previous: Tensor, k: int, then: float) -> None:
    if torch.isfinite(x).all():
        return
    bad = (~torch.isfinite(x).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    failure = DivergedError(
        f"steering left the finite numbers at step {k + 1} (t = {then:.4g}) in samples {bad[:8]}: use more steps, a "
        "smaller strength, clip, or renormalise"
    )
    failure.states = previous
    raise failure
