"""Forms of the steering (sigma^2/2) grad V by time, on the paper's mixture, against the exact one:

    python -m mfm_benchmarks.early_steering [model.safetensors] [--noise_std 0.2]

All forms are made of the same draws: of the model in one step, or of the exact drift by GLASS. States are noised
samples of the tilted mixture. Bias, deviation and error are root mean squares over states, in units of the exact
steering's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import FlowMapPosterior, GlassPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import load_model
from mfm_lightning.data import GaussianMixtureDataModule
from mfm_lightning.interpolant import interpolate
from mfm_lightning.utils.console import track, write_table
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood

TIMES, DRAWS = (0.0, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5), (1, 4, 16, 64)
NUM_STATES, NUM_DRAWS, ROWS, CLAMP = 32, 1024, 8, 25.0


def forms(t: float, x1: Tensor, rewards: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Estimates `(..., D)` by name, from draws `(..., N, D)`, their rewards `(..., N)` and the gradients of those."""
    weights, N = rewards.softmax(-1)[..., None], rewards.shape[-1]
    gradient = (weights * gradients).sum(-2)
    free = ((weights - 1 / N) * x1).sum(-2) / (1 - t)
    half = (1 - t) / t if t else 0.0  # at t = 0 the gradient is 0
    clamped, share = min(CLAMP, half) * gradient, min(1.0, CLAMP * t / (1 - t))
    pathwise = half * gradient
    longest = free.norm(dim=-1, keepdim=True) / pathwise.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return {
        "MFM-G, clamped": clamped,
        "MFM-G, not clamped": pathwise,
        "MFM-GF": free,
        "MFM-G, clamped, and MFM-GF for what that takes": clamped + (1 - share) * free,
        "MFM-G, no longer than MFM-GF": pathwise * longest.clamp_max(1.0),
        "taken: MFM-GF where the clamp acts": free if share < 1 and N > 1 else clamped,
    }


def measure(estimates: Tensor, exact: Tensor) -> dict[str, float]:
    """Bias, deviation and error of `(S, R, D)` estimates, relative to the exact ones `(S, D)`."""
    size, variance = exact.square().sum(1).mean(), estimates.var(dim=1).sum(1).mean()
    squared = (estimates.mean(dim=1) - exact).square().sum(1).mean() - variance / estimates.shape[1]
    total = (estimates - exact[:, None]).square().sum(2).mean()
    numbers = {"bias": squared.clamp_min(0), "deviation": variance, "error": total}
    return {name: (number / size).sqrt().item() for name, number in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="a Meta Flow Map of the mixture; GLASS with the exact drift without")
    parser.add_argument("--noise_std", type=float, default=0.2, help="of the linear-Gaussian reward")
    given = parser.parse_args()
    oracle, reward = GaussianMixtureDataModule().oracle, LinearGaussianLikelihood([1.2, -0.8], -1.0, given.noise_std)
    tilted, generator, rows = oracle.tilted(reward), torch.Generator().manual_seed(0), []
    model = oracle if given.model is None else load_model(given.model).double().requires_grad_(False)
    posterior = GlassPosterior(32, "heun") if given.model is None else FlowMapPosterior()
    for t in track(TIMES, describe=lambda t: f"t = {t}"):
        times, noise = torch.full((NUM_STATES,), t).double(), torch.randn(NUM_STATES, 2, generator=generator).double()
        x = interpolate(times, noise, tilted.sample(NUM_STATES, generator).double())
        exact, parts = oracle.steering(x, t, reward), []
        for part in x.split(ROWS):
            state = part.repeat_interleave(NUM_DRAWS, dim=0).requires_grad_()
            noise = torch.randn(len(state), 1, 2, generator=generator, dtype=torch.float64)
            x1 = posterior(Target(model, reward), torch.full((len(state),), t).double(), state, noise)[:, 0]
            r = reward(x1).double()
            (gradient,) = torch.autograd.grad(r.sum(), state)
            parts.append([p.detach().unflatten(0, (ROWS, NUM_DRAWS)) for p in (x1, r, gradient)])
        drawn = [torch.cat(p) for p in zip(*parts, strict=True)]
        for N in DRAWS:
            repeats = [p.unflatten(1, (NUM_DRAWS // N, N)) for p in drawn]
            rows += [{"t": t, "N": N, "form": k, **measure(v, exact)} for k, v in forms(t, *repeats).items()]
    title = f"Steering by time; draws of {given.model or 'GLASS, 32 Heun steps'}; reward of noise {given.noise_std:g}"
    source = "glass" if given.model is None else "model"
    write_table(rows, title, Path("outputs/early_steering"), f"{source}_noise_{given.noise_std:g}")


if __name__ == "__main__":
    main()
