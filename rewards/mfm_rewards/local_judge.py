"""A vision-language model of transformers that answers a question about an image, on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mfm_rewards.execution import DTYPES, Precision, check_precision
from mfm_rewards.hub import find_folder
from mfm_rewards.weights import CheckpointError

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
HEAD = 1 << 16  # bytes of a file of weights that its mark looks at, at both ends


class LocalJudge(nn.Module):
    """A chat model with a processor of images, such as Qwen2-VL. It moves with the reward that it is part of.

    Args:
        weights: a folder as `from_pretrained` reads it, or a Hugging Face id.
        precision: of the weights: "fp32", "bf16" or "fp16".
        max_tokens: of an answer.
        allow_download: fetch the weights where they are not in Hugging Face's cache on this machine.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImportError: without transformers, or with one that does not know such models.
        CheckpointError: for files that are no such model, or without a chat template.
        ValueError: for an unknown precision.
    """

    def __init__(
        self, weights: str, precision: Precision = "bf16", max_tokens: int = 512, allow_download: bool = False
    ) -> None:
        super().__init__()
        check_precision(precision)
        what = "vision-language model"
        needed = ["config.json", "preprocessor_config.json"]
        folder = find_folder(weights, needed, FILES, allow_download, what=what)
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise ImportError(f"{weights}: a {what} needs transformers 4.46 or newer: {error}") from error
        processor, model = AutoProcessor, AutoModelForImageTextToText
        try:
            self.processor: Any = processor.from_pretrained(folder, local_files_only=True)
            self.model: Any = model.from_pretrained(folder, torch_dtype=DTYPES[precision], local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CheckpointError(f"no {what} in {folder}: {said}") from error
        if not getattr(self.processor, "chat_template", None):
            raise CheckpointError(f"the {what} in {folder} has no chat template: expected chat_template.json")
        self.model.eval().requires_grad_(False)
        self.weights, self.max_tokens, self.mark = weights, max_tokens, _mark(folder)

    @torch.no_grad()
    def answer(self, image: np.ndarray, text: str) -> str:
        """What the model says, by its most probable tokens.

        Args:
            image: `(H, W, 1 or 3)`, 8-bit.
            text: that stands after the image.

        Raises:
            ValueError: for an answer that was cut off.
        """
        from PIL import Image

        picture = Image.fromarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        asked = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=[asked], images=[picture], return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)  # of floating values alone
        made = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1)
        tokens = made[0, inputs["input_ids"].shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        if len(tokens) >= self.max_tokens and tokens[-1] not in (ends if isinstance(ends, list) else [ends]):
            raise ValueError("the answer was cut off: raise max_tokens")
        return self.processor.decode(tokens, skip_special_tokens=True)


def _mark(folder: Path) -> str:
    """What tells a model's files from others': names, sizes, and the ends of each."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")):
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            found.update(opened.read(HEAD))
            opened.seek(max(0, size - HEAD))
            found.update(opened.read(HEAD))
    return found.hexdigest()[:32]
