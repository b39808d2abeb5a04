"""A text-to-image flow with the Meta Flow Map of its adapter, as what methods run on."""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from mfm_lightning.backbones.adapter import FlowAdapter
from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times, as_times
from mfm_lightning.models import MetaFlowMap, readable


class AdaptedFlow(MetaFlowMap):
    """One transformer: its base drift is the flow's own, with the flow's guidance; posterior draws and the flow map are
    the adapter's. Conditions are those of `flow.encode`.

    Args:
        network: the adapter.
    """

    null_conditions = None  # pyright: ignore # nothing stands for a missing prompt

    def __init__(self, network: FlowAdapter) -> None:
        super().__init__(network)

    @classmethod
    def load(cls, path: str | Path, flow: TextToImageFlow) -> Self:
        """Of an adapter's file, on a flow that is there already.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: for a file of another class, or of another flow.
        """
        return cls(FlowAdapter.of_file(path, flow).eval().requires_grad_(False))

    @property
    def adapter(self) -> FlowAdapter:
        """The network."""
        return cast(FlowAdapter, self.network)

    @property
    def flow(self) -> TextToImageFlow:
        """The base flow."""
        return self.adapter.flow

    @property
    def device(self) -> torch.device:
        return next(self.flow.transformer.parameters()).device

    def check(self, conditions: Conditions) -> Conditions:
        """The conditions, if the adapter has learnt their guidance.

        Raises:
            ValueError: if it has not.
        """
        if not self.flow.transformer.config.get("guidance_embeds"):
            return super().check(conditions)
        usual, given = self.flow.usual_guidance, readable(conditions.guidance)
        if given is not None and not torch.allclose(given.float(), torch.tensor(usual)):
            raise ValueError(f"guidance {float(given[0]):g}: the adapter of this flow keeps its usual one, {usual:g}")
        return conditions

    def forward(
        self,
        s: Times,
        u: Times,
        x: Tensor,
        t: Times,
        x_t: Tensor,
        conditions: Conditions | None = None,
        tangents: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """v_{s,u}(x; t, x_t) of the adapter, `(B, C, h, w)`.

        Raises:
            ValueError: for conditions without text, or states that do not fit.
        """
        given = (conditions or Conditions()).expand(len(x), x.device)
        s, u, t = (as_times(time, x) for time in (s, u, t))
        return self.adapter(s, u, x, t, x_t, given)

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None, **_: object) -> Tensor:
        """b_t(x) of the flow, with its guidance, `(B, C, h, w)`."""
        return self.flow.drift(t, x, conditions)

    def passes(self, conditions: Conditions) -> int:
        """Evaluations of the transformer in one of the drift."""
        return self.flow.passes(conditions)

    def time_grid(self, steps: int, shift: float | None = None) -> list[float]:
        """The flow's own."""
        return self.flow.time_grid(steps, shift)
