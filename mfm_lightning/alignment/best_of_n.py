"""Best-of-N: generate N times, keep the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.alignment.method import AlignmentMethod, TimeGrid, positive
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import Generators, own_generators, randn
from mfm_lightning.samplers import integrate


@dataclass
class BestOfN(AlignmentMethod):
    """The best of N ODE samples of the base flow, for each sample.

    Candidates are generated and judged in batches of at most `max_rows`, and only the best so far is kept: memory does
    not grow with N. A sample's candidates are drawn one after the other from a generator of its own: they do not depend
    on how many are generated at once.

    Args:
        num_candidates: N, at least 1.
        steps: Euler steps of a candidate, uniform from 0 to 1.
        grid: its times in place of those.
        max_rows: candidates at once.
        keep_at: numbers of candidates at which the mean best reward is noted in the trace, besides N.

    Raises:
        ValueError: for a number below 1.
    """

    num_candidates: int = 100
    steps: int = 100
    max_rows: int = 1024
    keep_at: tuple[int, ...] = ()
    grid: TimeGrid | None = None
    uses_reward_scale = False

    def __post_init__(self) -> None:
        if self.grid is not None and self.steps != 100:
            raise ValueError(f"steps {self.steps} and a grid of {self.grid.steps}: give one of them")
        positive(num_candidates=self.num_candidates, steps=self.steps, max_rows=self.max_rows)

    def times(self, model: object) -> list[float]:
        """Of a candidate of a model; raises as `TimeGrid.pairs`."""
        if self.grid is None:
            return torch.linspace(0, 1, self.steps + 1).tolist()
        pairs = self.grid.pairs(model)
        return [pairs[0][0], *(then for _, then in pairs)]

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return best_of_n(target, x0, self, generator)


@torch.no_grad()
def best_of_n(
    target: Target, x0: Tensor, method: BestOfN | None = None, generator: Generators = None
) -> AlignmentResult:
    """The best candidate of each sample; what a `BestOfN` does when it is called.

    Args:
        target: what candidates are drawn from, and the reward.
        x0: noise `(B, *shape)` of each sample's first candidate; that of the others is drawn here.
        method: the settings; `BestOfN()` where None.
        generator: of the noise; one makes one for each sample.

    Raises:
        RewardError: as `AlignmentMethod`.
    """
    method = method or BestOfN()
    N, B, shape, target = method.num_candidates, len(x0), x0.shape[1:], target.expand(x0)
    times = method.times(target.model)
    target.require_whole_groups(min(method.max_rows, B * min([N, *method.keep_at])), B * N)
    run = Run(target, "best_of_n", num_candidates=N, steps=len(times) - 1)
    best, best_reward = torch.zeros_like(x0), x0.new_full((B,), -torch.inf, dtype=torch.float32)
    own = own_generators(generator, B)
    stops, done = {n for n in method.keep_at if n < N} | {N}, 0
    while done < N:
        n = min(max(1, method.max_rows // B), min(stop for stop in stops if stop > done) - done)
        for chunk in torch.arange(B, device=x0.device).split(min(B, method.max_rows)):
            part = target.take(chunk)
            noise = [x0[chunk][:, None]] if done == 0 else []
            each = [own[i] for i in chunk.tolist() for _ in range(n - len(noise))]
            if each:
                noise.append(randn((len(each), *shape), x0, each).reshape(len(chunk), -1, *shape))
            x = integrate(part.drift, torch.cat(noise, dim=1).flatten(0, 1), times)
            with run.step(done, N, 1.0, best):
                rewards, which = part.rewards(x).reshape(-1, n).max(dim=1)
            x = x.reshape(-1, n, *shape)[torch.arange(len(chunk), device=x.device), which]
            better = rewards > best_reward[chunk]
            best[chunk[better]], best_reward[chunk[better]] = x[better], rewards[better]
        done += n
        if done in stops:
            run.note(1.0, candidates=done, best_reward=best_reward / target.reward_scale)
    return run.finish(best)
