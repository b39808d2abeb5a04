"""What pipelines ask of their schedulers: a flow, and its sigmas as each gives them."""

from __future__ import annotations

from typing import Any

import numpy as np


def require_flow(scheduler: Any, pipeline: str) -> None:
    """Raise ValueError unless a scheduler integrates a flow over sigma = 1 - t."""
    config, name = scheduler.config, type(scheduler).__name__
    if (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        return
    predicted = config.get("prediction_type", "unknown")
    raise ValueError(
        f"the {pipeline} is no flow: its {name} takes predictions of type {predicted!r}. Expected a pipeline with a "
        "FlowMatchEulerDiscreteScheduler, such as SD3, FLUX or SANA"
    )


def shift_of_length(scheduler: Any, length: int, max_shift: float) -> float:
    """mu of a scheduler with dynamic shifting, linear in the number of image tokens, as the pipelines compute it.

    Args:
        max_shift: what the pipeline takes where the scheduler's settings have none.
    """
    get = scheduler.config.get
    first, last = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
    low, high = get("base_shift", 0.5), get("max_shift", max_shift)
    return low + (high - low) / (last - first) * (length - first)


def uniform_sigmas(steps: int, scheduler: Any, tokens: int) -> dict[str, Any]:
    """Arguments of `set_timesteps`: uniform sigmas from 1 to 1 / steps, shifted by the number of image tokens."""
    sigmas = np.linspace(1.0, 1 / steps, steps)
    return {"sigmas": sigmas, "mu": shift_of_length(scheduler, tokens, 1.15)}
