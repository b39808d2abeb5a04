"""What every alignment method returns, and how it keeps the account of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.lookahead import Best
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.utils.atomic import save_json, save_tensors
from mfm_rewards import RewardError


@dataclass
class AlignmentResult:
    """Samples aligned to a reward, and what they cost.

    Attributes:
        method: its name and settings.
        states: clean states `(B, *shape)`.
        images: their decoded images.
        rewards: of the images, `(B,)`, without the target's `reward_scale`; not counted in `nfe`.
        trace: one dictionary a step: time, mean value or reward, effective sample size and the like.
        nfe: evaluations of networks and rewards as they were made.
        seconds: wall time; peak_memory: bytes, on the accelerator in this run, or of the process so far on CPU.
        log_normaliser: estimates of log E[e^r], `(B,)`, from SMC.
        best_states: the best look-ahead of each sample that was scored on the way, `(B, *shape)`, beside its endpoint
            in `states`; where the method was asked for it (`return_best`), or returns it anyway, as search does.
        best_images, best_rewards: of these, as `images` and `rewards`.
    """

    method: dict[str, Any]
    states: Tensor
    images: Tensor
    rewards: Tensor
    trace: list[dict[str, float]] = field(default_factory=list)
    nfe: Meter = field(default_factory=Meter)
    seconds: float = 0.0
    peak_memory: int | None = None
    log_normaliser: Tensor | None = None
    best_states: Tensor | None = None
    best_images: Tensor | None = None
    best_rewards: Tensor | None = None

    @property
    def nfe_per_sample(self) -> float:
        return self.nfe.total / max(1, len(self.states))

    def summary(self) -> dict[str, Any]:
        """What can be written as JSON: all but states and images."""
        best = {}
        if self.best_rewards is not None:
            best = {"mean_best_reward": self.best_rewards.mean().item(), "best_rewards": self.best_rewards.tolist()}
        return {
            "method": self.method,
            "samples": len(self.states),
            "mean_reward": self.rewards.mean().item(),
            "standard_error": (self.rewards.std() / len(self.rewards) ** 0.5).item() if len(self.rewards) > 1 else None,
            "rewards": self.rewards.tolist(),
            **best,
            "nfe": {**asdict(self.nfe), "total": self.nfe.total, "per_sample": self.nfe_per_sample},
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "log_normaliser": None if self.log_normaliser is None else self.log_normaliser.tolist(),
            "trace": self.trace,
        }

    def tensors(self) -> dict[str, Tensor]:
        """States, images and rewards by name, also the best ones where they are there."""
        best = {"best_states": self.best_states, "best_images": self.best_images, "best_rewards": self.best_rewards}
        found = {what: tensor for what, tensor in best.items() if tensor is not None}
        return {"states": self.states, "images": self.images, "rewards": self.rewards, **found}

    def save(self, folder: str | Path, name: str = "result", more: Mapping[str, Tensor] | None = None) -> Path:
        """Write `NAME.json` and the states and images, also the best, as `NAME.safetensors`; the path of the former.

        Args:
            folder: where; it is made if need be.
            name: of the files, without their endings.
            more: tensors that are written beside them.
        """
        folder = Path(folder)
        save_tensors({**self.tensors(), **(more or {})}, folder / f"{name}.safetensors")
        return save_json(self.summary(), folder / f"{name}.json")


class Run:
    """The account of one run: evaluations, time, memory and trace; says where a reward failed.

    A RewardError that passes through `step` gets the step and time in its message, and the states reached so far as
    its attribute `states`.
    """

    def __init__(self, target: Target, name: str, **settings: Any) -> None:
        self.target, self.method = target, {"name": name, **settings}
        self.trace: list[dict[str, float]] = []
        self._before = replace(target.meter)
        self._begin = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def step(self, k: int, num_steps: int, t: float, x: Tensor) -> Iterator[None]:
        try:
            yield
        except RewardError as error:
            failure = RewardError(f"{self.method['name']}, step {k + 1} of {num_steps} (t = {t:.4g}): {error}")
            failure.states = x.detach()
            raise failure from error

    def note(self, t: float, **numbers: Tensor | float) -> None:
        """Add a step to the trace; tensors by their mean."""
        values = {k: v.float().mean().item() if isinstance(v, Tensor) else float(v) for k, v in numbers.items()}
        self.trace.append({"t": float(t), **values})

    def finish(self, states: Tensor, log_normaliser: Tensor | None = None, best: Best | None = None) -> AlignmentResult:
        """The result: its states are judged here, which is not counted.

        Args:
            states: final states `(B, *shape)`.
            log_normaliser: estimate of log E[e^r], `(B,)`, of methods that have one.
            best: the best look-aheads, where they are to be reported.
        """
        target, seconds = self.target, time.monotonic() - self._begin
        with torch.no_grad(), self.step(len(self.trace), len(self.trace) + 1, 1.0, states):
            images = target.decoder(states)
            rewards = target.plain_rewards(states)
            result = AlignmentResult(
                self.method, states, images, rewards, self.trace, target.meter - self._before, seconds, _peak_memory(),
                log_normaliser,
            )  # fmt: skip
            if best is not None and best.states is states:
                result.best_states, result.best_images, result.best_rewards = states, images, rewards
            elif best is not None:
                result.best_states, result.best_images = best.states, target.decoder(best.states)
                result.best_rewards = target.plain_rewards(best.states)
        return result


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
