"""Samples of a text-to-image model in training: whether they are what the prompts say, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.backbones import FlowAdapter, PromptedNetwork
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import ArrayData, Evaluation, ModelModule, data_of
from mfm_lightning.evaluation.features import check_features, features_of
from mfm_lightning.metrics.classifier import proportion
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import resampled
from mfm_lightning.samplers import integrate, sample_refinement
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.figures import image_grid


class PromptEvaluation(Evaluation[ModelModule]):
    """Samples of prompts, by the flow's ODE on its own times and, of a `FlowAdapter`, by K-step refinement: the share
    that a classifier takes for the class that was asked for, by sampler and prompt, with 95 % (Wilson) intervals, and
    the Fréchet distance of all of them to the training images in the classifier's features. The noise is the same for
    each sampler.

    Args:
        prompts: what is sampled.
        labels: the class of each prompt, in the data's numbers; those of the data in turn where None.
        guidance: scales of the flow; 1 for none.
        refinement_steps: K of the refinement samplers of an adapter.
        adapter_guidance: the scale that an adapter learns as an input, for its samples; 1 for none.
        steps: of Euler.
        num_samples: of each prompt and scale that are measured.
        pictures: of each prompt in the picture, by the last sampler.
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
        refinement_steps: Sequence[int] = (1, 2, 4),
        adapter_guidance: float = 1.0,
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
        self.refinement_steps, self.adapter_guidance = list(refinement_steps), adapter_guidance
        self.pictures, self.seed, self.classifier = pictures, seed, classifier

    def check(self, module: ModelModule) -> None:
        super().check(module)
        scales = _network(module).guidance_scales
        if self.adapter_guidance != 1 and self.adapter_guidance not in scales:
            raise ValueError(
                f"adapter_guidance {self.adapter_guidance:g} is not a scale that the network learns: {list(scales)} "
                "(its guidance_scales)"
            )
        check_features(module, self.classifier)
        known = data_of(module).num_classes
        if min(self.labels) < 0 or max(self.labels) >= known:
            raise ValueError(f"labels {self.labels}: the data have {known} classes, from 0")

    @torch.no_grad()
    def measure(self, module: ModelModule, folder: Path) -> None:
        data: ArrayData = data_of(module)
        classifier, fitted = features_of(data, self.classifier, folder / "features.safetensors")
        rows: list[dict[str, Any]] = []
        for name, sampler in self._samplers(module).items():
            found = dict(self._samples(module, sampler, self.num_samples))
            images = torch.cat(list(found.values()))
            distance = resampled(frechet_of_features, classifier.features(images), fitted)
            right, each = 0, []
            for prompt, label in zip(self.prompts, self.labels, strict=True):
                k = int((classifier(found[prompt]).argmax(dim=1) == label).sum())
                right += k
                each.append(_row(name, prompt, k, self.num_samples))
            every = {**_row(name, "all", right, len(images)), "Fréchet": distance.text()}
            rows += [*each, every]
            module.log(f"test/as_prompted/{name}", every["as prompted"], rank_zero_only=True)
        shown = [row for row in rows if row["prompt"] == "all"]
        write_table(rows, "samples that are what their prompts say", folder, "prompts", shown=shown)

    @torch.no_grad()
    def draw(self, module: ModelModule, folder: Path) -> None:
        name, sampler = list(self._samplers(module).items())[-1]
        images = torch.stack([images for _, images in self._samples(module, sampler, self.pictures)])
        names = [[prompt, *[""] * (self.pictures - 1)] for prompt in self.prompts]
        image_grid(images, folder / "samples.png", name, captions=names)

    def _samplers(self, module: ModelModule) -> dict[str, Callable[[str, Tensor, int], Tensor]]:
        """By their names: from a prompt, noise and a seed to states."""
        network, model = _network(module), module.model
        flow, times = network.flow, network.flow.time_grid(self.steps)

        def ode(scale: float, prompt: str, noise: Tensor, seed: int) -> Tensor:
            given = flow.encode([prompt], guidance=scale).to(noise.device)
            return integrate(lambda t, x: flow.drift(t, x, given), noise, times)

        def refinement(steps: int, prompt: str, noise: Tensor, seed: int) -> Tensor:
            scale = self.adapter_guidance if model.guidance_scales else None
            given = network.embed(Conditions(prompts=[prompt], guidance=scale))
            return sample_refinement(model, noise, steps, given, generator=torch.Generator().manual_seed(seed))

        found = {f"base flow, {self.steps} steps, guidance {g:g}": partial(ode, g) for g in self.guidance}
        if isinstance(network, FlowAdapter):
            found |= {f"MFM, refinement {k}": partial(refinement, k) for k in self.refinement_steps}
        return found

    def _samples(
        self, module: ModelModule, sampler: Callable[[str, Tensor, int], Tensor], num: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Of each prompt, images `(num, C, H, W)` in [0, 1]."""
        data = data_of(module)
        for k, prompt in track(list(enumerate(self.prompts)), lambda one: f"samples of {one[1]!r}"):
            seed = 1000 * self.seed + k
            noise = torch.randn(num, *module.state_shape, generator=torch.Generator().manual_seed(seed))
            yield prompt, data.decode(sampler(prompt, noise.to(module.device), seed + 500).cpu())


def _row(samples: str, prompt: str, k: int, num: int) -> dict[str, Any]:
    low, high = proportion(k, num)
    row = {"samples": samples, "prompt": prompt, "number": num, "as prompted": k / num, "low": low, "high": high}
    return {**row, "Fréchet": ""}  # of all prompts together


def _network(module: ModelModule) -> PromptedNetwork:
    network = module.model.network
    if not isinstance(network, PromptedNetwork):
        raise ValueError(f"PromptEvaluation is for a FlowNetwork or FlowAdapter, not for a {type(network).__name__}")
    return network
