"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.backbones.schedulers import uniform_sigmas
from mfm_lightning.conditions import Conditions


class ZImageFlow(TextToImageFlow):
    """The flow of a `ZImagePipeline`, whose times run as ours. The pipeline's guidance scale adds so many times
    v - v_null to v; the scale here is one more, so that 1 is none. As `TextToImageFlow`.
    """

    pipeline = "ZImagePipeline"
    patch_size = 2

    def _usual_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def channels(self) -> int:
        return int(self.transformer.in_channels)

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        text, mask = self._typed(given.text), given.mask
        assert text is not None
        rows = list(text) if mask is None else [row[there.bool()] for row, there in zip(text, mask, strict=True)]
        frames = self._typed(x[:, :, None])
        assert frames is not None
        out = self.transformer(list(frames), t, rows, return_dict=False)[0]
        return torch.stack([frame.float() for frame in out]).squeeze(2)

    @property
    def usual_guidance(self) -> float:
        return super().usual_guidance + 1

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        rows, _ = pipe.encode_prompt(
            prompt,
            device=self.encoder_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        text = rows[0][None]
        return {"text": text, "mask": torch.ones(text.shape[:2], dtype=torch.long, device=text.device)}

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        return uniform_sigmas(steps, scheduler, self.state_shape[1] * self.state_shape[2] // 4)
