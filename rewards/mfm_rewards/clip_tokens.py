"""CLIP's tokens of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mfm_rewards.hub import find_folder

DEFAULT = "openai/clip-vit-large-patch14"  # all CLIP models here have its vocabulary
NEEDED = ["tokenizer.json|vocab.json", "tokenizer.json|merges.txt"]


class CLIPTokenizer:
    """N prompts to token ids `(N, length)`; longer ones are cut off.

    Args:
        tokenizer: a folder or Hugging Face id; where None, the one in `beside` if there is one, else that of the
            package openai-clip, else `DEFAULT`: they are the same.
        beside: the folder of the weights.
        length: the model's number of positions.
        allow_download: download files that are not on this machine.

    Raises:
        FileNotFoundError: if it is not there, with the command that fetches it.
    """

    def __init__(
        self, tokenizer: str | None = None, beside: Path | None = None, length: int = 77, allow_download: bool = False
    ) -> None:
        self.length, self._tokens = length, None
        if tokenizer is None and beside is not None and any((beside / n).is_file() for n in NEEDED[0].split("|")):
            tokenizer = str(beside)
        if tokenizer is None and _openai_clip() is not None:
            return
        from transformers import CLIPTokenizerFast

        folder = find_folder(
            tokenizer or DEFAULT, NEEDED, ["vocab.json", "merges.txt"], allow_download, what="CLIP tokenizer"
        )
        self._tokens = CLIPTokenizerFast.from_pretrained(str(folder))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        if self._tokens is None:
            return _openai_clip().tokenize(list(prompts), self.length, truncate=True).long()
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self._tokens(list(prompts), **options).input_ids


def _openai_clip() -> Any:
    """The package openai-clip, if it is installed; another package of the name `clip` does not count."""
    try:
        with warnings.catch_warnings():  # of a deprecated module that it imports
            warnings.simplefilter("ignore")
            import clip
    except ImportError:
        return None
    return clip if hasattr(clip, "tokenize") else None
