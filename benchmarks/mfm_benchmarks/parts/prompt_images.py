"""Images of prompts by a pretrained flow: what all methods run on, and one block of a method's images."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.suite import Outcome
from mfm_lightning.alignment import AlignmentMethod
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.backbones import AdaptedFlow, TextToImageFlow
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Conditions
from mfm_lightning.data.prompts import PromptNoise
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_lightning.sampling.prompts import Prompt
from mfm_lightning.utils.devices import finished
from mfm_rewards import Reward

BEST = "best"  # folder of the best look-aheads, beside the images


@dataclass
class PromptFlow:
    """A flow with the prompts that all methods take, from the same noise.

    Attributes:
        flow: the base flow.
        prompts: each has `images_per_prompt` images.
        layout: of the folders of images.
        seed: of noise, x0's and the methods'; a prompt with a seed of its own has that.
        guidance, negative: as `TextToImageFlow.encode` takes them.
        batch_size: images of a method at once.
        adapted: the flow with its adapter, for methods that need more than a drift; None where there is no adapter.
        mfm: a fingerprint of the adapter's file.
    """

    flow: TextToImageFlow
    prompts: list[Prompt]
    images_per_prompt: int
    layout: str
    seed: int
    guidance: float | None
    negative: str | None
    batch_size: int
    device: torch.device
    adapted: AdaptedFlow | None = None
    mfm: str = ""
    _warm: bool = False

    def prepare(self, captions: Sequence[str] = ()) -> None:
        """Encode all prompts and captions, which text encoders are loaded for and dropped again, before the transformer
        runs."""
        texts = list(dict.fromkeys([*(prompt.text for prompt in self.prompts), *captions]))
        self.flow.keep_embeddings(texts, self.negative, self.guidance)
        self.flow.eval().requires_grad_(False).to(self.device)
        if self.adapted is not None:
            self.adapted.to(self.device)

    def model_for(self, method: AlignmentMethod, reward: Reward) -> TextToImageFlow | AdaptedFlow:
        """The flow alone where the method needs no more, so that its images are the same with and without an adapter;
        else the flow with its adapter.

        Raises:
            RewardError: for a reward without a gradient that the method needs.
            CheckpointError: for a method that needs an adapter, where there is none.
        """
        try:
            method.check(reward, self.flow)
            return self.flow
        except CheckpointError:
            if self.adapted is None:
                raise
        method.check(reward, self.adapted)
        return self.adapted

    @property
    def images(self) -> list[PromptImage]:
        """Of all prompts."""
        return PromptFolder("", self.prompts, self.images_per_prompt, self.layout).images

    @property
    def identity(self) -> dict[str, Any]:
        """What a block's images and seconds depend on, besides the method and the block."""
        return {
            **self.flow.identity, "max_rows": self.flow.max_rows, "guidance": self.guidance, "negative": self.negative,
            "batch_size": self.batch_size,
        }  # fmt: skip

    def folder(self, root: Path, name: str, settings: dict[str, Any]) -> PromptFolder:
        """Where the images of a setting go: a folder of its own for whatever they depend on."""
        prompts = [[prompt.text, prompt.seed, dict(prompt.more)] for prompt in self.prompts]
        identity = {
            **self.identity,
            **settings,
            "prompts": prompts,
            "images": self.images_per_prompt,
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps([identity, self.layout], sort_keys=True, default=str).encode()).hexdigest()
        path = root / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '_', name)[:80]}-{digest[:8]}"
        return PromptFolder(path, self.prompts, self.images_per_prompt, self.layout)

    def noise(self, images: Sequence[PromptImage]) -> Tensor:
        """x0 `(B, C, h, w)`, which depends on an image's seed and number alone."""
        noise = PromptNoise(images, self.flow.state_shape, self.seed)
        return torch.stack([noise[i][0] for i in range(len(images))]).to(self.device)

    def conditions(self, images: Sequence[PromptImage]) -> Conditions:
        """Of the images' prompts."""
        return self.encoded([image.prompt.text for image in images])

    def encoded(self, texts: Sequence[str]) -> Conditions:
        """Of texts."""
        return self.flow.encode(texts, self.negative, self.guidance).to(self.device)

    def warm(self, images: Sequence[PromptImage]) -> None:
        """Run the flow once, so that no method's time has what only the first evaluation takes."""
        if not self._warm:
            with torch.no_grad():
                x0 = self.noise(images)
                self.flow.decoder(self.flow.drift(0.5, x0, self.conditions(images)))
            self._warm = True

    def note(self, image: PromptImage, network: float, reward: float, seconds: float) -> dict[str, Any]:
        """Of an image's line in its folder."""
        nfe = {"network": network, "reward": reward}
        return {"seed": image.noise_key(self.seed)[0], "nfe": nfe, "seconds": round(seconds, 4)}

    def batches(self, images: Sequence[PromptImage], size: int) -> Iterator[Sequence[PromptImage]]:
        """So many at once."""
        for begin in range(0, len(images), size):
            yield images[begin : begin + size]


def make(
    source: PromptFlow,
    method: AlignmentMethod,
    reward: Reward,
    scale: float,
    folder: PromptFolder,
    images: Sequence[PromptImage],
) -> Outcome:
    """Some images of a method, written to its folder, and what each cost.

    NFE are what went through the target's counter, whatever the method says of itself. Seconds are those of the method
    with the decoding and one scoring of what it returns.

    Returns:
        tensors `(B,)`: `network` and `reward` evaluations, and `seconds`; numbers: `best`, whether there are best
        look-aheads beside the images.
    """
    costs, best, model = [], False, source.model_for(method, reward)
    for part in source.batches(images, source.batch_size):
        source.warm(part)
        x0, generators = source.noise(part), [image.method_generator(source.seed) for image in part]
        target = Target(model, reward, source.flow.decoder, source.conditions(part), reward_scale=scale)
        target.meter = Meter()
        began = finished(source.device)
        with torch.enable_grad():
            result = method(target, x0, generators)
        seconds = (finished(source.device) - began) / len(part)
        if len(result.states) != len(part):
            raise ValueError(f"{len(result.states)} images for {len(part)}: the suite compares one for each noise")
        cost = [target.meter.network / len(part), target.meter.reward / len(part), seconds]
        for i, image in enumerate(part):
            folder.write(image.index, result.images[i], source.note(image, *cost))
            if result.best_images is not None and result.best_images is not result.images:
                folder.write_beside(BEST, image.index, result.best_images[i])
                best = True
            costs.append(cost)
    network, reward_, seconds_ = torch.tensor(costs, dtype=torch.float64).T
    return Outcome({"best": best}, {"network": network, "reward": reward_, "seconds": seconds_})
