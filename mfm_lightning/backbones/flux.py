"""FLUX.1, dev and schnell."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.backbones.schedulers import uniform_sigmas
from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.embeddings import patches


class FluxFlow(TextToImageFlow):
    """The flow of a `FluxPipeline`. States are latents `(B, 16, h, w)`, which the pipeline packs into tokens of 2x2.

    The guidance scale of conditions is the distilled one, an input of the transformer (none for schnell). Guidance by
    two evaluations has a scale of its own, and needs a negative prompt.

    Args:
        true_guidance: scale of guidance by two evaluations; 1 for none.
        options: as `TextToImageFlow`.
    """

    pipeline = "FluxPipeline"
    usual_negative = None
    counting_tokenizer = "tokenizer_2"
    patch_size = 2
    adapter_places: ClassVar = {"tokens": "x_embedder", "times": "time_text_embed"}
    no_guidance = None

    def __init__(self, pipe: Any, *, true_guidance: float = 1.0, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.true_guidance = true_guidance

    @property
    def channels(self) -> int:
        return int(self.transformer.config.in_channels) // 4

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        height, width = x.shape[2:]
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = x.new_full((len(x),), self.usual_guidance) if given.guidance is None else given.guidance.float()
        text = self._typed(given.text)
        assert text is not None
        out = self.transformer(
            hidden_states=self._typed(packed(x)),
            timestep=1 - t,
            guidance=guidance,
            pooled_projections=self._typed(given.pooled),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places(height // 2, width // 2, text),
            return_dict=False,
        )[0]
        return -unpacked(out, height, width)

    def _scale(self, conditions: Conditions) -> Tensor | None:
        return torch.tensor([self.true_guidance]) if conditions.text is not None else None

    def _asked(self, guidance: float | None) -> float | None:
        if guidance is not None and not self.transformer.config.guidance_embeds:
            raise ValueError(f"guidance {guidance:g}: this transformer (schnell) takes none: leave it out")
        return self.true_guidance

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "true_guidance": self.true_guidance}

    def _takes_guidance(self, negatives: object) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        text, pooled, _ = pipe.encode_prompt(
            prompt, device=self.encoder_device, max_sequence_length=self.max_sequence_length
        )
        return {"text": text, "pooled": pooled}

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        return uniform_sigmas(steps, scheduler, self.state_shape[1] * self.state_shape[2] // 4)


def packed(x: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` as tokens `(B, h/2 w/2, 4 C)`."""
    return patches(x, 2)


def unpacked(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `packed`."""
    B, _, C = tokens.shape
    return tokens.reshape(B, h // 2, w // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C // 4, h, w)


def places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Where each token is, `(rows * columns, 3)`: zero, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).to(like)
