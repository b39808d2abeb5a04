"""Off-policy fine-tuning of a base flow to a reward (MFM-FT, paper, Eq. 43)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.target import Target, TargetSettings
from mfm_lightning.checkpoints import find_weights, fingerprint, load_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.models import UNTRAINED, MetaFlowMap
from mfm_lightning.modules.normaliser import LogNormaliser
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.modules.tilting import DiffusionSchedule, TiltedTraining
from mfm_lightning.networks.base import VelocityNetwork
from mfm_lightning.networks.decoders import LATENTS
from mfm_lightning.objectives import ConditionTimes, Pair, noised
from mfm_lightning.samplers import sample_ode
from mfm_lightning.training.sharding import plain_class


@dataclass
class LowRank:
    """Low-rank adapters (peft): trained instead of the weights, and merged into them on export.

    Args:
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        modules: ends of the names of the linear layers that get one.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2", "adaLN_modulation.1")


class RewardFinetuning(TiltedTraining):
    """Trains a policy, a copy of the base flow, on Eq. 43; the base flow, the Meta Flow Map and the reward are frozen.

    The policy is exported as a base flow: a `model.safetensors` that every sampler here takes.

    Args:
        target: the Meta Flow Map for the draws, the reward, its decoder, and `reward_scale` (the paper's lambda).
        base: the base flow's `model.safetensors`; the flow that the Meta Flow Map contains where None.
        adapters: train low-rank adapters; all weights where None.
        gradient: "reward": of the reward through the draws; "free": for black-box rewards.
        times: outer times t of the states.
        half_diffusion: sigma^2/2 by t.
        class_dropout: probability that a label becomes the null label.
        num_draws: posterior draws for each state.
        posterior: source of draws; one step of the flow map where None.
        normaliser_rate: of the running log E[e^r] by class.
        optimization: the optimiser and its learning rate.
        evaluation: what `validate` and `test` measure and draw.

    Raises:
        ValueError: if base and Meta Flow Map differ in shapes or classes, an image reward has no decoder, or the reward
            needs labels that class dropout takes away.
        RewardError: if the gradient is "reward" and the reward has none.
    """

    def __init__(
        self,
        target: TargetSettings,
        base: str | None = None,
        adapters: LowRank | None = None,
        gradient: str = "reward",
        times: ConditionTimes | None = None,
        half_diffusion: DiffusionSchedule | None = None,
        class_dropout: float = 0.0,
        num_draws: int = 1,
        posterior: Posterior | None = None,
        normaliser_rate: float = 0.02,
        optimization: Optimization | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        loaded = target.load()
        normaliser = LogNormaliser(loaded.model.num_classes, normaliser_rate)
        super().__init__(gradient, times, half_diffusion, num_draws, posterior, normaliser, optimization, evaluation)
        self.target, self.base_path = loaded, base or target.model
        file = find_weights(self.base_path)
        model = self.target.model
        flow = model if base is None else load_model(file).eval().requires_grad_(False)
        if (flow.state_shape, flow.num_classes) != (model.state_shape, model.num_classes):
            raise ValueError(
                f"the base flow has states {flow.state_shape} and {flow.num_classes} classes, the Meta Flow Map "
                f"{model.state_shape} and {model.num_classes}: they must agree"
            )
        if len(model.state_shape) == 3 and target.decoder is None:
            raise ValueError("rewards see images: set target.decoder (mfm_lightning.networks.PixelDecoder for pixels)")
        self.target.check_labels(all_labelled=class_dropout == 0)
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout {class_dropout} must lie in [0, 1]")
        self.state_shape, self.num_classes = model.state_shape, model.num_classes
        self._base = [flow]  # in a list: frozen, and no part of this module's state
        self.identity = {**self.target.identity, "base": self.base_path, "base_sha256": fingerprint(file)}
        self.identity["adapters"] = repr(adapters)
        self.policy = load_model(file)
        if adapters is not None:
            _add_adapters(self.policy, adapters)
            self.strict_loading = False  # what is frozen is not in the checkpoint
        self.adapters, self.class_dropout = adapters, class_dropout
        self.check_reward(self.target.reward)

    @property
    def base(self) -> MetaFlowMap:
        """The frozen base flow."""
        return self._base[0]

    @property
    def exported(self) -> nn.Module:
        if self.adapters is None:
            return self.policy.network
        adapted = cast(Any, copy.deepcopy(self.policy.network))  # a peft model
        return adapted.merge_and_unload()

    def exported_part(self) -> str | None:
        return super().exported_part() if self.adapters is None else None

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | self.exported_metadata()

    def exported_metadata(self) -> dict[str, str]:
        said = self.base.metadata  # the data may be samples of a model, which do not say it
        return {name: said[name] for name in (LATENTS, UNTRAINED) if name in said}

    def to_device(self, device: torch.device) -> None:
        self.target.to(device)
        self.base.to(device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.adapters is not None:
            frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
            frozen |= {name for name, _ in self.policy.named_buffers(prefix="policy")}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def sample_policy(self, noise: Tensor, conditions: Conditions | None = None, steps: int = 50) -> Tensor:
        """Euler samples of the policy's ODE from noise `(B, *shape)`."""
        return self._sample(self.policy, noise, conditions, steps)

    def sample_base(self, noise: Tensor, conditions: Conditions | None = None, steps: int = 50) -> Tensor:
        """Euler samples of the base flow's ODE from noise `(B, *shape)`."""
        return self._sample(self.base, noise, conditions, steps)

    @torch.no_grad()
    def _sample(self, flow: MetaFlowMap, noise: Tensor, conditions: Conditions | None, steps: int) -> Tensor:
        target = self.target(conditions, flow).expand(noise)
        return sample_ode(target.drift, noise, steps)

    def noised(self, x1: Tensor, conditions: Conditions) -> Pair:
        return noised(x1, conditions, self.times, self.class_dropout, self.target.model.null_conditions)

    def drawing(self, conditions: Conditions) -> Target:
        return self.target(conditions)

    def base_drift(self, pair: Pair) -> Tensor:
        return self.target(pair.conditions, self.base).drift(pair.t, pair.x_t)

    def policy_drift(self, pair: Pair) -> Tensor:
        return self.target(pair.conditions, self.policy).drift(pair.t, pair.x_t)

    def classes(self, pair: Pair) -> Tensor:
        """Their labels; all are null where there are none."""
        label = pair.conditions.label
        return torch.full_like(pair.t, self.num_classes, dtype=torch.long) if label is None else label


def _add_adapters(policy: MetaFlowMap, settings: LowRank) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("low-rank adapters need peft: pip install 'mfm-lightning[peft]'") from error
    policy.network = _adapted(policy.network, settings)


def _adapted(network: VelocityNetwork, settings: LowRank) -> VelocityNetwork:
    from peft import LoraConfig, get_peft_model

    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if missing := [end for end in settings.modules if not any(name.endswith(end) for name in names)]:
        raise ValueError(f"no linear layer of {type(network).__name__} ends in {missing[0]!r}: set adapters.modules")
    chosen = [name for name in names if name.endswith(tuple(settings.modules))]
    config = LoraConfig(r=settings.rank, lora_alpha=cast(int, settings.alpha), target_modules=chosen)
    adapted: Any = get_peft_model(network, config)
    kind, arguments = plain_class(network), network.config
    adapted.made_again = lambda: _adapted(cast(VelocityNetwork, kind(**arguments)), settings)  # FSDP's whole copy
    return adapted
