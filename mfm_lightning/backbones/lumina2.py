"""Lumina Image 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.backbones.schedulers import uniform_sigmas
from mfm_lightning.conditions import Conditions


class Lumina2Flow(TextToImageFlow):
    """The flow of a `Lumina2Pipeline`, whose times run as ours. Guided velocities keep the norm of the conditional one,
    row by row of the latents, as the pipeline's do. As `TextToImageFlow`.
    """

    pipeline = "Lumina2Pipeline"
    patch_size = 2

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        return self.transformer(
            hidden_states=self._typed(x),
            timestep=t,
            encoder_hidden_states=self._typed(given.text),
            encoder_attention_mask=given.mask,
            return_dict=False,
        )[0]

    def _guided(self, null: Tensor, velocity: Tensor, scale: Tensor) -> Tensor:
        return as_long_as(velocity, super()._guided(null, velocity, scale))

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        # a negative prompt gets no system prompt: the pipeline encodes it beside a prompt
        text, mask, other, other_mask = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=negative,
            negative_prompt=prompt if negative else None,
            device=self.encoder_device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"text": other, "mask": other_mask} if negative else {"text": text, "mask": mask}

    def _as_tokenized(self, prompt: str) -> str:
        return f"{self.pipe.system_prompt} <Prompt Start> {prompt}"

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        return uniform_sigmas(steps, scheduler, self.channels)  # the pipeline counts channels for tokens


def as_long_as(velocity: Tensor, guided: Tensor, dim: int = -1) -> Tensor:
    """The guided velocity with the norm of the conditional one along a dimension."""
    return guided * (velocity.norm(dim=dim, keepdim=True) / guided.norm(dim=dim, keepdim=True))
