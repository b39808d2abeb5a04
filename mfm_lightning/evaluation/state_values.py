"""Value estimates of many states, kept state by state: a long measurement is shared by ranks, and gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import ValueEstimator
from mfm_lightning.evaluation.draws import ValueEstimates, estimate_values, noisy_states
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.sampling.batch_folder import BatchFolder
from mfm_lightning.sampling.resumable import plain
from mfm_lightning.utils.console import track
from mfm_lightning.utils.distributed import gather_ranks

log = logging.getLogger(__name__)


@dataclass
class ValueJob:
    """An estimator at the noisy states of a time.

    t: the time; name: of the estimator; repeats: independent estimates of each state; stream: of random numbers, by
    which jobs have the same noise or other.
    """

    t: float
    name: str
    estimator: ValueEstimator
    repeats: int
    stream: int

    @property
    def title(self) -> str:
        return f"t = {self.t:g}: {self.name}"

    @property
    def folder(self) -> str:
        """Its name, with the settings that it has by itself."""
        draws = getattr(self.estimator, "num_draws", 1)
        return f"t{self.t!r}_{self.name}_{draws}x{self.repeats}".replace(" ", "-").replace("/", "-")


class StateValues:
    """V at the noisy states of clean ones, `(B, *shape)`, in a folder: `t0.3_MFM-1_200x2/batch_FIRST.safetensors` with
    values and effective numbers of draws of some states, by their index.

    A state's noise and draws are its own, by the seed and its index, so that its estimate depends neither on the states
    beside it nor on the process, but for the rounding of sums. Which states are computed together depends on
    `max_rows` alone.

    Args:
        path: estimates of other settings go to another folder in it.
        settings: what estimates depend on besides a job's own: the target, the data, the seed.
        x1: clean states.
        target: of some of them, by their indices `(k,)`.
        seed: of noise and draws.
        max_rows: at most so many draws at once.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        x1: Tensor,
        target: Callable[[Tensor], Target],
        seed: int,
        max_rows: int,
    ) -> None:
        text = json.dumps(settings, sort_keys=True, default=plain)
        self.path, self.settings = path / hashlib.sha256(text.encode()).hexdigest()[:12], settings
        self.x1, self.target, self.seed, self.max_rows = x1, target, seed, max_rows

    def fill(self, jobs: Sequence[ValueJob], rank: int = 0, world_size: int = 1) -> None:
        """Compute this rank's share of the estimates that are not there; returns before other ranks are done. With a
        `world_size` above 1 all ranks call it."""
        wanted = [(job, rows) for job in jobs for rows in self._missing(job)]
        if world_size > 1:  # all have looked before any writes: else what they deal out differs
            gather_ranks(None)
        if there := len(jobs) * len(self.x1) - sum(len(rows) for _, rows in wanted):
            more = "the others follow" if wanted else "there is nothing to do"
            log.info("%s: %d of %d estimates are there; %s", self.path, there, len(jobs) * len(self.x1), more)
        mine = wanted[rank::world_size]
        shown = track(mine, describe=lambda part: f"{part[0].title}, state {part[1][0]}") if rank == 0 else mine
        for job, rows in shown:
            found = self.estimate(job, rows)
            each = {"values": found.values.T, "ess": found.each_ess.T, "nfe": torch.full((len(rows),), found.nfe)}
            self._folder(job).write(torch.tensor(rows), each)

    def read(self, job: ValueJob) -> ValueEstimates:
        """The estimates of all states, on the CPU; they are there."""
        rows = self._folder(job).rows(range(len(self.x1)), ("values", "ess", "nfe"))
        values, ess, nfe = (torch.stack([rows[i][k] for i in range(len(self.x1))]) for k in ("values", "ess", "nfe"))
        return ValueEstimates(values.T, ess.T, nfe.double().mean().item())

    @torch.no_grad()
    def estimate(self, job: ValueJob, rows: Sequence[int]) -> ValueEstimates:
        """Of some states, whatever is there."""
        index = torch.tensor(rows, device=self.x1.device)
        noise, draws = (sample_generators((self.seed, stream), rows) for stream in (1, job.stream))
        x = noisy_states(self.x1[index], job.t, noise)
        return estimate_values(job.estimator, self.target(index), job.t, x, draws, job.repeats)

    def _missing(self, job: ValueJob) -> list[list[int]]:
        """States without an estimate, in parts of those that are computed together."""
        folder = self._folder(job)
        folder.claim({"settings": dict(self.settings), "draws": getattr(job.estimator, "num_draws", 1)})
        size = max(1, self.max_rows // getattr(job.estimator, "num_draws", 1))
        missing = folder.left(len(self.x1))
        parts = [[i for i in missing if i // size == part] for part in sorted({i // size for i in missing})]
        return parts

    def _folder(self, job: ValueJob) -> BatchFolder:
        return BatchFolder(self.path / job.folder)
