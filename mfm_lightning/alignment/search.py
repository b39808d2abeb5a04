"""MFM-Search (paper, Algorithm 4): look ahead with posterior draws, keep the best, renoise it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.method import AlignmentMethod, one_of, positive, with_particles
from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.result import AlignmentResult, Run
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.transitions import Correlation, check_correlation, correlation_of
from mfm_lightning.interpolant import Generators, as_times, expand, interpolate, randn

SELECTIONS = ("overall", "per_particle")


@dataclass
class Search(AlignmentMethod):
    """MFM-Search (Algorithm 4): M particles a sample; at each time N posterior draws each, of which the best moves on.

    Args:
        num_particles: M, at least 1.
        num_draws: N, at least 1.
        steps: times at which is looked ahead, at least 1: t_0 = 0 < ... < t_{K-1} < 1.
        power: the times are linspace^power; above 0.
        selection: "overall" renoises the best of a sample's M*N draws to all its particles, "per_particle" each
            particle's own best.
        stochastic: renoise with fresh noise; else with the noise that leads from the chosen draw to the particle's
            present state.
        correlation: of the renoising's noise with the noise that leads from the chosen draw to the particle's present
            state (GLASS Flows, arXiv 2509.25170): a number in [-1, 1]; or "markov", that of the base SDE,
            t (1-t') / (t' (1-t)). Where None, 0 (stochastic) or 1 (not).
        posterior: source of the draws; one step of the flow map where None.

    Raises:
        ValueError: for an unknown selection, or a number out of range; for a correlation that is not stochastic.
    """

    num_particles: int = 8
    num_draws: int = 4
    steps: int = 10
    power: float = 2.5
    selection: str = "overall"
    stochastic: bool = True
    posterior: Posterior | None = None
    correlation: Correlation | None = None
    uses_reward_scale = False

    def __post_init__(self) -> None:
        one_of("selection", self.selection, SELECTIONS)
        positive(num_particles=self.num_particles, num_draws=self.num_draws, steps=self.steps)
        if self.power <= 0:
            raise ValueError(f"power {self.power} must be above 0")
        if self.correlation is not None:
            check_correlation(self.correlation)
            if not self.stochastic:
                raise ValueError(f"correlation {self.correlation} with stochastic false, which is a correlation of 1")

    @property
    def times(self) -> list[float]:
        """t_0 = 0 < ... < t_{K-1} < 1: linspace^power without its end."""
        return (torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)[:-1] ** self.power).tolist()

    @property
    def needs_meta_flow_map(self) -> bool:
        return (self.posterior or FlowMapPosterior()).needs_meta_flow_map

    def correlation_of(self, now: float, then: float) -> float:
        """Of the noise at `then` with that at `now`."""
        if self.correlation is None:
            return 0.0 if self.stochastic else 1.0
        return correlation_of(self.correlation, now, then)

    def __call__(self, target: Target, x0: Tensor, generator: Generators = None) -> AlignmentResult:
        return search(target, x0, self, generator)


@torch.no_grad()
def search(target: Target, x0: Tensor, method: Search | None = None, generator: Generators = None) -> AlignmentResult:
    """The best draw of each sample seen at any time; what a `Search` does when it is called.

    It is a look-ahead, and so the result's `best_states` too.

    Args:
        target: what draws come from, and the reward.
        x0: noise `(B, *shape)` of each sample's first particle; the others' is drawn.
        method: the settings; `Search()` where None.
        generator: of all noise but x0.

    Raises:
        RewardError: as `AlignmentMethod`.
    """
    method = method or Search()
    times, M, N, B, shape = method.times, method.num_particles, method.num_draws, len(x0), x0.shape[1:]
    x = with_particles(x0, M, generator)
    run = Run(
        target, "search", particles=M, draws=N, steps=len(times), selection=method.selection,
        stochastic=method.stochastic, correlation=method.correlation,
    )  # fmt: skip
    posterior = method.posterior or FlowMapPosterior()
    best = Best(x0)
    rows, each, of_particles = torch.arange(B, device=x.device), torch.arange(M, device=x.device), target.expand(x)
    for k, now in enumerate(times):
        with run.step(k, len(times), now, best.states):
            x1 = posterior(of_particles, now, x, randn((len(x), N, *shape), x, generator))
            r = of_particles.rewards(x1.flatten(0, 1)).reshape(B, M, N)
        x1 = x1.reshape(B, M, N, *shape)
        own = x1[rows[:, None], each, r.argmax(dim=2)]  # (B, M, *shape)
        top, which = r.flatten(1).max(dim=1)
        overall = x1.flatten(1, 2)[rows, which]
        best.update(overall[:, None], top[:, None])
        run.note(now, best_reward=best.rewards / target.reward_scale, mean_reward=r / target.reward_scale)
        if k + 1 < len(times):
            chosen = overall[:, None].expand(B, M, *shape) if method.selection == "overall" else own
            chosen, t = chosen.reshape(x.shape), expand(as_times(now, x), x)
            rho = method.correlation_of(now, times[k + 1])
            noise = rho * (x - t * chosen) / (1 - t)
            if abs(rho) < 1:
                noise = noise + (1 - rho**2) ** 0.5 * randn(x.shape, x, generator)
            x = interpolate(as_times(times[k + 1], x), noise, chosen)
    return run.finish(best.states, best=best)
