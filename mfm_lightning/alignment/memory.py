"""Estimators by measured memory: `max_rows: auto`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.target import Target
from mfm_lightning.interpolant import Generators, Times
from mfm_lightning.utils.row_budget import RowBudget
from mfm_rewards import RewardError


def by_memory(call: Callable[..., Any]) -> Callable[..., Any]:
    """An estimator's `__call__` that, with `max_rows` auto, is tried with as many rows at once as fit (`RowBudget`);
    each try has the same noise, and evaluations of tries that failed do not count."""

    @functools.wraps(call)
    def estimate(self: Any, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Any:
        if self.max_rows != "auto":
            return call(self, target, t, x, generator)
        begin, before = _random_states(generator, x.device), replace(target.meter)

        def attempt(rows: int) -> Any:
            _set_random_states(generator, x.device, begin)
            target.meter.network, target.meter.reward = before.network, before.reward
            part = copy.copy(self)
            part.max_rows = rows
            try:
                return call(part, target, t, x, generator)
            except RewardError as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    raise error.__cause__ from None
                raise

        return row_budget(self).attempt(attempt, len(x) * getattr(self, "num_draws", 1), x.device)[0]

    return estimate


def row_budget(estimator: Any) -> RowBudget:
    """Of an estimator with `max_rows` auto."""
    new = RowBudget(type(estimator).__name__, getattr(estimator, "fewest_rows", 1))
    return estimator.__dict__.setdefault("_row_budget", new)


def row_budgets(part: Any, name: str = "method") -> dict[str, RowBudget]:
    """Of a method and its parts at any depth with `max_rows` auto, by name."""
    found = {name: row_budget(part)} if getattr(part, "max_rows", None) == "auto" else {}
    for key, value in getattr(part, "__dict__", {}).items():
        if type(value).__module__.startswith("mfm_lightning.alignment") and key[0] != "_":
            found |= row_budgets(value, f"{name}.{key}")
    return found


def _random_states(generator: Generators, device: torch.device) -> list[Tensor]:
    if isinstance(generator, Sequence):
        return [each.get_state() for each in generator]
    if generator is not None:
        return [generator.get_state()]
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [torch.get_rng_state()]


def _set_random_states(generator: Generators, device: torch.device, states: list[Tensor]) -> None:
    if generator is None and device.type == "cuda":
        torch.cuda.set_rng_state(states[0], device)
    elif generator is None:
        torch.set_rng_state(states[0])
    else:
        every = generator if isinstance(generator, Sequence) else [generator]
        for each, state in zip(every, states, strict=True):
            each.set_state(state)
