"""The model that a suite's methods all run on, with its decoder and conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mfm_benchmarks.fitting import Fit, FitSettings, say_fewer_steps
from mfm_benchmarks.measure import noise
from mfm_benchmarks.spec import Spec, build
from mfm_lightning.alignment.target import LoadedTarget, Target, TargetSettings
from mfm_lightning.checkpoints import find_weights, fingerprint, is_there
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder, IdentityDecoder
from mfm_rewards import Reward, RewardError
from mfm_rewards.execution import Precision, autocast, check_precision


@dataclass
class ModelSettings:
    """A Meta Flow Map, which contains the base flow of all methods.

    Args:
        file: its `model.safetensors`, a name such as mnist, or a Hugging Face id.
        fits: jobs that make it where it is not there, in order.
        decoder: states to images, `{class_path: ..., init_args: {...}}`; the states themselves where None.
        labels: classes of the samples, in turn; None for no class.
        guidance: class-guidance scale.
        prompts: one for all samples; one a class; or a template with {class} for the class's name.
        class_names: file of the names for the template; ImageNet's where None.
        precision: of the network, in all methods: "fp32"; "bf16" or "fp16" by autocast. States and rewards stay in
            float32.

    Raises:
        ValueError: for no labels, guidance without them, or an unknown precision.
    """

    file: str
    fits: list[FitSettings] = field(default_factory=list)
    decoder: Spec | None = None
    labels: list[int] | None = None
    guidance: float | None = None
    prompts: str | list[str] | None = None
    class_names: str | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.labels is not None and (not self.labels or min(self.labels) < 0):
            raise ValueError(f"model.labels {self.labels}: expected at least one class, from 0")
        if self.guidance is not None and self.labels is None:
            raise ValueError("model.guidance: there is nothing to guide to without model.labels")

    @cached_property
    def built_decoder(self) -> Decoder:
        """The decoder; raises ValueError if its settings do not fit."""
        return IdentityDecoder() if self.decoder is None else build(Decoder, self.decoder.value, "model.decoder")

    def jobs(self) -> list[Fit]:
        """The jobs that make it; none where it is there already."""
        if not is_there(self.file):
            return [fit.job() for fit in self.fits]
        for fit in self.fits:
            if fit.file == self.file:
                say_fewer_steps(fit.file, fit.config, fit.given.get("trainer.max_steps"))
        return []

    def missing(self) -> list[str]:
        """What is not there and no job makes."""
        found = self.built_decoder.missing()
        if not is_there(self.file) and not any(fit.file == self.file for fit in self.fits):
            found.append(
                f"model.file: no model at {self.file}: give a model.safetensors, or jobs that make it as model.fits"
            )
        return found


def compute_in(model: MetaFlowMap, precision: Precision) -> None:
    """Have the model's network compute in `precision` wherever it is called; what it gives is float32 all the same."""
    if precision == "fp32":
        return
    forward = model.network.forward

    def computed(*inputs: Any, **options: Any) -> Any:
        with autocast(model.device, precision):
            return pytree.tree_map_only(Tensor, Tensor.float, forward(*inputs, **options))

    model.network.forward = computed


class Subject:
    """`ModelSettings`, loaded once for all rewards."""

    def __init__(self, settings: ModelSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.identity = {
            "model": fingerprint(find_weights(settings.file)),
            "decoder": repr(settings.built_decoder),
            "labels": settings.labels,
            "guidance": settings.guidance,
            "prompts": settings.prompts,
            "class_names": settings.class_names,
            **({} if settings.precision == "fp32" else {"precision": settings.precision}),
        }
        self._model: MetaFlowMap | None = None

    def load(self, reward: dict[str, Any] | str, built: Reward | None = None) -> LoadedTarget:
        """The target of a reward, on the same model; raises as `TargetSettings.load`.

        Args:
            reward: as `mfm_rewards.build` takes it.
            built: what `reward` describes, where it has been built already.
        """
        s = self.settings
        settings = TargetSettings(
            s.file, reward, s.built_decoder, guidance=s.guidance, prompts=s.prompts, class_names=s.class_names
        )
        loaded = settings.load(self._model, built)
        if self._model is None:
            self._model = loaded.model
            compute_in(self._model, s.precision)
        if s.labels is not None and max(s.labels) >= loaded.model.num_classes:
            raise ValueError(f"model.labels {s.labels}: the model has {loaded.model.num_classes} classes, from 0")
        loaded.to(self.device)
        loaded.check_labels(s.labels is not None)
        return loaded

    @property
    def model(self) -> MetaFlowMap:
        """Loaded with the first reward; RuntimeError before."""
        if self._model is None:
            raise RuntimeError("the model comes with the first reward: call load")
        return self._model

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.model.state_shape

    def target(self, loaded: LoadedTarget, num: int, scale: float = 1.0) -> Target:
        """For `num` samples, with the reward multiplied by `scale`."""
        target = loaded(self.conditions(num))
        target.reward_scale = scale
        return target

    def probe(self, loaded: LoadedTarget) -> list[str]:
        """Of the reward, as `probe`."""
        return probe(lambda num: self.target(loaded, num), self.device)

    def conditions(self, num: int) -> Conditions:
        """The classes of `num` samples, in turn."""
        if self.settings.labels is None:
            return Conditions()
        labels = torch.tensor(self.settings.labels, device=self.device)
        return Conditions(label=labels.repeat(-(-num // len(labels)))[:num])


@torch.no_grad()
def probe(make_target: Callable[[int], Target], device: torch.device) -> list[str]:
    """The reward at a few states, rounded: results of a reward whose code has changed since are not taken.

    A reward that fails here fails again in each of its runs, and is reported there.

    Args:
        make_target: for so many samples.
    """
    try:
        target = make_target(4)
        values = target.plain_rewards(noise(4, target.state_shape, 12345, device))
        return [f"{value:.4g}" for value in values.tolist()]
    except (RewardError, RuntimeError) as error:
        return [str(error)]
