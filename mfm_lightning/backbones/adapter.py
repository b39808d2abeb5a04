"""A Meta Flow Map as an adapter of a pretrained text-to-image flow: one copy of its weights, the teacher among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.lora import AdaptedNetwork, LoRA
from mfm_lightning.backbones.network import PromptedNetwork
from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import check_guidance_scales
from mfm_lightning.networks.embeddings import patches

NAME = "mfm"  # of the LoRA among a transformer's adapters
FREQUENCIES = 128


class FlowAdapter(AdaptedNetwork):
    """v_{s,u}(x; t, x_t) of prompts: the transformer of a text-to-image flow at time s, with

    - an embedding of u - s, of t and of the guidance scale, added to that of its own time (zero at first);
    - tokens of x_t added to its own, each channel times a gate that the embedding gives (AdaLN-Zero; paper, Eqs. 71
      and 72; zero at first);
    - LoRA on its linear layers (Hu et al., arXiv 2106.09685; zero at first).

    So it is exactly the base flow at first: b_s(x), whatever u, t and x_t. The base's weights are there once, frozen;
    `teacher_network` is the same transformer without all this. A file of it has what is trained alone.

    Args:
        name: a folder of diffusers with `model_index.json`, or a Hugging Face id.
        rank: of the LoRA; 0 for none.
        ranks: others by module, a regular expression to a rank: {"^transformer_blocks.0": 64}.
        targets: regular expression of whole names of linear layers that have a LoRA; those of attention and MLP in
            all blocks where None.
        guidance_scales: scales of guidance, above 1, that it learns as an input (`pairs.guidance_scale` says which one
            is trained). None for a transformer that has guidance as an input (FLUX.1-dev): it keeps its usual one.
        vae: folder of another VAE for the flow.
        image_size: of the images in pixels; the pipeline's own where None.
        checkpointing: keep only the input of each block of the transformer, and compute the rest again.
        allow_download: fetch what is not in Hugging Face's cache on this machine.
        max_sequence_length: tokens of a prompt, as `load_flow`.
        lora: a LoRA that is merged into the flow first, as `load_flow`.
        revision: branch, tag or commit of a Hugging Face repository.
        variant: of the weights' files, such as "fp16".
        torch_dtype: of the base's weights; what is trained is float32.
        base: a mark of the weights that it must be on, as files have it; any where None.

    Raises:
        ImportError: without peft.
        ValueError: for a family whose transformer has no known place for the embedding, a pattern that no layer has, or
            settings out of range; and as `load_flow`.
        CheckpointError: for a flow of other weights than `base`.
    """

    time_rate = 250.0  # transformers see cosines of 1000 s: a step of finite differences must be small to them

    def __init__(
        self,
        name: str,
        rank: int = 16,
        ranks: dict[str, int] | None = None,
        targets: str | None = None,
        guidance_scales: Sequence[float] = (),
        vae: str | None = None,
        image_size: int | None = None,
        torch_dtype: str = "float32",
        checkpointing: bool = False,
        allow_download: bool = False,
        max_sequence_length: int | None = None,
        lora: str | None = None,
        base: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        if rank < 0:
            raise ValueError(f"rank {rank} must be at least 0")
        check_guidance_scales(guidance_scales)
        opening = {
            "name": name, "vae": vae, "image_size": image_size, "torch_dtype": torch_dtype,
            "checkpointing": checkpointing, "allow_download": allow_download,
            "max_sequence_length": max_sequence_length, "lora": lora, "revision": revision, "variant": variant,
        }  # fmt: skip
        super().__init__(opening, base, rank=rank, ranks=ranks, targets=targets, guidance_scales=list(guidance_scales))

    def add_to(self, flow: TextToImageFlow, **options: Any) -> None:
        guidance_scales, rank = options["guidance_scales"], options["rank"]
        if guidance_scales and flow.transformer.config.get("guidance_embeds"):
            raise ValueError(
                f"guidance_scales {list(guidance_scales)}: {flow.opened_by['name']} has guidance as an input, at its "
                f"usual {flow.usual_guidance:g} here, and the teacher's would come on top: leave them out"
            )
        self.guidance_scales = tuple(guidance_scales)
        tokens, times = (_place(flow, where) for where in ("tokens", "times"))
        width, latent = _width(flow), self.state_shape[0] * flow.patch_size**2
        self.times = nn.Linear(3 * 2 * FREQUENCIES, width)
        self.shift, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.shift, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.patches = nn.Linear(latent, width)
        self.lora = LoRA(flow, NAME, rank, ranks=options["ranks"], targets=options["targets"]) if rank else None
        self._added: tuple[Tensor, Tensor] | None = None  # to the embedding of the time, and to the tokens
        times.register_forward_hook(lambda *found: self._with(0, found[-1]))
        tokens.register_forward_hook(lambda *found: self._with(1, found[-1]))

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, conditions: Conditions) -> Tensor:
        scale = torch.ones_like(t) if conditions.guidance is None else conditions.guidance.to(t)
        known = scale - 1 if self.guidance_scales else torch.zeros_like(t)
        c = F.silu(self.times(torch.cat([_embedded(u - s), _embedded(t), _embedded(known)], dim=1)))
        added = self.gate(c)[:, None] * self.patches(patches(x_t, self.flow.patch_size))
        self._added = self.shift(c), added
        try:
            with self.lora.on() if self.lora is not None else nullcontext():
                return self.flow.velocity(s, x, conditions)
        finally:
            self._added = None

    def _with(self, which: int, found: Tensor) -> Tensor:
        """What a module of the transformer gives, with what is added to it in a call of this network."""
        return found if self._added is None else found + self._added[which].to(found.dtype)

    @property
    def teacher_network(self) -> BaseNetwork:
        """The base flow, of the same weights."""
        return BaseNetwork(self.flow, {})


class BaseNetwork(PromptedNetwork):
    """A flow as a network without weights of its own, for the teacher."""

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, conditions: Conditions) -> Tensor:
        return self.flow.velocity(s, x, conditions)


def _place(flow: TextToImageFlow, what: str) -> nn.Module:
    """The module of the transformer that makes tokens, or the embedding of the time."""
    name = flow.adapter_places.get(what)
    if name is None:
        raise ValueError(f"a {type(flow).__name__} takes no adapter: SD3Flow, FluxFlow and SanaFlow do")
    return flow.transformer.get_submodule(name)


def _width(flow: TextToImageFlow) -> int:
    config = flow.transformer.config
    return int(config.num_attention_heads) * int(config.attention_head_dim)


def _embedded(values: Tensor) -> Tensor:
    """`(B, 2 FREQUENCIES)` of numbers `(B,)` of the order of one, zero at zero: sines, and cosines less one."""
    powers = torch.arange(FREQUENCIES, device=values.device, dtype=torch.float32) / (FREQUENCIES - 1)
    angles = values.float()[:, None] * (2 * math.pi * torch.exp(powers * math.log(16.0)) / 4)
    return torch.cat([angles.sin(), angles.cos() - 1], dim=1)
