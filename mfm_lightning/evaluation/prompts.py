"""Samples of a text-to-image flow in training: whether they are what the prompts say, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.backbones import FlowNetwork
from mfm_lightning.evaluation.base import ArrayData, Evaluation, ModelModule, data_of
from mfm_lightning.evaluation.features import check_features, features_of
from mfm_lightning.metrics.classifier import proportion
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import resampled
from mfm_lightning.samplers import integrate
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.figures import image_grid


class PromptEvaluation(Evaluation[ModelModule]):
    """Samples of prompts by the flow's ODE on its own times: the share that a classifier takes for the class that was
    asked for, by guidance scale and prompt, with 95 % (Wilson) intervals, and the Fréchet distance of all of them to
    the training images in the classifier's features. The noise is the same for each scale.

    Args:
        prompts: what is sampled.
        labels: the class of each prompt, in the data's numbers; those of the data in turn where None.
        guidance: scales; 1 for none.
        steps: of Euler.
        num_samples: of each prompt and scale that are measured.
        pictures: of each prompt in the picture, at the last scale.
        seed: of the noise.
        classifier: a file that `mfm fit` wrote for `Classification`; one is trained on the data where None.

    Raises:
        ValueError: for no prompts, or another number of labels.
    """

    needs_data = ("splits", "decode", "num_classes")

    def __init__(
        self,
        prompts: Sequence[str],
        labels: Sequence[int] | None = None,
        guidance: Sequence[float] = (1.0, 3.0),
        steps: int = 50,
        num_samples: int = 50,
        pictures: int = 10,
        seed: int = 0,
        classifier: str | None = None,
    ) -> None:
        self.prompts, self.labels = list(prompts), list(labels if labels is not None else range(len(prompts)))
        if not self.prompts or len(self.labels) != len(self.prompts):
            raise ValueError(f"{len(self.labels)} labels for {len(self.prompts)} prompts: expected one each")
        self.guidance, self.steps, self.num_samples = list(guidance), steps, num_samples
        self.pictures, self.seed, self.classifier = pictures, seed, classifier

    def check(self, module: ModelModule) -> None:
        super().check(module)
        _network(module)
        check_features(module, self.classifier)
        if max(self.labels) >= (known := data_of(module).num_classes):
            raise ValueError(f"labels {self.labels}: the data have {known} classes, from 0")

    @torch.no_grad()
    def measure(self, module: ModelModule, folder: Path) -> None:
        data: ArrayData = data_of(module)
        classifier, fitted = features_of(data, self.classifier, folder / "features.safetensors")
        rows: list[dict[str, Any]] = []
        for scale in self.guidance:
            found = dict(self._samples(module, scale, self.num_samples))
            images = torch.cat(list(found.values()))
            distance = resampled(frechet_of_features, classifier.features(images), fitted)
            right, each = 0, []
            for prompt, label in zip(self.prompts, self.labels, strict=True):
                k = int((classifier(found[prompt]).argmax(dim=1) == label).sum())
                right += k
                each.append(_row(scale, prompt, k, self.num_samples))
            every = _row(scale, "all", right, len(images))
            every |= {"Fréchet": distance.text()}
            rows += [*each, every]
            module.log(f"test/as_prompted/guidance={scale:g}", every["as prompted"], rank_zero_only=True)
        write_table(rows, "samples that are what their prompts say", folder, "prompts")

    @torch.no_grad()
    def draw(self, module: ModelModule, folder: Path) -> None:
        scale = self.guidance[-1]
        images = torch.stack([images for _, images in self._samples(module, scale, self.pictures)])
        names = [[prompt, *[""] * (self.pictures - 1)] for prompt in self.prompts]
        title = f"{self.steps}-step ODE, guidance {scale:g}"
        image_grid(images, folder / "samples.png", title, captions=names)

    def _samples(self, module: ModelModule, scale: float, num: int) -> Iterator[tuple[str, Tensor]]:
        """Of each prompt, images `(num, C, H, W)` in [0, 1]."""
        flow, data = _network(module).flow, data_of(module)
        times = flow.time_grid(self.steps)
        for k, prompt in track(list(enumerate(self.prompts)), lambda one: f"samples of {one[1]!r}"):
            generator = torch.Generator().manual_seed(1000 * self.seed + k)
            noise = torch.randn(num, *module.state_shape, generator=generator).to(module.device)
            given = flow.encode([prompt], guidance=scale).to(module.device)
            states = integrate(lambda t, x, given=given: flow.drift(t, x, given), noise, times)
            yield prompt, data.decode(states.cpu())


def _row(scale: float, prompt: str, k: int, num: int) -> dict[str, Any]:
    low, high = proportion(k, num)
    return {"guidance": scale, "prompt": prompt, "samples": num, "as prompted": k / num, "low": low, "high": high}


def _network(module: ModelModule) -> FlowNetwork:
    network = module.model.network
    if not isinstance(network, FlowNetwork):
        raise ValueError(f"PromptEvaluation is for a FlowNetwork, not for a {type(network).__name__}")
    return network
