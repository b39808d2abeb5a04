"""A text-to-image flow's transformer as a network in training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedded
from mfm_lightning.backbones.loading import load_flow
from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import EmbedsPrompts, VelocityNetwork
from mfm_lightning.utils.configs import find_shipped

log = logging.getLogger(__name__)
FOLDER = "pipeline"


def opened(name: str, image_size: int | None = None, **options: Any) -> TextToImageFlow:
    """`load_flow`, also of a folder of settings of the package; all rows of a batch are in the transformer at once."""
    return load_flow(find_shipped(name), image_size, max_rows=64, **options)


class PromptedNetwork(VelocityNetwork, EmbedsPrompts):
    """Base class of networks that are the transformer of a text-to-image flow, or part of it. States are the pipeline's
    scaled latents. The null condition, of dropped prompts, is the empty prompt.

    One that holds the transformer trains on one device or by DDP: FSDP's whole copies, for pictures and files, would be
    without the flow's other parts. Of a frozen one, with what is trained in it, there are no such copies (`elsewhere`).

    Args:
        flow: whose VAE and text encoders are no part of what is trained.
        config: arguments of the constructor.
    """

    num_classes = 0
    guidance_scales: tuple[float, ...] = ()
    shardable = False

    def __init__(self, flow: TextToImageFlow, config: dict[str, Any]) -> None:
        super().__init__()
        self._flow = [flow]  # in a list: it is no part of this module
        self.config, self.state_shape = config, flow.state_shape
        self._null: Conditions | None = None
        self._guides: dict[tuple[str | None, float | None], Conditions] = {}  # scale and negative prompt, one row
        self._asked = False  # for captions that were not embedded yet

    @property
    def flow(self) -> TextToImageFlow:
        """The flow, with the weights as they are in training."""
        return self._flow[0]

    @property
    def null_conditions(self) -> Conditions:
        if self._null is None:  # asked for in each call
            self._null = replace(self._encoded([""]), prompts=None)
        return self._null

    def _encoded(self, prompts: Sequence[str]) -> Conditions:
        """The embeddings alone."""
        found = self.flow.encode(prompts, guidance=self.flow.no_guidance)
        return Conditions(text=found.text, mask=found.mask, pooled=found.pooled, prompts=list(prompts))

    @property
    def regions(self) -> list[nn.Module]:
        """What is compiled one by one."""
        lists = [module for module in self.flow.transformer.children() if isinstance(module, nn.ModuleList)]
        return [block for blocks in lists for block in blocks] or [self.flow.transformer]

    def embed(self, conditions: Conditions) -> Conditions:
        """With the embeddings of the prompts; those that are there already are taken as they are. From the second time
        that prompts are new, text encoders stay in memory.

        Raises:
            ValueError: where there are neither embeddings nor prompts.
        """
        device = next(self.flow.transformer.parameters()).device
        if conditions.text is not None:
            return conditions.to(device)
        if conditions.prompts is None:
            raise ValueError(
                "a text-to-image flow is trained on captions: give the data captions (CaptionedImages), or their "
                "embeddings (mfm prepare-latents --flow --captions)"
            )
        if not self.flow.has_embeddings(conditions.prompts):
            if self._asked and not self.flow.keep_encoders:
                self.flow.keep_encoders = True
                log.info("captions are new again: text encoders stay in memory; prepared shards need none")
            self._asked = True
        found = self._encoded(conditions.prompts)
        return replace(conditions, text=found.text, mask=found.mask, pooled=found.pooled).to(device)

    def guided(self, conditions: Conditions, negative: str | None = None, guidance: float | None = None) -> Conditions:
        """`embed`, with guidance and a negative prompt as `TextToImageFlow.encode` takes them; raises as both."""
        given, key = self.embed(conditions), (negative, guidance)
        if key not in self._guides:
            self._guides[key] = self.flow.encode([""], negative, guidance)
        guide = replace(self._guides[key], text=given.text, mask=given.mask, pooled=given.pooled, prompts=given.prompts)
        return guide.to(next(self.flow.transformer.parameters()).device)

    def meet(self, data: Any) -> None:
        """Take the empty prompt's embedding from data that bring embeddings, if those are of this flow's text encoders
        and latents of its VAE. Of data with few captions embed these at once.

        Raises:
            ValueError: for data of another VAE or other text encoders, with what differs.
        """
        embedded: Embedded | None = getattr(data, "embedded", None)
        if embedded is not None:
            check_same_parts(embedded, self.flow)
            self.flow.given["", False] = dict(embedded.null)
            self._null = None
        elif captions := getattr(data, "captions", None):
            self.flow.keep_embeddings(["", *captions], guidance=self.flow.no_guidance)


def check_same_parts(embedded: Embedded, flow: TextToImageFlow) -> None:
    """Raise ValueError unless data were made with this flow's parts."""
    ours, theirs = flow.parts, embedded.flow
    names = {"family": "flow", "vae": "VAE", "text_encoders": "text encoders", "max_sequence_length": "tokens"}
    if unknown := [name for name in ("vae", "text_encoders") if name not in ours or name not in theirs]:
        log.warning("%s: not known whether it is of the flow in training (%s)", embedded.place, ", ".join(unknown))
    for name, what in names.items():
        mine, other = ours.get(name), theirs.get(name)
        if mine is not None and other is not None and mine != other:
            short = [str(value)[:12] for value in (other, mine)]
            raise ValueError(
                f"{embedded.place} was made for {theirs.get('name', 'another flow')}, with other {what} ({short[0]}) "
                f"than the network's ({short[1]}): run mfm prepare-latents with the network's flow and "
                "--max-sequence-length, or train on that flow"
            )


class FlowNetwork(PromptedNetwork):
    """The transformer of a text-to-image flow of diffusers, to be trained by `flow_matching`: b_s(x) for prompts. It
    knows no second time and no condition (t, x_t), so that it draws no posteriors. A run leaves, beside
    `model.safetensors`, the whole pipeline in `pipeline/`, which `load_flow` and diffusers read.

    Args:
        name: a folder of diffusers with `model_index.json`, or a Hugging Face id. Parts of a folder that have a
            `config.json` and no weights begin with random ones, by `seed`.
        vae: folder of another VAE for it, such as `Autoencoding` writes.
        image_size: of the images in pixels; the pipeline's own where None.
        checkpointing: keep only the input of each block of the transformer, and compute the rest again.
        seed: of random weights.
        allow_download: fetch what is not in Hugging Face's cache on this machine.
        max_sequence_length: tokens of a prompt, as `load_flow`.

    Raises:
        ValueError, FileNotFoundError, ImportError, CheckpointError: as `load_flow`.
    """

    def __init__(
        self,
        name: str,
        vae: str | None = None,
        image_size: int | None = None,
        checkpointing: bool = False,
        seed: int = 0,
        allow_download: bool = False,
        max_sequence_length: int | None = None,
    ) -> None:
        config = {"name": name, "vae": vae, "image_size": image_size, "seed": seed}
        config |= {"max_sequence_length": max_sequence_length}
        flow = opened(
            name,
            image_size,
            torch_dtype="float32",
            checkpointing=checkpointing,
            allow_download=allow_download,
            vae=vae,
            random_seed=seed,
            max_sequence_length=max_sequence_length,
        )
        super().__init__(flow, config)
        self.transformer: nn.Module = flow.transformer.train().requires_grad_(True)

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, conditions: Conditions) -> Tensor:
        return self.flow.velocity(s, x, conditions)

    def write_beside(self, folder: Path) -> Path:
        """Write the pipeline with the weights as they are now."""
        pipe: Any = self.flow.whole_pipeline()
        dtype, device = next(self.parameters()).dtype, next(self.parameters()).device
        pipe.transformer.load_state_dict(self.transformer.state_dict())
        with torch.no_grad():
            pipe.save_pretrained(str(folder / FOLDER))
        self.transformer.to(device, dtype)
        return folder / FOLDER
