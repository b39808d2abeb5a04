"""The model that a suite's methods all run on, with its decoder and conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.fitting import Fit
from mfm_lightning.checkpoints import fingerprint
from mfm_lightning.decoders import Decoder
from mfm_lightning.target import LoadedTarget, Target, TargetSettings


@dataclass
class ModelSettings:
    """A Meta Flow Map, which contains the base flow of all methods.

    Args:
        file: its `model.safetensors`.
        fits: jobs that make it where it is not there, in order.
        decoder: states to images.
        labels: classes of the samples, in turn; None for no class.
        guidance: class-guidance scale.
        prompts: one for all samples, or one a class.
    """

    file: str
    fits: list[Fit] = field(default_factory=list)
    decoder: Decoder | None = None
    labels: list[int] | None = None
    guidance: float | None = None
    prompts: str | list[str] | None = None

    def missing(self) -> list[str]:
        """What is not there and no job makes."""
        if Path(self.file).is_file() or any(fit.file == self.file for fit in self.fits):
            return []
        return [
            f"model.file: no model at {self.file}; give a model.safetensors, or the jobs that make it as model.fits"
        ]


class Subject:
    """`ModelSettings`, loaded once for all rewards."""

    def __init__(self, settings: ModelSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.identity = {
            "model": fingerprint(settings.file),
            "decoder": repr(settings.decoder),
            "labels": settings.labels,
            "guidance": settings.guidance,
            "prompts": settings.prompts,
        }
        self._model = None

    def load(self, reward: dict[str, Any] | str, scale: float = 1.0) -> LoadedTarget:
        """The target of a reward, on the same model; raises as `TargetSettings.load`."""
        s = self.settings
        loaded = TargetSettings(s.file, reward, s.decoder, scale, s.guidance, s.prompts).load(self._model)
        self._model = loaded.model
        loaded.to(self.device)
        loaded.check_labels(s.labels is not None)
        return loaded

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self._model.state_shape

    def target(self, loaded: LoadedTarget, num: int, scale: float = 1.0) -> Target:
        """For `num` samples, with the reward multiplied by `scale`."""
        target = loaded(self.labels(num))
        target.reward_scale = scale
        return target

    def labels(self, num: int) -> Tensor | None:
        """`(num,)`."""
        if self.settings.labels is None:
            return None
        labels = torch.tensor(self.settings.labels, device=self.device)
        return labels.repeat(-(-num // len(labels)))[:num]
