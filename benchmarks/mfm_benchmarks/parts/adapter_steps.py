"""Tangents of adapters on text-to-image transformers of random weights: each way's time, memory and error."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.timing import Step
from mfm_lightning.backbones import AdaptedFlow, FlowAdapter, TextToImageFlow
from mfm_lightning.backbones.loading import family_of, opening
from mfm_lightning.backbones.published import PUBLISHED
from mfm_lightning.backbones.scratch import bare_pipeline
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import interpolate
from mfm_lightning.tangents import has_rules, velocity_and_jvp
from mfm_rewards.execution import Precision, autocast

REFERENCE = "torch.func.jvp"
WITHOUT = "no tangent"
TANGENTS = {"explicit rules": "explicit", REFERENCE: "functorch", "finite differences": "finite_difference"}


@dataclass
class AdapterSize:
    """A transformer of a published pipeline, with other sizes, and what it is run on.

    Args:
        published: the pipeline's Hugging Face id; its settings are known here, and no file is read.
        transformer: settings of the transformer that are others, such as the number of blocks.
        vae: settings of the VAE that are others; it is never run.
        image_size: height and width of the images in pixels.
        tokens: of a prompt.
        batch: samples of a step.
        rank: of the adapter's LoRA.

    Raises:
        ValueError: for an id whose sizes are not known, or numbers below 1.
    """

    published: str
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    image_size: int = 256
    tokens: int = 77
    batch: int = 2
    rank: int = 16

    def __post_init__(self) -> None:
        if self.published not in PUBLISHED:
            raise ValueError(f"no sizes of {self.published!r} are known: expected one of {', '.join(PUBLISHED)}")
        for name in ("image_size", "tokens", "batch", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapters: {name} {getattr(self, name)} must be at least 1")

    def flow(self) -> TextToImageFlow:
        """The flow with random weights.

        Raises:
            ImportError: without diffusers.
            ValueError: for sizes that do not fit.
        """
        diffusers: Any = importlib.import_module("diffusers")
        pipeline, parts = PUBLISHED[self.published]
        made = {}
        for part, changes in (("transformer", self.transformer), ("vae", self.vae)):
            _, kind, settings = parts[part]
            made[part] = getattr(diffusers, kind).from_config({**settings, **changes})
        pipe = bare_pipeline(pipeline, **made)
        flow = family_of(pipeline)(pipe, image_size=self.image_size, max_rows=self.batch)
        flow.opened_by = opening(self.published)
        return flow


class AdapterTraining:
    """An adapter, none of whose weights is zero, and a batch, all random.

    Args:
        size: of the transformer and the batch.
        precision: of the network, "fp32", "bf16" or "fp16".
    """

    def __init__(self, size: AdapterSize, precision: Precision, device: torch.device) -> None:
        torch.manual_seed(0)
        self.precision: Precision = precision
        self.device, batch = device, size.batch
        flow = size.flow()
        network = FlowAdapter.on_flow(flow, rank=size.rank).to(device)
        for p in network.parameters():
            p.data.add_(torch.randn_like(p) / max(1, p[0].numel()) ** 0.5 * 0.1)
        self.model = AdaptedFlow(network)
        config = flow.transformer.config
        width = config.get("joint_attention_dim") or config.get("caption_channels")
        more = {}
        if pooled := config.get("pooled_projection_dim"):
            more["pooled"] = torch.randn(batch, pooled)
        if "caption_channels" in config:
            more["mask"] = torch.ones(batch, size.tokens, dtype=torch.long)
        self.given = Conditions(text=torch.randn(batch, size.tokens, width), **more).to(device)
        x1, x0, velocity, eps = torch.randn(4, batch, *flow.state_shape, device=device)
        self.t = torch.rand(batch, device=device)
        self.x_t = interpolate(self.t, x0, x1)
        self.s, self.u = torch.rand(2, batch, device=device).sort(dim=0).values
        self.x = interpolate(self.s, eps, x1)
        self.along = torch.ones_like(self.s), torch.zeros_like(self.u), velocity

    @property
    def ways(self) -> dict[str, str]:
        """Backends of tangents that the network has, by the names of the report."""
        return {name: way for name, way in TANGENTS.items() if way != "explicit" or has_rules(self.model)}

    def tangent(self, backend: str) -> tuple[Tensor, Tensor]:
        """v, with a graph, and its derivative along (1, 0, velocity)."""
        inner = (self.s, self.u, self.x, self.t, self.x_t, self.along, self.given, backend)
        with autocast(self.device, self.precision):
            return velocity_and_jvp(self.model, *inner)

    def steps(self) -> dict[str, Step]:
        """Each way's tangent with the backward of a loss; and the same without a tangent."""

        def without() -> tuple[Tensor, Tensor]:
            with autocast(self.device, self.precision):
                v = self.model(self.s, self.u, self.x, self.t, self.x_t, self.given)
            return v, torch.zeros_like(v)

        def step(of: Callable[[], tuple[Tensor, Tensor]]) -> Step:
            def run() -> None:
                self.model.zero_grad(set_to_none=True)
                v, dv = of()
                (v - dv.detach()).float().square().mean().backward()

            return run

        ways = {name: step(lambda way=way: self.tangent(way)) for name, way in self.ways.items()}
        return {WITHOUT: step(without), **ways}

    def errors(self) -> dict[str, float]:
        """How far each tangent is from `torch.func.jvp`'s in the same precision, relative to its norm."""
        exact = self.tangent("functorch")[1].detach()
        found = {name: self.tangent(way)[1].detach() for name, way in self.ways.items()}
        return {name: float((dv - exact).norm() / exact.norm()) for name, dv in found.items()}
