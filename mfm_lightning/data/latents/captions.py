"""Captions to embeddings of a text-to-image flow, by text encoders that are loaded once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from mfm_lightning.backbones import TextToImageFlow
from mfm_lightning.backbones.embeddings import Embedding, size_of
from mfm_lightning.data.latents.index import NULL, read_null
from mfm_lightning.data.latents.shard_writer import Text
from mfm_lightning.data.latents.text_form import CAPTION_BYTES, TextForm
from mfm_lightning.utils.atomic import whole_file
from mfm_rewards.execution import Precision


class CaptionEncoder:
    """What shards keep of captions. A caption that was there before is not embedded again while it is in memory.

    Args:
        flow: whose embeddings they are; its text encoders stay in memory from their first use on.
        kept: floating type in which embeddings are kept.
        folder: of the shards, which has the empty prompt's embedding; made where it is missing.
    """

    def __init__(self, flow: TextToImageFlow, kept: Precision, folder: Path) -> None:
        self.flow, self.kept, self.folder = flow, kept, folder
        flow.keep_encoders = True
        self._cut: dict[str, bool] = {}

    @cached_property
    def form(self) -> TextForm:
        """Of the embeddings.

        Raises:
            ValueError: for a flow without text encoders, or embeddings that are not finite in their type.
        """
        tokens = self.flow.max_sequence_length
        if (self.folder / NULL).is_file():
            return TextForm.of(read_null(self.folder), self.kept, tokens)
        null = self._embedding("")
        form = TextForm.of(null, self.kept, tokens)
        with whole_file(self.folder / NULL, sync=True) as partial:
            partial.write_bytes(form.file(null))
        return form

    def __call__(self, caption: str) -> tuple[Text, bool]:
        """What is kept of a caption, and whether its end is left out, for it has too many tokens or bytes."""
        kept = self.form.caption(caption)
        if kept not in self._cut:
            with _quiet():
                self._cut[kept] = self.flow.is_cut(kept)
        return Text(kept, self._embedding(kept)), self._cut[kept] or len(caption.strip().encode()) > CAPTION_BYTES

    def _embedding(self, caption: str) -> Embedding:
        with _quiet():
            found = self.flow.encode([caption], guidance=self.flow.no_guidance)
        tensors = {"text": found.text, "mask": found.mask, "pooled": found.pooled}
        return {name: value for name, value in tensors.items() if value is not None}

    def line(self, sample_bytes: int) -> str:
        """What a caption takes, such as "333 tokens, kept in bf16: 2.7 MB of the 4.8 MB of a sample"."""
        form = self.form
        size = size_of(form.empty(1))
        return (
            f"captions: {form.tokens} tokens, kept in {self.kept}: {size / 1e6:.3g} MB of the {sample_bytes / 1e6:.3g} "
            "MB of a sample"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers says of each long prompt what it leaves out; here all such are counted."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
