"""A vision-language model as the judge of images, behind an API that is like OpenAI's, or on this machine."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from mfm_rewards.endpoint import Endpoint, is_this_machine
from mfm_rewards.execution import Precision
from mfm_rewards.local_judge import LocalJudge
from mfm_rewards.protocol import Reward, RewardError
from mfm_rewards.registry import register

log = logging.getLogger(__name__)
PLACEHOLDER = "{prompt}"
RUBRIC = (
    "Judge this image, which was generated for the prompt below. Consider whether all objects, attributes, numbers and "
    "relations of the prompt are there, and whether the image is free of artefacts. The lowest score is for an image "
    "that has nothing to do with the prompt, the highest for one without any fault.\nPrompt: {prompt}"
)


@register("vlm_judge")
class VLMJudge(Reward):
    """The score that a vision-language model gives an image for its prompt, by a rubric; not differentiable.

    The model is asked through an API that is like OpenAI's (chat completions; vLLM, SGLang, llama.cpp and others serve
    it), or is one of transformers and runs here. It sees one image at a time, and says what is most probable
    (temperature 0). Its whole answer must be `{"score": number}`, or as `pattern` has it, in the range.

    Args:
        url: of the API, such as http://127.0.0.1:8000/v1; or else `weights`.
        model: its name there.
        weights: of a model that runs here: a folder, or a Hugging Face id, such as Qwen/Qwen2-VL-2B-Instruct.
        rubric: what is to be judged; {prompt} stands for the image's prompt. Without it no prompts are needed. A
            general one where None.
        low: lowest score.
        high: highest score.
        pattern: regular expression of a whole answer, whose one group is the score, for models that were trained to
            answer in a form of their own; the rubric must ask for it. JSON is asked for where None.
        scale: factor of the reward.
        cache: folder that keeps the scores, by image, prompt, rubric, range and model; none where None.
        key_variable: name of the environment variable that holds the API's key; no key is sent where None.
        workers: requests at the same time.
        max_tokens: of an answer; models that reason before it need more.
        json_mode: ask the server to let the model write JSON alone, where it can (response_format).
        attempts: how often the API is asked where an answer is not of the form; a model here says the same again.
        timeout: seconds without any byte from the server after which a try has failed.
        retries: tries after the first one, where the server does not answer, or is busy.
        wait: seconds before the second try, doubled from try to try, up to a minute.
        precision: of the weights of a model here: "fp32", "bf16" or "fp16".
        allow_download: fetch them where they are not in Hugging Face's cache on this machine.

    Raises:
        ValueError: for a value out of range, an environment variable that is not set, a pattern without one group, or
            unless there is one of url and weights.
        FileNotFoundError, ImportError, CheckpointError: as `LocalJudge`.
    """

    differentiable = False
    needs = ("images", "prompts")

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        weights: str | None = None,
        rubric: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
        pattern: str | None = None,
        scale: float = 1.0,
        cache: str | None = None,
        key_variable: str | None = None,
        workers: int = 8,
        max_tokens: int = 512,
        json_mode: bool = True,
        attempts: int = 3,
        timeout: float = 120.0,
        retries: int = 6,
        wait: float = 0.5,
        precision: Precision = "bf16",
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        if (url is None) == (weights is None) or (url is None) != (model is None):
            raise ValueError(
                f"give url and model, of an API, or weights, of a model that runs here; got url {url}, model {model}, "
                f"weights {weights}"
            )
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low ({low}) must be below high ({high}), both finite")
        for name, value in (("workers", workers), ("max_tokens", max_tokens), ("attempts", attempts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
            raise ValueError(f"cache {cache} is a file: expected a folder")
        self.pattern = None if pattern is None else _compiled(pattern, rubric)
        self.endpoint = (
            None if url is None else Endpoint(url, timeout, retries, wait, _authorization(key_variable, url))
        )
        self.local = None if weights is None else LocalJudge(weights, precision, max_tokens, allow_download)
        self.model = model if self.local is None else f"{weights} {self.local.mark} {precision}"
        self.where = weights if self.endpoint is None else self.endpoint.url
        self.rubric, self.low, self.high, self.scale = rubric or RUBRIC, low, high, scale
        self.cache = None if cache is None else Path(cache)
        self.workers, self.max_tokens, self.json_mode, self.attempts = workers, max_tokens, json_mode, attempts
        if PLACEHOLDER not in self.rubric:
            self.needs = ("images",)

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        if not images.isfinite().all():
            raise RewardError(f"{self.where}: images that are not finite cannot be judged")
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        texts = [self._text(prompt) for prompt in (prompts if prompts is not None else [""] * len(images))]
        keys = [self._key(image, text) for image, text in zip(pixels, texts, strict=True)]
        asked = {key: (key, image, text) for key, image, text in zip(keys, pixels, texts, strict=True)}  # each once
        pool = ThreadPoolExecutor(self.workers if self.local is None else 1)
        try:
            scores = dict(zip(asked, pool.map(lambda each: self._score(*each), asked.values()), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # after the first failure no others are begun
        return self.scale * torch.tensor([scores[key] for key in keys], dtype=torch.float32, device=images.device)

    def _text(self, prompt: str) -> str:
        if self.pattern is not None:
            return self.rubric.replace(PLACEHOLDER, prompt)
        asked = f'Answer with JSON alone: {{"score": a number from {self.low:g} to {self.high:g}}}'
        return f"{self.rubric.replace(PLACEHOLDER, prompt)}\n{asked}"

    def _key(self, image: np.ndarray, text: str) -> str:
        """What a score belongs to; the text has prompt, rubric and, without a pattern, the range."""
        more = [] if self.pattern is None else [self.pattern.pattern, self.low, self.high]
        named = json.dumps([self.model, text, image.shape, *more])
        return hashlib.sha256(named.encode() + np.ascontiguousarray(image).tobytes()).hexdigest()

    def _score(self, key: str, image: np.ndarray, text: str) -> float:
        file = None if self.cache is None else self.cache / key[:2] / f"{key}.json"
        if file is not None and file.is_file():
            try:
                return self._of_json(file.read_text())
            except ValueError as error:
                log.warning("%s is left out: %s", file, error)
        score = self._asked(self.endpoint, image, text) if self.endpoint is not None else self._here(image, text)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".partial", delete=False) as partial:
                json.dump({"score": score}, partial)
            os.replace(partial.name, file)  # whole, whoever else writes it
        return score

    def _here(self, image: np.ndarray, text: str) -> float:
        try:
            return self._parsed(cast(LocalJudge, self.local).answer(image, text))
        except ValueError as error:
            raise RewardError(f"{self.where}: an answer that is not of the form: {error}") from error

    def _asked(self, endpoint: Endpoint, image: np.ndarray, text: str) -> float:
        body, what = json.dumps(self._request(image, text)).encode(), ""
        for attempt in range(1, self.attempts + 1):
            answer = endpoint.ask_json("/chat/completions", body)
            try:
                return self._parsed(_content(answer))
            except ValueError as error:
                what = str(error)
            if attempt < self.attempts:
                log.warning("%s: %s; asked again, %d of %d", self.model, what, attempt + 1, self.attempts)
        raise endpoint.wrong("/chat/completions", f"not of the form, {self.attempts} time(s) ({self.model}): {what}")

    def _request(self, image: np.ndarray, text: str) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        request = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        request |= {"temperature": 0, "max_tokens": self.max_tokens}
        json_mode = self.json_mode and self.pattern is None
        return request | ({"response_format": {"type": "json_object"}} if json_mode else {})

    def _parsed(self, content: str) -> float:
        """The score of an answer; ValueError unless it is of the form."""
        if self.pattern is None:
            return self._of_json(content)
        wanted = f"expected {self.pattern.pattern} with a number from {self.low:g} to {self.high:g}, got "
        found = self.pattern.fullmatch(content.strip())
        try:
            score = float(found[1]) if found is not None else math.nan
        except (TypeError, ValueError):  # a group that is no number, or has no part in the match
            score = math.nan
        if not self.low <= score <= self.high:
            raise ValueError(f"{wanted}{content[:200]!r}")
        return score

    def _of_json(self, content: str) -> float:
        """The score in JSON, as answers and the cache have it."""
        wanted = f'expected {{"score": a number from {self.low:g} to {self.high:g}}}, got {content[:200]!r}'
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(wanted) from None
        score = found.get("score") if isinstance(found, dict) and len(found) == 1 else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not self.low <= score <= self.high:
            raise ValueError(wanted)
        return float(score)


def _content(answer: dict[str, Any]) -> str:
    """The text of a chat completion; ValueError if there is none."""
    try:
        choice = answer["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"no chat completion: {json.dumps(answer)[:200]}") from None
    if reason == "length":
        raise ValueError("the answer was cut off: raise max_tokens")
    if not isinstance(content, str):
        raise ValueError(f"no text in the answer: {json.dumps(choice)[:200]}")
    return content


def _compiled(pattern: str, rubric: str | None) -> re.Pattern[str]:
    """A pattern with one group, and a rubric that asks for its form; ValueError if they are not."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if found.groups != 1:
        raise ValueError(f"pattern {pattern!r} has {found.groups} groups: expected one, the score")
    if rubric is None:
        raise ValueError(f"pattern {pattern!r}: give a rubric that asks for answers of that form")
    return found


def _authorization(variable: str | None, url: str) -> dict[str, str]:
    """The header with the key of an environment variable."""
    if variable is None:
        return {}
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ValueError("key_variable must be the name of an environment variable, and no key itself")
    if not (key := os.environ.get(variable, "").strip()):
        raise ValueError(f"key_variable {variable}: no such environment variable is set")
    if urlsplit(url).scheme == "http" and not is_this_machine(url):
        raise ValueError(f"url {url} would send the key without encryption: give one of https://")
    return {"Authorization": f"Bearer {key}"}


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, format="PNG")
    return buffer.getvalue()
