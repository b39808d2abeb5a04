"""Prompts as a diffusers pipeline encodes them: embeddings, negative prompts, and the scale of guidance."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from mfm_lightning.backbones.embeddings import Embedding, EmbeddingCache, stacked
from mfm_lightning.conditions import Conditions


class PromptedPipeline(nn.Module, ABC):
    """A pipeline whose text encoders are there while prompts are encoded, and whose embeddings are kept.

    Args:
        pipe: the pipeline.
        cache: folder that keeps the embeddings of prompts; in memory where None.
        load_encoders: gives a pipeline with text encoders where `pipe` has none; it is dropped after each use.
        encoders: what the embeddings depend on besides the prompt and the pipeline's class, for the cache: a name, with
            a revision or the like.
        encoder_device: where prompts are encoded; the CPU where None.
        max_sequence_length: tokens of a prompt, as the pipeline's call takes it; its own usual number where None.

    Raises:
        ValueError: for a pipeline of another class, no tokens, or a cache of unnamed encoders.
    """

    pipeline: ClassVar[str]  # name of the diffusers class
    usual_negative: ClassVar[str | None] = ""  # what the pipeline leads away from where no negative prompt is given
    guidance_argument: ClassVar[str] = "guidance_scale"  # of the pipeline, for two evaluations or as an input
    counting_tokenizer: ClassVar[str] = "tokenizer"  # the one whose tokens max_sequence_length bounds
    no_guidance: float | None = 1.0  # the scale at which the transformer is evaluated once

    def __init__(
        self,
        pipe: Any,
        cache: str | Path | None,
        load_encoders: Callable[[], Any] | None,
        encoders: str,
        encoder_device: str | torch.device | None,
        max_sequence_length: int | None,
    ) -> None:
        super().__init__()
        if (found := type(pipe).__name__) != self.pipeline:
            raise ValueError(f"{type(self).__name__} takes a {self.pipeline}, got a {found}")
        self._pipe = [pipe]  # in a list, so that its text encoders are not moved with the rest
        self.encoder_device = torch.device(encoder_device or "cpu")
        if max_sequence_length is not None and max_sequence_length < 1:
            raise ValueError(f"max_sequence_length {max_sequence_length} must be at least 1")
        self.max_sequence_length: int = max_sequence_length or self._of_call("max_sequence_length")
        self.embeddings = EmbeddingCache(cache)
        self._load_encoders, self._encoders = load_encoders, encoders
        self.given: dict[tuple[str, bool], Embedding] = {}  # of prompts (negative ones: True), whatever the cache has
        self.keep_encoders = False  # in memory after use, for further prompts
        self._with_encoders: list[Any] = []
        if cache is not None and not encoders:
            raise ValueError("a cache of embeddings needs encoders, a name of what made them: load_flow gives it")

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._pipe[0]

    def whole_pipeline(self) -> Any:
        """The pipeline with its text encoders, which are loaded where they are not there."""
        return self.pipe if self._load_encoders is None else self._load_encoders()

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str] | str,
        negative: Sequence[str] | str | None = None,
        guidance: float | None = None,
    ) -> Conditions:
        """Conditions of prompts, on the CPU: embeddings, guidance scale, and the prompts for rewards.

        Args:
            prompts: B of them, or one.
            negative: what guidance by two evaluations leads away from, one for all or B; what the pipeline takes where
                None.
            guidance: its scale, as the pipeline takes it; the pipeline's usual one where None, 1 for none.

        Raises:
            ValueError: if a prompt is no text, the numbers do not match, the pipeline has no text encoders, or there is
                guidance and no negative prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        scale = self.usual_guidance if guidance is None else float(guidance)
        negatives = self._negatives(prompts, negative, guidance)
        wanted = self._wanted(prompts, negatives)
        rows = {key: self.given[key] for key in wanted if key in self.given}
        kept = {key: self.embeddings.find(settings) for key, settings in wanted.items() if key not in rows}
        rows |= {key: row for key, row in kept.items() if row is not None}
        rows |= dict(self._made({key: settings for key, settings in wanted.items() if key not in rows}))
        given = Conditions(
            prompts=prompts,
            guidance=scale if self._takes_guidance(negatives) else None,
            **stacked([rows[text, False] for text in prompts]),
        )
        if negatives is None:
            return given
        others = stacked([rows[text, True] for text in negatives])
        return replace(given, **{f"negative_{name}": value for name, value in others.items()})

    @torch.no_grad()
    def keep_embeddings(
        self, prompts: Sequence[str], negative: str | None = None, guidance: float | None = None
    ) -> None:
        """Encode prompts that are not in the cache yet, so that `encode` needs no text encoder for them; raises as
        `encode`."""
        wanted = self._wanted(prompts, self._negatives(prompts, negative, guidance))
        for _ in self._made({k: settings for k, settings in wanted.items() if not self._has(k, settings)}):
            pass

    def has_embeddings(self, prompts: Sequence[str]) -> bool:
        """Whether `encode` needs no text encoder for these prompts, without guidance by two evaluations."""
        return all(self._has(key, settings) for key, settings in self._wanted(prompts, None).items())

    def _has(self, key: tuple[str, bool], settings: dict[str, Any]) -> bool:
        return key in self.given or self.embeddings.has(settings)

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt has more tokens than `max_sequence_length`, so that its end is left out. It needs the
        tokenizers, which are there while text encoders are kept (`keep_encoders`)."""
        pipe = self._with_encoders[0] if self._with_encoders else self.whole_pipeline()
        tokenizer = getattr(pipe, self.counting_tokenizer, None) or pipe.tokenizer
        most = self._most_tokens if getattr(pipe, self.counting_tokenizer, None) else tokenizer.model_max_length
        return len(tokenizer(self._as_tokenized(prompt), truncation=False, verbose=False).input_ids) > most

    def _as_tokenized(self, prompt: str) -> str:
        """A prompt as the pipeline gives it to the tokenizer."""
        return prompt

    @property
    def _most_tokens(self) -> int:
        """Of a prompt, with those that the tokenizer adds."""
        return self.max_sequence_length

    @property
    def usual_guidance(self) -> float:
        """The guidance scale that the pipeline takes where none is given."""
        return float(self._of_call(self.guidance_argument))

    def _takes_guidance(self, negatives: Sequence[str] | None) -> bool:
        """Whether the scale is any use."""
        return negatives is not None

    def _asked(self, guidance: float | None) -> float | None:
        """The scale of guidance by two evaluations that is asked for; None for the pipeline's usual one."""
        return guidance

    def _negatives(
        self, prompts: Sequence[str], negative: Sequence[str] | str | None, guidance: float | None
    ) -> list[str] | None:
        """One for each prompt, or None where there is no guidance by two evaluations."""
        asked, given = self._asked(guidance), negative is not None
        negative = self.usual_negative if negative is None else negative
        if negative is None:
            if asked not in (None, 1):
                raise ValueError(f"guidance {asked:g} needs a negative prompt, even if it is a blank: negative=' '")
            return None
        if (self.usual_guidance if asked is None else asked) == 1:
            if given:
                raise ValueError("a negative prompt is no use with guidance 1: give a scale, or leave the prompt out")
            return None
        found = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(found) != len(prompts):
            raise ValueError(f"{len(found)} negative prompts for {len(prompts)} prompts: expected one, or as many")
        return found

    def _wanted(
        self, prompts: Sequence[str], negatives: Sequence[str] | None
    ) -> dict[tuple[str, bool], dict[str, Any]]:
        """Each text, as a prompt (False) and as a negative one (True), with what its embedding depends on."""
        for i, text in enumerate(prompts):
            if not isinstance(text, str):
                raise ValueError(f"prompt {i} is {text!r}: expected a text")
        tokens = self.max_sequence_length
        common = {"encoders": self._encoders, "pipeline": self.pipeline, "tokens": tokens}
        texts = [*((text, False) for text in prompts), *((text, True) for text in negatives or ())]
        return {key: {**common, "negative": key[1], "prompt": key[0]} for key in dict.fromkeys(texts)}

    def _made(self, wanted: dict[tuple[str, bool], dict[str, Any]]) -> Iterator[tuple[tuple[str, bool], Embedding]]:
        """The embeddings of texts, one after the other, which are kept; the text encoders are there until the last."""
        if not wanted:
            return
        pipe = self._with_encoders[0] if self._with_encoders else self.whole_pipeline()
        if getattr(pipe, "text_encoder", None) is None:
            raise ValueError(f"the {self.pipeline} has no text encoder: load it whole, or give Conditions of your own")
        self._to(pipe, self.encoder_device)
        self._with_encoders = [pipe] if self.keep_encoders else []
        for (text, negative), settings in wanted.items():
            row = {name: value.cpu() for name, value in self._embed(pipe, text, negative).items()}
            self.embeddings.keep(settings, row)
            yield (text, negative), row
        if not self.keep_encoders:
            self._to(pipe, torch.device("cpu"))

    def release_encoders(self) -> None:
        """Drop text encoders that were kept; a later prompt that is new loads them again."""
        self.keep_encoders = False
        for pipe in self._with_encoders:
            self._to(pipe, torch.device("cpu"))
        self._with_encoders = []

    @abstractmethod
    def _embed(self, pipe: Any, prompt: str, negative: bool) -> Embedding:
        """One row of `text`, and of `mask` and `pooled` where the family has them."""

    @staticmethod
    def _to(pipe: Any, device: torch.device) -> None:
        for name, part in pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)

    def _of_call(self, name: str) -> Any:
        """What the pipeline takes for an argument that is not given."""
        return inspect.signature(type(self.pipe).__call__).parameters[name].default
