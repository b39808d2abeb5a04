"""Fréchet distance of K-step samples of the Meta Flow Map (paper, section 7) and of its base flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block, Table
from mfm_benchmarks.measure import noise
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.checkpoints import find_weights, fingerprint, is_there, load_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import Measured, resampled
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder
from mfm_lightning.samplers import sample_ode, sample_refinement

Draw = Callable[[MetaFlowMap, Tensor, Conditions, Sequence[torch.Generator]], Tensor]


@dataclass
class SampleQuality:
    """Samples by the refinement sampler (Algorithm 1) and by Euler's method on a base flow, all from the same noise,
    classes in equal shares.

    Args:
        num_samples: of each K; FID is usually on 50,000.
        steps: K.
        ode_steps: steps of the base flow, which the refinement samples are compared with; None leaves it out.
        base: the base flow's file, a name such as mnist/flow, or a Hugging Face id; what the model has on its diagonal
            where None.
        batch_size: samples at once.
        chunk: samples of one stored result.
        guidance: class-guidance scale; None for none.
        replicates: of the interval; each costs about as much as the distance.
    """

    num_samples: int = 50_000
    steps: list[int] = field(default_factory=lambda: [1, 2, 4])
    ode_steps: int | None = None
    base: str | None = None
    batch_size: int = 50
    chunk: int = 1000
    guidance: float | None = 2.5
    replicates: int = 20

    def shrink(self) -> None:
        self.num_samples, self.steps, self.replicates = min(self.num_samples, 256), self.steps[:1], 5

    def missing(self) -> list[str]:
        """The base flow, where it is not there."""
        return [f"samples.base: no model at {self.base}"] if self.base is not None and not is_there(self.base) else []

    def cells(
        self,
        model: Callable[[], MetaFlowMap],
        decoder: Decoder,
        quality: Quality,
        device: torch.device,
        identity: dict[str, Any],
    ) -> list[Cell]:
        drawn: dict[str, Draw] = {f"MFM, {k} step" + "s" * (k > 1): partial(self._refined, k) for k in self.steps}
        files = dict.fromkeys(drawn, identity)
        if self.ode_steps is not None:
            drawn[self._base_row] = self._from_base
            files[self._base_row] = (
                identity if self.base is None else {**identity, "model": fingerprint(find_weights(self.base))}
            )
        self._cells: dict[str, list[Cell]] = {}
        for name, draw in drawn.items():
            for begin in range(0, self.num_samples, self.chunk):
                n = min(self.chunk, self.num_samples - begin)
                settings = {**files[name], "samples": name, "begin": begin, "n": n, "guidance": self.guidance}

                def compute(draw: Draw = draw, begin: int = begin, n: int = n) -> Outcome:
                    return self._features(draw, model(), decoder, quality, device, begin, n)

                cell = Cell(f"{name}: samples {begin + 1} to {begin + n}", settings, compute)
                self._cells.setdefault(name, []).append(cell)
        return [cell for cells in self._cells.values() for cell in cells]

    @torch.no_grad()
    def _features(
        self,
        draw: Draw,
        model: MetaFlowMap,
        decoder: Decoder,
        quality: Quality,
        device: torch.device,
        begin: int,
        n: int,
    ) -> Outcome:
        x0 = noise(n, model.state_shape, 31_337 + begin, device)
        label = (torch.arange(begin, begin + n, device=device) % model.num_classes) if model.num_classes else None
        generators, features = sample_generators((31_337, 1), range(begin, begin + n)), []
        for rows in torch.arange(n).split(self.batch_size):
            given = Conditions() if label is None else Conditions(label=label[rows], guidance=self.guidance)
            states = draw(model, x0[rows], given, [generators[i] for i in rows])
            features.append(quality.features(decoder(states)))
        return Outcome({}, {"features": torch.cat(features)})

    @property
    def _base_row(self) -> str:
        return f"base flow, {self.ode_steps} steps"

    def _refined(
        self, k: int, model: MetaFlowMap, x0: Tensor, given: Conditions, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return sample_refinement(model, x0, k, model.check(given), generators)

    def _from_base(
        self, model: MetaFlowMap, x0: Tensor, given: Conditions, generators: Sequence[torch.Generator]
    ) -> Tensor:
        flow = model if self.base is None else self._base_flow.to(x0.device)
        given = flow.check(given)
        return sample_ode(lambda t, x: flow.drift(t, x, given), x0, self.ode_steps or 1)

    @cached_property
    def _base_flow(self) -> MetaFlowMap:
        return load_model(str(self.base))

    def blocks(self, results: Results, quality: Quality) -> list[Block]:
        found: dict[str, Measured] = {}
        for name, cells in self._cells.items():
            if (done := results.all(cells)) is None:
                continue  # a part has not its share of each class
            features = torch.cat([outcome.tensors["features"] for outcome in done])
            found[name] = resampled(frechet_of_features, features, quality.gaussian, replicates=self.replicates)
        rows = [{"samples": name, "number": self.num_samples, "Fréchet": distance} for name, distance in found.items()]
        caption = "K-step refinement samples (Algorithm 1), classes in equal shares, against the reference features."
        if (base := found.get(self._base_row)) is not None:
            rows = [{**row, "ratio to the base flow": found[row["samples"]].over(base)} for row in rows]
            caption += " The ratio is paired: both start from the same noise."
        return [Table("sample_quality", "Fréchet distance of K-step samples", rows, caption, keys=["samples"])]
