"""Best-of-N: generate N times, keep the best."""

from __future__ import annotations

import torch

from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import randn
from mfm_lightning.samplers import sample_ode


@torch.no_grad()
def best_of_n(
    target: Target,
    num_samples: int,
    num_candidates: int,
    steps: int = 100,
    max_rows: int = 1024,
    keep_at: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> AlignmentResult:
    """The best of `num_candidates` ODE samples of the base flow, for each of `num_samples`.

    Candidates are generated and judged in batches of at most `max_rows`, and only the best so far is kept: memory
    does not grow with N.

    Args:
        steps: Euler steps of a candidate.
        keep_at: numbers of candidates at which the mean best reward is noted in the trace.
        generator: of the noise.
    """
    if num_samples < 1 or num_candidates < 1 or max_rows < 1:
        raise ValueError(
            f"num_samples ({num_samples}), num_candidates ({num_candidates}) and max_rows ({max_rows}) must be >= 1"
        )
    run = Run(target, "best_of_n", num_candidates=num_candidates, steps=steps)
    shape = target.state_shape
    best = torch.zeros(num_samples, *shape, device=device)
    best_reward = torch.full((num_samples,), -torch.inf, device=device)
    rows = min(num_samples, max_rows)
    stops = {n for n in keep_at if n < num_candidates} | {num_candidates}
    done = 0
    while done < num_candidates:
        n = min(max(1, max_rows // num_samples), min(s for s in stops if s > done) - done)
        for begin in range(0, num_samples, rows):
            chunk = slice(begin, begin + rows)
            part, size = target.take(chunk), len(best[chunk])
            noise = randn((size * n, *shape), best, generator)
            x = sample_ode(part.drift, noise, steps)
            with run.step(done, num_candidates, 1.0, best):
                rewards, which = part.rewards(x).reshape(size, n).max(dim=1)
            x = x.reshape(size, n, *shape)[torch.arange(size, device=x.device), which]
            better = rewards > best_reward[chunk]
            best[chunk][better], best_reward[chunk][better] = x[better], rewards[better]
        done += n
        if done in stops:
            run.note(1.0, candidates=done, best_reward=best_reward / target.reward_scale)
    return run.finish(best)
