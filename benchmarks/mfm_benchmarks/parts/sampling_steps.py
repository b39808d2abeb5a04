"""Steps of steering on random weights: one call of the network for drift and draws, against a call for each."""

from __future__ import annotations

import torch

from mfm_benchmarks.parts.training_steps import random_model
from mfm_benchmarks.timing import Step
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawGradient, DrawGradientFree


def steering_steps(network: dict, samples: int, draws: int, device: torch.device) -> dict[str, tuple[Step, Step]]:
    """By estimator: a step's network calls one by one, and in one.

    In one call MFM-G also takes the drift's rows through the backward pass, for nothing.

    Args:
        network: arguments of the DiT.
        samples, draws: B and N.
    """
    torch.manual_seed(0)
    model = random_model(network).to(device).eval().requires_grad_(False)
    x = torch.randn(samples, *model.state_shape, device=device)

    def reward(states):
        return states.flatten(1).mean(dim=1)

    target = Target(model, reward)
    apart = Target(model, reward, drift=lambda t, x, label, guidance: model.drift(t, x, label, guidance))

    @torch.no_grad()
    def separate() -> None:
        DrawGradientFree(max(2, draws))(apart, 0.3, x)
        apart.drift(0.3, x)

    @torch.no_grad()
    def joint() -> None:
        DrawGradientFree(max(2, draws))(target, 0.3, x)

    def separate_gradient() -> None:
        DrawGradient(draws)(target, 0.3, x)
        with torch.no_grad():
            target.drift(0.3, x)

    def joint_gradient() -> None:
        state, t = x.clone().requires_grad_(), torch.full((samples,), 0.3, device=device)
        x1, _ = target.draws_with_drift(torch.randn(samples, draws, *x.shape[1:], device=device), t, state)
        torch.autograd.grad(target.rewards(x1.flatten(0, 1)).sum(), state)

    return {"MFM-GF": (separate, joint), "MFM-G (not done)": (separate_gradient, joint_gradient)}
