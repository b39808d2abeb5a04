"""SANA and SANA 1.5."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mfm_lightning.backbones.base import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.conditions import Conditions


class SanaFlow(TextToImageFlow):
    """The flow of a `SanaPipeline`. Sizes are taken as they are, not from the pipeline's table of sizes; prompts, not
    negative ones, get the pipeline's instruction. As `TextToImageFlow`.
    """

    pipeline = "SanaPipeline"
    adapter_places: ClassVar = {"tokens": "patch_embed", "times": "time_embed.emb"}

    def _usual_size(self) -> tuple[int, int]:
        side = int(self.transformer.config.sample_size) * self.compression
        return side, side

    def _velocity(self, t: Tensor, x: Tensor, given: Conditions) -> Tensor:
        config = self.transformer.config
        out = self.transformer(
            self._typed(x),
            encoder_hidden_states=self._typed(given.text),
            encoder_attention_mask=given.mask,
            timestep=1000 * (1 - t) * config.timestep_scale,
            return_dict=False,
        )[0]
        return -out[:, : self.channels]  # the rest, where there is one, is a learned variance

    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        text, mask, _, _ = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.encoder_device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=None if negative else self._of_call("complex_human_instruction"),
        )
        return {"text": text, "mask": mask}

    @property
    def _most_tokens(self) -> int:
        return self.max_sequence_length - 1  # beside the instruction the pipeline leaves room for one more

    def _scheduler_arguments(self, steps: int, scheduler: Any) -> dict[str, Any]:
        return {"num_inference_steps": steps}
