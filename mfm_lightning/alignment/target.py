"""What is aligned to what: a model, a reward on what it generates, and what both are conditioned on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.checkpoints import CheckpointError, fingerprint, load_model, read_metadata
from mfm_lightning.interpolant import as_times
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder, IdentityDecoder
from mfm_rewards import Reward, RewardError, as_reward, build, evaluate
from mfm_rewards.prompts import PLACEHOLDER, class_prompts, load_class_names
from mfm_rewards.protocol import check_context, name_of


class Target:
    """The tilted distribution p(x1) e^{r(x1)} / Z, with the means to evaluate it: drift, flow map and reward, counted.

    States come in batches of B samples, or of B*k with the k states of one sample next to each other; label and prompt
    follow them.

    Args:
        model: a MetaFlowMap; or, for methods that only need a drift, anything with `drift(t, x, label, guidance)` and
            `state_shape`, such as an oracle.
        reward: a reward, or a function that is one.
        decoder: states to images.
        label: one class for all samples, or `(B,)`; None for no class.
        guidance: class-guidance scale given to the network, one for all or `(B,)`; 1 where there is no class.
        prompts: one prompt for all samples, or B of them.
        reward_scale: the reward is multiplied by it (the paper's multiplier).
        drift: base drift `(t, x, label, guidance)`; the model's own where None.

    Raises:
        RewardError: on construction, if the reward needs prompts or labels that are not given.
    """

    def __init__(
        self,
        model: Any,
        reward: Reward | Callable[..., Tensor],
        decoder: Decoder | None = None,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
        prompts: str | Sequence[str] | None = None,
        reward_scale: float = 1.0,
        drift: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.reward, self.decoder = model, as_reward(reward), decoder or IdentityDecoder()
        self.label, self.guidance, self.reward_scale = label, guidance, reward_scale
        self.prompts = prompts if prompts is None or isinstance(prompts, str) else list(prompts)
        self.meter = Meter()
        self._drift = drift or model.drift
        for needed, given in (("prompts", self.prompts), ("labels", self.label)):
            if needed in self.reward.needs and given is None:
                raise RewardError(f"reward {name_of(self.reward)!r} needs {needed}: give the target's {needed}")

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.model.state_shape)

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def require_gradient(self, method: str) -> None:
        """Raise RewardError, before any work, if `method` needs a gradient that the reward has not got."""
        require_gradient(self.reward, method)

    def take(self, index: slice | Tensor) -> Target:
        """The same target for some of the samples; evaluations are counted on the same meter."""
        part = copy.copy(self)
        if isinstance(self.label, Tensor) and self.label.dim():
            part.label = self.label[index]
        if isinstance(self.guidance, Tensor) and self.guidance.dim():
            part.guidance = self.guidance[index]
        if isinstance(self.prompts, list):
            rows = torch.arange(len(self.prompts))[index if isinstance(index, slice) else index.cpu()]
            part.prompts = [self.prompts[i] for i in rows.tolist()]
        return part

    def for_states(self, x: Tensor) -> Target:
        """The same target with the conditions of each state of `x` `(B*k, *shape)`, so that `take` can cut between the
        k states of a sample."""
        part = copy.copy(self)
        if isinstance(self.label, Tensor) and self.label.dim():
            part.label = self.labels(x)
        if isinstance(self.guidance, Tensor) and self.guidance.dim():
            part.guidance = self._each(self.guidance, x)
        if isinstance(self.prompts, list):
            part.prompts = self.prompts_of(x)
        return part

    def with_drift(self, drift: Callable[..., Tensor]) -> Target:
        """The same target on another base drift `(t, x, label, guidance)`, counted on the same meter."""
        other = copy.copy(self)
        other._drift = drift
        return other

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """b_t(x), `(B*k, *shape)`."""
        drift = self.meter.counted("network", self._drift)
        return drift(as_times(t, x), x, *self._conditions(x))

    def flow_map(self, s: Tensor | float, u: Tensor | float, x: Tensor, t: Tensor | float, x_t: Tensor) -> Tensor:
        """X_{s,u}(x; t, x_t), `(B*k, *shape)`."""
        flow_map = self.meter.counted("network", self.model.flow_map)
        return flow_map(s, u, x, t, x_t, *self._conditions(x))

    @property
    def drifts_itself(self) -> bool:
        """Whether the drift is that of the flow map's own network, so that one call can give both."""
        return isinstance(self.model, MetaFlowMap) and self._drift == self.model.drift

    def draws_with_drift(self, noise: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One-step draws X_{0,1}(eps; t, x) `(B*k, N, *shape)` and b_t(x) `(B*k, *shape)` by one call of the network:
        faster than two where a call costs more than its rows (needs `drifts_itself`).

        Args:
            noise: of the draws, `(B*k, N, *shape)`; t: `(B*k,)`.
        """
        N, zero, one = noise.shape[1], torch.zeros_like(t), torch.ones_like(t)
        label, guidance = self._conditions(x)

        def rows(of_draws: Tensor, of_drift: Tensor) -> Tensor:
            return torch.cat([of_draws.repeat_interleave(N, dim=0), of_drift])

        def each(condition: Tensor | None) -> Tensor | None:
            return None if condition is None else rows(condition, condition)

        velocity = self.meter.counted("network", self.model.velocity)(
            rows(zero, t), rows(one, t), torch.cat([noise.flatten(0, 1), x]), rows(t, zero),
            rows(x, torch.zeros_like(x)), each(label), each(guidance),
        )  # fmt: skip
        of_draws, drift = velocity.split([len(x) * N, len(x)])
        return noise + of_draws.reshape(noise.shape), drift

    def rewards(self, x: Tensor) -> Tensor:
        """r(x) `(B*k,)`, times `reward_scale`, of clean states `(B*k, *shape)`; counted.

        Raises:
            RewardError: as `mfm_rewards.evaluate`; if labels or prompts do not fit the number of states; or if a
                gradient is wanted of a reward that said it was differentiable, and is not.
        """
        return self.reward_scale * self.meter.counted("reward", self.plain_rewards)(x)

    def plain_rewards(self, x: Tensor) -> Tensor:
        """The same without the scale, and not counted: what is reported."""
        images, labels, prompts = self.decoder(x), self.labels(x), self.prompts_of(x)
        check_context(self.reward, len(x), prompts, labels)
        values = evaluate(self.reward, images, prompts, labels).float()
        if images.requires_grad and self.reward.differentiable and not values.requires_grad:
            raise RewardError(
                f"reward {name_of(self.reward)!r} gave values that carry no gradient: keep it free of detach() and "
                "no_grad, or say differentiable = False"
            )
        return values

    def labels(self, x: Tensor) -> Tensor | None:
        """The label of each state `(B*k,)`."""
        if self.label is None:
            return None
        return self._each(self.label, x)

    @staticmethod
    def _each(value: Tensor | float, x: Tensor) -> Tensor:
        """One value for all samples, or `(B,)`, as one for each state `(B*k,)`."""
        value = torch.as_tensor(value, device=x.device)
        return value.expand(len(x)) if value.dim() == 0 else value.repeat_interleave(_per_sample(len(value), x))

    def _conditions(self, x: Tensor) -> tuple[Tensor | None, Tensor | float | None]:
        """Label and guidance of each state; there is nothing to guide to without a class."""
        label, null = self.labels(x), getattr(self.model, "num_classes", None)
        if label is None or self.guidance is None:
            return label, self.guidance if label is not None else None
        return label, torch.where(label == null, 1.0, self._each(self.guidance, x)).to(x)

    def prompts_of(self, x: Tensor) -> list[str] | None:
        """The prompt of each state."""
        if self.prompts is None or isinstance(self.prompts, str):
            return None if self.prompts is None else [self.prompts] * len(x)
        k = _per_sample(len(self.prompts), x)
        return [prompt for prompt in self.prompts for _ in range(k)]


@dataclass
class TargetSettings:
    """A target as a config describes it.

    model: a `model.safetensors` that `mfm fit` exported: the Meta Flow Map, and the base flow that it contains.
    reward: a registered name; `{name: ..., and its options}`; or `{class_path: ..., init_args: {...}}`.
    decoder: states to images; the states themselves where None.
    reward_scale: the reward is multiplied by it.
    guidance: class-guidance scale given to the network.
    prompts: one for all samples; one a class (chosen by the label); or a template with {class} for the class's name.
    class_names: file of the names for the template (`mfm_rewards.prompts.load_class_names`); ImageNet's where None.
    """

    model: str
    reward: dict[str, Any] | str
    decoder: Decoder | None = None
    reward_scale: float = 1.0
    guidance: float | None = None
    prompts: str | list[str] | None = None
    class_names: str | None = None

    def load(self, model: MetaFlowMap | None = None) -> LoadedTarget:
        """The frozen parts, read and built.

        Args:
            model: what `self.model` holds, where it has been loaded already.

        Raises:
            FileNotFoundError: if the model is not there.
            CheckpointError: if the file is a base flow, which has no posterior draws.
            RewardError: if the reward is unknown, its options do not fit, or it needs prompts and there are none.
            FileNotFoundError, ValueError: if prompts or class names are not as many as classes, or have no file.
        """
        if not Path(self.model).is_file():
            raise FileNotFoundError(
                f"no model at {self.model}: fit it first (e.g. mfm fit --config configs/digits/mfm.yaml)"
            )
        if (kind := read_metadata(self.model).get("kind")) in ("base_flow", "flow_map"):
            raise CheckpointError(
                f"{self.model} is a {kind.replace('_', ' ')}, which draws no posteriors: give a Meta Flow Map's file"
            )
        model = (model or load_model(self.model)).eval().requires_grad_(False)
        prompts = self._prompts(model.num_classes)
        reward = build(self.reward).eval().requires_grad_(False)
        if "prompts" in reward.needs and prompts is None:
            raise RewardError(f"reward {name_of(reward)!r} needs prompts: set target.prompts")
        if self.decoder is not None:
            self.decoder.eval().requires_grad_(False)
        settings = {"reward": self.reward, "reward_scale": self.reward_scale, "guidance": self.guidance}
        settings |= {"prompts": self.prompts, "class_names": self.class_names, "decoder": self.decoder}
        identity = {"model": self.model, "sha256": fingerprint(self.model), **{k: repr(v) for k, v in settings.items()}}
        return LoadedTarget(self, model, reward, prompts, identity)

    def _prompts(self, num_classes: int) -> str | list[str] | None:
        """The template filled in; checked against the number of classes."""
        if not isinstance(self.prompts, str) or PLACEHOLDER not in self.prompts:
            if self.class_names is not None:
                raise ValueError(f"target.class_names is for prompts with {PLACEHOLDER}, got {self.prompts!r}")
            if isinstance(self.prompts, list) and len(self.prompts) != num_classes:
                raise ValueError(f"{len(self.prompts)} prompts for {num_classes} classes: give one, or one a class")
            return self.prompts
        names = load_class_names(self.class_names)
        if len(names) != num_classes:
            whose = self.class_names or "ImageNet's (set target.class_names)"
            raise ValueError(f"{len(names)} class names, {whose}, for a model of {num_classes} classes")
        return class_prompts(self.prompts, names)


@dataclass
class LoadedTarget:
    """The parts of a target that a config describes; called with the labels of a batch, it gives the batch's target."""

    settings: TargetSettings
    model: MetaFlowMap
    reward: Reward
    prompts: str | list[str] | None = None
    identity: dict[str, str] = field(default_factory=dict)  # what a checkpoint names the frozen parts by

    def check_labels(self, all_labelled: bool) -> None:
        """Raise ValueError if reward or prompts need a label for each sample and there are samples without one."""
        if not all_labelled and "labels" in self.reward.needs:
            raise ValueError(f"reward {name_of(self.reward)!r} needs labels, but not all samples have one")
        if not all_labelled and isinstance(self.prompts, list):
            raise ValueError("prompts by class need a label for each sample, but not all samples have one")

    def to(self, device: torch.device | str) -> None:
        """Move the parts to a device."""
        for part in (self.model, self.reward, self.settings.decoder):
            if part is not None:
                part.to(device)

    def __call__(self, label: Tensor | None, flow: MetaFlowMap | None = None) -> Target:
        """The target of samples with these labels `(B,)`, with the prompts of their classes.

        Args:
            flow: another model for its drift.

        Raises:
            ValueError: if prompts are given by class and a label is none of them.
        """
        settings, prompts = self.settings, self.prompts
        if isinstance(prompts, list):
            if label is None or not bool((label < len(prompts)).all()):
                raise ValueError(f"{len(prompts)} prompts, one a class, need a label in 0..{len(prompts) - 1} each")
            prompts = [prompts[i] for i in label.tolist()]
        return Target(
            self.model, self.reward, settings.decoder, label, settings.guidance, prompts, settings.reward_scale,
            None if flow is None else flow.drift,
        )  # fmt: skip


def require_gradient(reward: Reward, method: str) -> None:
    """Raise RewardError if `method` needs a gradient that the reward has not got."""
    if not reward.differentiable:
        raise RewardError(
            f"{method} differentiates the reward, but {name_of(reward)!r} is not differentiable: use a method without "
            "reward gradients (mfm_gf, glass_gf, search, best_of_n, Feynman-Kac; fine-tuning with gradient 'free')"
        )


def _per_sample(num: int, x: Tensor) -> int:
    if not num or len(x) % num:
        raise ValueError(f"{len(x)} states for {num} labels or prompts: expected the same number, or a multiple")
    return len(x) // num
