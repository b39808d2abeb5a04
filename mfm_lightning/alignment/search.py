"""MFM-Search (paper, Algorithm 4): look ahead with posterior draws, keep the best, renoise it."""

from __future__ import annotations

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import as_times, expand, interpolate, randn

SELECTIONS = ("overall", "per_particle")


def search_times(steps: int, power: float = 2.5) -> Tensor:
    """t_0 = 0 < ... < t_{K-1} < 1: linspace^power without its end."""
    if steps < 1:
        raise ValueError(f"steps ({steps}) must be at least 1")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1] ** power


@torch.no_grad()
def search(
    target: Target,
    x0: Tensor,
    num_particles: int = 8,
    num_draws: int = 4,
    times: Tensor | None = None,
    selection: str = "overall",
    stochastic: bool = True,
    posterior: Posterior | None = None,
    generator: torch.Generator | None = None,
) -> AlignmentResult:
    """M particles a sample; at each time N posterior draws each, of which the best moves on.

    Args:
        x0: noise `(B*M, *shape)`, particles of a sample next to each other.
        num_particles: M; num_draws: N.
        times: t_0 < ... < t_{K-1} < 1; 10 of `search_times` where None.
        selection: "overall" renoises the best of a sample's M*N draws to all its particles, "per_particle" each
            particle's own best.
        stochastic: renoise with fresh noise; else with the noise that leads from the chosen draw to the particle's
            present state.
        posterior: source of draws; one step of the flow map where None.

    Returns:
        The best draw of each sample seen at any time, `(B, *shape)`.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}: expected one of {', '.join(SELECTIONS)}")
    if num_particles < 1 or num_draws < 1 or len(x0) % num_particles:
        raise ValueError(
            f"{len(x0)} states for {num_particles} particles a sample with {num_draws} draws: give B*M states, N >= 1"
        )
    posterior, shape = posterior or FlowMapPosterior(), x0.shape[1:]
    times = (search_times(10) if times is None else torch.as_tensor(times, dtype=torch.float64)).tolist()
    M, N, B = num_particles, num_draws, len(x0) // num_particles
    run = Run(target, "search", particles=M, draws=N, steps=len(times), selection=selection, stochastic=stochastic)
    best, best_reward, x = x0[::M].clone(), x0.new_full((B,), -torch.inf, dtype=torch.float32), x0
    for k, now in enumerate(times):
        with run.step(k, len(times), now, best):
            x1 = posterior(target, now, x, randn((len(x), N, *shape), x, generator))
            r = target.rewards(x1.flatten(0, 1)).reshape(B, M, N)
        x1 = x1.reshape(B, M, N, *shape)
        rows, particles = torch.arange(B, device=x.device), torch.arange(M, device=x.device)
        own = x1[rows[:, None], particles, r.argmax(dim=2)]  # (B, M, *shape)
        top, which = r.flatten(1).max(dim=1)
        overall = x1.flatten(1, 2)[rows, which]
        better = top > best_reward
        best[better], best_reward[better] = overall[better], top[better]
        run.note(now, best_reward=best_reward / target.reward_scale, mean_reward=r / target.reward_scale)
        if k + 1 < len(times):
            chosen = overall[:, None].expand(B, M, *shape) if selection == "overall" else own
            chosen, t = chosen.reshape(x.shape), as_times(now, x)
            fresh = stochastic or now == 1
            noise = randn(x.shape, x, generator) if fresh else (x - expand(t, x) * chosen) / (1 - expand(t, x))
            x = interpolate(as_times(times[k + 1], x), noise, chosen)
    return run.finish(best)
