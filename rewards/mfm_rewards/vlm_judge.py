"""A vision-language model as the judge of images, behind an API that is like OpenAI's."""

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
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from mfm_rewards.endpoint import Endpoint, is_this_machine
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
    it), one image a request, at temperature 0. Its whole answer must be `{"score": number}`, in the range.

    Args:
        url: of the API, such as http://127.0.0.1:8000/v1.
        model: its name there.
        rubric: what is to be judged; {prompt} stands for the image's prompt. Without it no prompts are needed. A
            general one where None.
        low: lowest score.
        high: highest score.
        scale: factor of the reward.
        cache: folder that keeps the scores, by image, prompt, rubric, range and model; none where None.
        key_variable: name of the environment variable that holds the API's key; no key is sent where None.
        workers: requests at the same time.
        max_tokens: of an answer; models that reason before it need more.
        json_mode: ask the server to let the model write JSON alone, where it can (response_format).
        attempts: how often the model is asked where its answer is not of the form.
        timeout: seconds without any byte from the server after which a try has failed.
        retries: tries after the first one, where the server does not answer, or is busy.
        wait: seconds before the second try, doubled from try to try, up to a minute.

    Raises:
        ValueError: for a value out of range, or an environment variable that is not set.
    """

    differentiable = False
    needs = ("images", "prompts")

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
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
    ) -> None:
        super().__init__()
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low ({low}) must be below high ({high}), both finite")
        for name, value in (("workers", workers), ("max_tokens", max_tokens), ("attempts", attempts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
            raise ValueError(f"cache {cache} is a file: expected a folder")
        self.endpoint = Endpoint(url, timeout, retries, wait, _authorization(key_variable, url))
        self.model, self.rubric, self.low, self.high, self.scale = model, rubric or RUBRIC, low, high, scale
        self.cache = None if cache is None else Path(cache)
        self.workers, self.max_tokens, self.json_mode, self.attempts = workers, max_tokens, json_mode, attempts
        if PLACEHOLDER not in self.rubric:
            self.needs = ("images",)

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        if not images.isfinite().all():
            raise RewardError(f"{self.endpoint.url}: images that are not finite cannot be judged")
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        texts = [self._text(prompt) for prompt in (prompts if prompts is not None else [""] * len(images))]
        keys = [self._key(image, text) for image, text in zip(pixels, texts, strict=True)]
        asked = {key: (key, image, text) for key, image, text in zip(keys, pixels, texts, strict=True)}  # each once
        pool = ThreadPoolExecutor(self.workers)
        try:
            scores = dict(zip(asked, pool.map(lambda each: self._score(*each), asked.values()), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)  # after the first failure no others are begun
        return self.scale * torch.tensor([scores[key] for key in keys], dtype=torch.float32, device=images.device)

    def _text(self, prompt: str) -> str:
        asked = f'Answer with JSON alone: {{"score": a number from {self.low:g} to {self.high:g}}}'
        return f"{self.rubric.replace(PLACEHOLDER, prompt)}\n{asked}"

    def _key(self, image: np.ndarray, text: str) -> str:
        """What a score belongs to; the text has prompt, rubric and range."""
        named = json.dumps([self.model, text, image.shape])
        return hashlib.sha256(named.encode() + np.ascontiguousarray(image).tobytes()).hexdigest()

    def _score(self, key: str, image: np.ndarray, text: str) -> float:
        file = None if self.cache is None else self.cache / key[:2] / f"{key}.json"
        if file is not None and file.is_file():
            try:
                return self._parsed(file.read_text())
            except ValueError as error:
                log.warning("%s is left out: %s", file, error)
        score = self._asked(image, text)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".partial", delete=False) as partial:
                json.dump({"score": score}, partial)
            os.replace(partial.name, file)  # whole, whoever else writes it
        return score

    def _asked(self, image: np.ndarray, text: str) -> float:
        body, what = json.dumps(self._request(image, text)).encode(), ""
        for attempt in range(1, self.attempts + 1):
            answer = self.endpoint.ask_json("/chat/completions", body)
            try:
                return self._parsed(_content(answer))
            except ValueError as error:
                what = str(error)
            if attempt < self.attempts:
                log.warning("%s: %s; asked again, %d of %d", self.model, what, attempt + 1, self.attempts)
        raise self.endpoint.wrong(
            "/chat/completions", f"not of the form, {self.attempts} time(s) ({self.model}): {what}"
        )

    def _request(self, image: np.ndarray, text: str) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(_png(image)).decode()}"
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
        request = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        request |= {"temperature": 0, "max_tokens": self.max_tokens}
        return request | ({"response_format": {"type": "json_object"}} if self.json_mode else {})

    def _parsed(self, content: str) -> float:
        """The score of an answer; ValueError unless it is of the form."""
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
