"""What is aligned to what: a model, a reward on what it generates, and what both are conditioned on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mfm_lightning.alignment.described import described
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.checkpoints import CheckpointError, find_weights, fingerprint, load_model, read_metadata
from mfm_lightning.conditions import Conditions, Index
from mfm_lightning.interpolant import Times, as_times
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder, IdentityDecoder, check_decoder
from mfm_rewards import Reward, RewardError, as_reward, build, evaluate
from mfm_rewards.prompts import PLACEHOLDER, class_prompts, load_class_names
from mfm_rewards.protocol import check_context, name_of

Drift = Callable[[Tensor, Tensor, Conditions], Tensor]  # (t, x, conditions) -> b_t(x)


class Flow(Protocol):
    """What methods that need nothing but a drift ask of a model; an oracle is one."""

    @property
    def state_shape(self) -> tuple[int, ...]: ...

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor: ...


class Target:
    """The tilted distribution p(x1) e^{r(x1)} / Z, with the means to evaluate it: drift, flow map and reward, counted.

    States come in batches of B samples, or of B*k with the k states of one sample next to each other; the conditions
    follow them. A method makes a row for each of its states once, by `expand`.

    Args:
        model: a MetaFlowMap; or, for methods that only need a drift, anything with `drift(t, x, conditions)` and
            `state_shape`, such as an oracle.
        reward: a reward, or a function that is one.
        decoder: states to images; the states themselves where None.
        conditions: of B samples, or one row for all; with a `group`, where the reward needs it. The fields `label=`,
            `guidance=` and `prompts=` may be given instead. Guidance is 1 where there is no class to guide to.
        label: class of all samples, or `(B,)`.
        guidance: guidance scale given to the network, one for all or `(B,)`.
        prompts: what the reward reads: one prompt for all samples, or B of them.
        reward_scale: the reward is multiplied by it (the paper's multiplier).
        drift: base drift `(t, x, conditions)`; the model's own where None.

    Raises:
        ValueError: for a label or a guidance scale that the model does not know.
        RewardError: if the reward needs prompts, labels or groups that are not given.
    """

    def __init__(
        self,
        model: MetaFlowMap | Flow,
        reward: Reward | Callable[..., Tensor],
        decoder: Decoder | None = None,
        conditions: Conditions | None = None,
        *,
        label: Tensor | int | None = None,
        guidance: Tensor | float | None = None,
        prompts: Sequence[str] | str | None = None,
        reward_scale: float = 1.0,
        drift: Drift | None = None,
    ) -> None:
        self.model, self.reward, self.decoder = model, as_reward(reward), decoder or IdentityDecoder()
        if not math.isfinite(reward_scale):
            raise ValueError(f"reward_scale {reward_scale} must be a finite number")
        self.reward_scale, self.meter = reward_scale, Meter()
        self._drift = drift or model.drift
        given = Conditions.of(conditions, label=label, guidance=guidance, prompts=prompts)
        self.conditions = self._guided(model.check(given) if isinstance(model, MetaFlowMap) else given)
        for needed, value in (("prompts", self.conditions.prompts), ("labels", self.conditions.label)):
            if needed in self.reward.needs and value is None:
                raise RewardError(f"reward {name_of(self.reward)!r} needs {needed}: give the target's {needed}")
        if "groups" in self.reward.needs and self.conditions.group is None:
            raise RewardError(
                f"reward {name_of(self.reward)!r} needs groups: give the target's conditions a group, equal for "
                "samples that are scored beside each other"
            )

    def _guided(self, given: Conditions) -> Conditions:
        """There is nothing to guide to without a class or a text."""
        if given.guidance is None:
            return given
        if given.label is None and given.text is None:
            return replace(given, guidance=None)
        null = getattr(self.model, "null_conditions", None)
        if null is None:
            return given
        is_null = given.is_null(null)
        return replace(given, guidance=torch.where(is_null, 1.0, given.guidance.to(is_null.device)))

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.model.state_shape)

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def require_gradient(self, method: str) -> None:
        """Raise RewardError, before any work, if `method` needs a gradient that the reward has not got."""
        require_gradient(self.reward, method)

    def require_whole_groups(self, at_once: int | None, rows: int) -> None:
        """Raise RewardError if `at_once` of `rows` states would reach a reward that needs all of a group."""
        if at_once is not None and at_once < rows and "groups" in self.reward.needs:
            raise RewardError(
                f"reward {name_of(self.reward)!r} scores groups, which {at_once} of {rows} states at once would take "
                f"apart: set max_rows to {rows} or more"
            )

    def _with(self, conditions: Conditions) -> Target:
        if conditions is self.conditions:
            return self
        part = copy.copy(self)
        part.conditions = conditions
        return part

    def expand(self, x: Tensor) -> Target:
        """The same target with conditions for each state of `x` `(B*k, *shape)`; evaluations are counted on the same
        meter.

        Raises:
            ValueError: if the number of states is no multiple of that of the conditions.
        """
        return self._with(self.conditions.expand(len(x), x.device))

    def take(self, index: Index) -> Target:
        """The same target for some of the samples, on the same meter."""
        return self._with(self.conditions.take(index))

    def with_drift(self, drift: Drift) -> Target:
        """The same target on another base drift `(t, x, conditions)`, on the same meter."""
        other = copy.copy(self)
        other._drift = drift
        return other

    def drift(self, t: Times, x: Tensor) -> Tensor:
        """b_t(x), `(B*k, *shape)`."""
        conditions = self.conditions.expand(len(x), x.device)
        return self.meter.counted("network", self._drift, self._each(conditions))(as_times(t, x), x, conditions)

    def _each(self, conditions: Conditions) -> int:
        """Evaluations of a state in one call: two where a text-to-image flow's guidance takes two."""
        passes = getattr(self.model, "passes", None)
        return 1 if passes is None else passes(conditions)

    def flow_map(self, s: Times, u: Times, x: Tensor, t: Times, x_t: Tensor) -> Tensor:
        """X_{s,u}(x; t, x_t), `(B*k, *shape)`.

        Raises:
            TypeError: if the model is no Meta Flow Map.
        """
        if is_plain_flow_map(self.model):
            raise TypeError("a plain flow map draws no posteriors: use a DiamondPosterior, or give a Meta Flow Map")
        return self._flow_map(s, u, x, t, x_t)

    def _flow_map(self, s: Times, u: Times, x: Tensor, t: Times, x_t: Tensor) -> Tensor:
        if not isinstance(self.model, MetaFlowMap):
            raise TypeError(f"a {type(self.model).__name__} has no flow map: give a MetaFlowMap, or another posterior")
        conditions = self.conditions.expand(len(x), x.device)
        return self.meter.counted("network", self.model.flow_map)(s, u, x, t, x_t, conditions)

    def base_flow_map(self, s: Times, u: Times, x: Tensor) -> Tensor:
        """X_{s,u}(x), `(B*k, *shape)`, the base flow's own map, which every Meta Flow Map has at t = 0, and other
        models as `base_flow_map(s, u, x, conditions)`.

        Raises:
            TypeError: if the model is no network of a flow map.
        """
        if (own := getattr(self.model, "base_flow_map", None)) is not None:
            conditions = self.conditions.expand(len(x), x.device)
            return self.meter.counted("network", own, self._each(conditions))(s, u, x, conditions)
        return self._flow_map(s, u, x, 0.0, torch.zeros_like(x))

    def rewards(self, x: Tensor) -> Tensor:
        """r(x) `(B*k,)`, times `reward_scale`, of clean states `(B*k, *shape)`; counted.

        Raises:
            RewardError: as `mfm_rewards.evaluate`; if the scale takes values out of the finite numbers; or if a
                gradient is wanted of a reward that said it was differentiable, and is not.
            ValueError: if the conditions do not fit the number of states.
        """
        values = self.reward_scale * self.meter.counted("reward", self.plain_rewards)(x)
        if not torch.isfinite(values.detach()).all():  # the plain ones are finite
            raise RewardError(
                f"reward {name_of(self.reward)!r} times reward_scale {self.reward_scale:g} leaves the finite numbers: "
                "lower the scale"
            )
        return values

    def plain_rewards(self, x: Tensor) -> Tensor:
        """The same without the scale, and not counted: what is reported."""
        images, given = self.decoder(x), self.conditions.expand(len(x), x.device)
        check_context(self.reward, len(x), given.prompts, given.label, given.group)
        values = evaluate(self.reward, images, given.prompts, given.label, given.group).float()
        if images.requires_grad and self.reward.differentiable and not values.requires_grad:
            raise RewardError(
                f"reward {name_of(self.reward)!r} gave values that carry no gradient: keep it free of detach() and "
                "no_grad, or say differentiable = False"
            )
        return values


@dataclass
class TargetSettings:
    """A target as a config describes it.

    Args:
        model: a `model.safetensors` that `mfm fit` exported, a name ("mnist") or a Hugging Face id: the Meta Flow Map,
            and the base flow that it contains.
        reward: a registered name; `{name: ..., and its options}`; or `{class_path: ..., init_args: {...}}`.
        decoder: states to images; the states themselves where None.
        reward_scale: the reward is multiplied by it.
        guidance: guidance scale given to the network, one that it knows; None for none.
        prompts: one for all samples; one a class (chosen by the label); or a template with {class} for the class's
            name.
        class_names: file of the names for the template (`mfm_rewards.prompts.load_class_names`); ImageNet's where None.
    """

    model: str
    reward: dict[str, Any] | str
    decoder: Decoder | None = None
    reward_scale: float = 1.0
    guidance: float | None = None
    prompts: str | list[str] | None = None
    class_names: str | None = None

    def load(
        self,
        model: MetaFlowMap | None = None,
        reward: Reward | None = None,
        plain_flow_map: bool = False,
        groups: bool = False,
    ) -> LoadedTarget:
        """The frozen parts, read and built.

        Args:
            model: what `self.model` holds, where it has been loaded already.
            reward: what `self.reward` describes, where it has been built already.
            plain_flow_map: whether a plain flow map's file will do, which draws no posteriors.
            groups: whether samples come in groups, for rewards that need them.

        Raises:
            FileNotFoundError: if the model is not there.
            CheckpointError: if the file is a base flow, or a flow map where it will not do.
            RewardError: if the reward is unknown, its options do not fit, or it needs prompts or groups and there are
                none.
            FileNotFoundError, ValueError: if prompts or class names are not as many as classes, or have no file.
            ValueError: for a guidance scale that the model does not know; for a decoder that does not say how latents
                are shifted or scaled by channel, where the model's are.
        """
        if not math.isfinite(self.reward_scale):
            raise ValueError(f"target.reward_scale {self.reward_scale} must be a finite number")
        file = find_weights(self.model, hint="fit it first (e.g. mfm fit --config configs/digits/mfm.yaml)")
        refused = ("base_flow",) if plain_flow_map else ("base_flow", "flow_map")
        if (kind := read_metadata(file).get("kind", "")) in refused:
            raise CheckpointError(
                f"{self.model} is a {kind.replace('_', ' ')}, which draws no posteriors: give a Meta Flow Map's file"
            )
        model = (model or load_model(file)).eval().requires_grad_(False)
        model.check(Conditions(guidance=self.guidance))
        prompts = self._prompts(model.num_classes)
        reward = (reward or build(self.reward)).eval().requires_grad_(False)
        if "prompts" in reward.needs and prompts is None:
            raise RewardError(f"reward {name_of(reward)!r} needs prompts: set target.prompts")
        if "groups" in reward.needs and not groups:
            raise RewardError(
                f"reward {name_of(reward)!r} scores images beside others of their group, and here is none: it is "
                "for mfm predict"
            )
        check_decoder(self.decoder, model.metadata, self.model)
        if self.decoder is not None:
            self.decoder.eval().requires_grad_(False)
        settings = {"reward": self.reward, "reward_scale": self.reward_scale, "guidance": self.guidance}
        settings |= {"prompts": self.prompts, "class_names": self.class_names, "decoder": self.decoder}
        identity = {"model": self.model, "sha256": fingerprint(file), **{k: repr(v) for k, v in settings.items()}}
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
    """The parts of a target that a config describes; called with the conditions of a batch, it gives the batch's
    target."""

    settings: TargetSettings
    model: MetaFlowMap
    reward: Reward
    prompts: str | list[str] | None = None
    identity: dict[str, str] = field(default_factory=dict)  # what a checkpoint names the frozen parts by

    def described(self) -> dict[str, Any]:
        """What rewards and values of this target depend on, as plain JSON."""
        given = self.settings
        found = {"model": self.identity.get("sha256"), "reward": described(given.reward), "guidance": given.guidance}
        found |= {"reward_scale": given.reward_scale, "prompts": given.prompts, "class_names": given.class_names}
        return {**found, "decoder": None if given.decoder is None else repr(given.decoder)}

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

    def __call__(self, conditions: Conditions | None = None, flow: MetaFlowMap | None = None) -> Target:
        """The target of samples with these conditions, with the config's guidance scale, and its prompts where the
        samples bring none.

        Args:
            conditions: of the samples; none where None.
            flow: another model for its drift.

        Raises:
            ValueError: if prompts are given by class and a label is none of them.
        """
        settings, given = self.settings, conditions or Conditions()
        given = replace(given, guidance=settings.guidance)
        if given.prompts is None:
            given = replace(given, prompts=self._prompts_of(given.label))
        return Target(
            self.model,
            self.reward,
            settings.decoder,
            given,
            reward_scale=settings.reward_scale,
            drift=None if flow is None else flow.drift,
        )

    def _prompts_of(self, label: Tensor | None) -> str | list[str] | None:
        if not isinstance(self.prompts, list):
            return self.prompts
        if label is None or not bool((label < len(self.prompts)).all()):
            raise ValueError(
                f"{len(self.prompts)} prompts, one a class, need a label in 0..{len(self.prompts) - 1} each"
            )
        return [self.prompts[i] for i in label.tolist()]


def is_plain_flow_map(model: object) -> bool:
    """Whether a model's file says that it is a flow map whose condition is not trained, as of an imported DMF."""
    return isinstance(model, MetaFlowMap) and model.metadata.get("kind") == "flow_map"


def require_gradient(reward: Reward, method: str) -> None:
    """Raise RewardError if `method` needs a gradient that the reward has not got."""
    if not reward.differentiable:
        raise RewardError(
            f"{method} differentiates the reward, but {name_of(reward)!r} is not differentiable: use a method without "
            "reward gradients (Steering with DrawGradientFree, Search, BestOfN, FeynmanKac; fine-tuning with gradient "
            "'free')"
        )
