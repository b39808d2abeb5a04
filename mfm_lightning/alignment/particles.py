"""Particles: several states of each sample, with weights, resampled as they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfm_lightning.alignment.method import AlignmentMethod, TimeGrid, not_negative, one_of, positive
from mfm_lightning.interpolant import Generators, rand

KEEP = ("sample", "best", "all")


@dataclass(kw_only=True)
class Particles(AlignmentMethod):
    """M particles a sample, which move, are weighted by the change of their value, and resampled.

    Args:
        num_particles: M, at least 1. A sample's first particle starts at its x0.
        grid: times of the steps, which end at 1; 100 uniform ones from 0.01 by default.
        ess_threshold: a sample's particles are resampled (systematically) where their effective number falls below
            this share of M. 0: never; 1: at each step.
        keep: what is returned of each sample: "sample", one particle drawn by weight; "best", the one of highest
            reward (biased upwards); "all", M particles, resampled by weight, `(B*M, *shape)`.
        max_diffusion: clamp of sigma^2/2 near t=0.
        return_best: report also the best clean state of each sample that was scored on the way or at the end
            (`AlignmentResult`'s `best_states`). It takes no further evaluations, and leaves all else as it is.

    Raises:
        ValueError: for a setting out of range.
    """

    num_particles: int = 8
    grid: TimeGrid = field(default_factory=TimeGrid)
    ess_threshold: float = 0.5
    keep: str = "sample"
    max_diffusion: float = 25.0
    return_best: bool = False

    def __post_init__(self) -> None:
        positive(num_particles=self.num_particles)
        one_of("keep", self.keep, KEEP)
        not_negative(clip=getattr(self, "clip", None), max_diffusion=self.max_diffusion)
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold {self.ess_threshold} must be in [0, 1]")
        if self.grid.end != 1:
            raise ValueError(f"the grid of a particle method must end at 1, got {self.grid.end}")


def systematic_resample(log_weights: Tensor, generator: Generators = None) -> Tensor:
    """Indices of resampled particles `(B, M)` in 0..M-1, for log-weights `(B, M)` of any normalisation.

    Systematic: one uniform number a row, so that a particle of weight w has floor(M w) or ceil(M w) copies.
    """
    B, M = log_weights.shape
    cumulative = log_weights.double().softmax(dim=1).cumsum(dim=1)
    cumulative[:, -1] = 1.0
    points = (torch.arange(M, device=log_weights.device) + rand(B, log_weights, generator)[:, None]) / M
    return torch.searchsorted(cumulative, points, right=True).clamp_max(M - 1)


def resampled_indices(log_weights: Tensor, poor: Tensor, generator: Generators) -> Tensor:
    """Which of all particles goes on in each one's place, `(B*M,)`; they stay where a sample's are not poor."""
    B, M = log_weights.shape
    index = torch.arange(M, device=log_weights.device).expand(B, M).clone()
    if isinstance(generator, Sequence):  # a sample's noise does not depend on whether others are resampled
        generator = [own for own, drawn in zip(generator, poor.tolist(), strict=True) if drawn]
        index[poor] = systematic_resample(log_weights[poor], generator)
    else:
        index[poor] = systematic_resample(log_weights, generator)[poor]
    return (torch.arange(B, device=log_weights.device)[:, None] * M + index).flatten()


def top_indices(rewards: Tensor, poor: Tensor, top: int) -> Tensor:
    """Which of all particles goes on in each one's place, `(B*M,)`: of a poor sample those of its `top` highest rewards
    `(B, M)`, each M / top times; the others stay where they are."""
    B, M = rewards.shape
    best = rewards.topk(top, dim=1).indices.repeat(1, M // top)
    index = torch.where(poor[:, None], best, torch.arange(M, device=rewards.device))
    return (torch.arange(B, device=rewards.device)[:, None] * M + index).flatten()


def kept_indices(keep: str, log_weights: Tensor, rewards: Tensor, generator: Generators) -> Tensor:
    """Which particles of each sample are returned, `(B, 1 or M)`."""
    if keep == "best":
        return rewards.argmax(dim=1, keepdim=True)
    index = systematic_resample(log_weights, generator)
    if keep == "all":
        return index
    # a random one of the resampled, which has the weights' distribution
    pick = (rand(len(index), log_weights, generator) * index.shape[1]).long()
    return index.gather(1, pick[:, None])
