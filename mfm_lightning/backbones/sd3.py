"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.backbones.schedulers import shift_of_length
from mfm_lightning.conditions import Conditions


class SD3Flow(TextToImageFlow):
    """The flow of a `StableDiffusion3Pipeline`; the guidance of skipped layers is not there. As `TextToImageFlow`."""

    pipeline = "StableDiffusion3Pipeline"
    counting_tokenizer = "tokenizer_3"
    patch_size = 2
    adapter_places: ClassVar = {"tokens": "pos_embed", "times": "time_text_embed"}

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        return -self.transformer(
            hidden_states=self._typed(x),
            timestep=1000 * (1 - t),
            encoder_hidden_states=self._typed(given.text),
            pooled_projections=self._typed(given.pooled),
            return_dict=False,
        )[0]

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt,
            None,
            None,
            device=self.encoder_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"text": text, "pooled": pooled}

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        height, width = (side // self.transformer.config.patch_size for side in self.state_shape[1:])
        return {"num_inference_steps": steps, "mu": shift_of_length(scheduler, height * width, 1.16)}
