"""Noise optimisation: gradient ascent on the starting noise through a few steps of the flow map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.method import AlignmentMethod, norms, not_negative, positive
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import chunks
from mfm_lightning.interpolant import Generators


@dataclass
class NoiseOptimisation(AlignmentMethod):
    """Reward-based noise optimisation (ReNO; Eyring et al., arXiv 2406.04312): gradient ascent on the noise x0 in

        r(X(x0)) + w ((d-1) log |x0| - |x0|^2 / 2),

    X being `steps` steps of the plain flow map. The penalty is the log-density of the norm of d standard normal
    numbers: it keeps x0 at a norm that the flow knows. Ascent has Nesterov's momentum. The sample is the best that was
    seen, as in the paper, whose defaults these are.

    It needs no drift and draws no noise. It finds a maximum of the reward near x0; its samples do not have the tilted
    distribution. Evaluations a sample: T (2K + 2) + K + 1 for T iterations through K steps.

    Args:
        iterations: steps of ascent, T, at least 1; each noise and the last are scored.
        steps: steps of the flow map from noise to data, K, at least 1.
        learning_rate: positive.
        momentum: in [0, 1).
        clip: largest norm of a sample's gradient; None for no limit.
        norm_penalty: w, not negative.
        max_rows: memory budget, at most so many samples differentiated at once.

    Raises:
        ValueError: for a setting out of range.
    """

    iterations: int = 50
    steps: int = 1
    learning_rate: float = 5.0
    momentum: float = 0.9
    clip: float | None = 0.1
    norm_penalty: float = 0.01
    max_rows: int | None = None
    needs_flow_map = True

    def __post_init__(self) -> None:
        positive(iterations=self.iterations, steps=self.steps)
        not_negative(learning_rate=self.learning_rate, clip=self.clip, norm_penalty=self.norm_penalty)
        if self.learning_rate == 0 or self.clip == 0:
            raise ValueError(f"learning_rate {self.learning_rate} and clip {self.clip} must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")
        if self.max_rows is not None:
            positive(max_rows=self.max_rows)

    @property
    def needs_reward_gradient(self) -> bool:
        return True

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return optimise_noise(target, x0, self)

    def sample(self, target: Target, x0: Tensor) -> Tensor:
        """X(x0) `(B, *shape)`: the flow map's steps on a uniform grid."""
        x = x0
        for k in range(self.steps):
            x = target.base_flow_map(k / self.steps, (k + 1) / self.steps, x)
        return x


@torch.no_grad()
def optimise_noise(target: Target, x0: Tensor, method: NoiseOptimisation | None = None) -> AlignmentResult:
    """The best sample seen in gradient ascent on its noise; what a `NoiseOptimisation` does when it is called.

    Args:
        target: the flow, and the reward.
        x0: noise `(B, *shape)`, from which ascent starts.
        method: the settings; `NoiseOptimisation()` where None.

    Raises:
        RewardError: as `AlignmentMethod`.
        TypeError: if the model has no flow map.
    """
    method = method or NoiseOptimisation()
    method.check(target.reward)
    T, d, target = method.iterations, x0[0].numel(), target.expand(x0)
    run = Run(
        target, "noise_optimisation", iterations=T, steps=method.steps, learning_rate=method.learning_rate,
        norm_penalty=method.norm_penalty,
    )  # fmt: skip
    noise, velocity, best = x0.clone(), torch.zeros_like(x0), Best(x0)
    for k in range(T + 1):
        gradient, rewards = torch.zeros_like(noise), x0.new_zeros(len(x0), dtype=torch.float32)
        for part, rows, _ in chunks(target, noise, 1, method.max_rows):
            with run.step(k, T + 1, 0.0, best.states), torch.set_grad_enabled(k < T):
                state = noise[rows].detach().requires_grad_(k < T)
                x1 = method.sample(part, state)
                r = part.rewards(x1)
                if k < T:
                    (gradient[rows],) = torch.autograd.grad(r.sum(), state)
            rewards[rows] = r.detach()
            best.update(x1[:, None], r[:, None], rows)
        norm = norms(noise)
        run.note(0.0, iteration=k, reward=rewards / target.reward_scale, norm=norm)
        if k == T:
            break
        gradient = gradient + method.norm_penalty * ((d - 1) / norm.square().clamp_min(1e-20) - 1) * noise
        if method.clip is not None:
            gradient = gradient * (method.clip / norms(gradient).clamp_min(1e-20)).clamp_max(1.0)
        velocity = method.momentum * velocity + gradient
        noise = noise + method.learning_rate * (gradient + method.momentum * velocity)
    return run.finish(best.states, best=best)
