"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.backbones.flux import packed, unpacked
from mfm_lightning.backbones.lumina2 import as_long_as
from mfm_lightning.backbones.schedulers import uniform_sigmas
from mfm_lightning.conditions import Conditions


class QwenImageFlow(TextToImageFlow):
    """The flow of a `QwenImagePipeline`. States are latents `(B, 16, h, w)`, packed into tokens of 2x2.

    There is guidance where a negative prompt is given, as in the pipeline. Guided velocities keep the norm of the
    conditional one, token by token. As `TextToImageFlow`.
    """

    pipeline = "QwenImagePipeline"
    usual_negative = None
    guidance_argument = "true_cfg_scale"
    patch_size = 2

    @property
    def channels(self) -> int:
        return int(self.transformer.config.in_channels) // 4

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        height, width = x.shape[2:]
        text = given.text
        assert text is not None
        longest = text.shape[1] if given.mask is None else int(given.mask.sum(dim=1).max())  # padding of other rows
        out = self.transformer(
            hidden_states=self._typed(packed(x)),
            timestep=1 - t,
            encoder_hidden_states_mask=None if given.mask is None else given.mask[:, :longest],
            encoder_hidden_states=self._typed(text[:, :longest]),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return -unpacked(out, height, width)

    def _guided(self, null: Tensor, velocity: Tensor, scale: Tensor) -> Tensor:
        height, width = velocity.shape[2:]
        tokens = packed(velocity), packed(super()._guided(null, velocity, scale))
        return unpacked(as_long_as(*tokens), height, width)

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        text, mask = pipe.encode_prompt(
            prompt, device=self.encoder_device, max_sequence_length=self.max_sequence_length
        )
        mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if mask is None else mask
        return {"text": text, "mask": mask}

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        return uniform_sigmas(steps, scheduler, self.state_shape[1] * self.state_shape[2] // 4)

    def _unscaled(self, latents: Tensor) -> Tensor:
        """A video of one frame, `(B, C, 1, h, w)`."""
        config = self.pipe.vae.config
        mean, std = (
            latents.new_tensor(value)[:, None, None, None] for value in (config.latents_mean, config.latents_std)
        )
        return latents[:, :, None] * std + mean
