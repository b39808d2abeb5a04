"""MFM-FT of a pretrained text-to-image flow to a reward: a LoRA, trained off-policy (paper, Eq. 43)."""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.backbones import AdaptedFlow, LoRANetwork, TextToImageFlow
from mfm_lightning.checkpoints import CheckpointError, fingerprint
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import Evaluation, datamodule_of
from mfm_lightning.interpolant import interpolate
from mfm_lightning.modules.normaliser import SLOTS, LogNormaliser, prompt_slots
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.modules.tilting import DiffusionSchedule, TiltedTraining
from mfm_lightning.objectives import ConditionTimes, Pair
from mfm_lightning.objectives.finetuning import control_cost
from mfm_lightning.samplers import integrate
from mfm_rewards import Reward, RewardError, build
from mfm_rewards.protocol import name_of


class PromptFinetuning(TiltedTraining):
    """Trains a LoRA of a text-to-image flow on Eq. 43. Transformer, VAE and text encoders are there once: base, policy
    and the Meta Flow Map are the same weights with one adapter on or another.

    The prompts are the captions of the data; its images, as latents, are where training states come from. States of the
    policy's own samples come by `OffPolicyDataModule`. A run leaves `model.safetensors` and, for diffusers,
    `lora/pytorch_lora_weights.safetensors`.

    The policy's drift is trained as it is sampled: of guidance by two evaluations both are the policy's.

    Args:
        flow: the base flow (`mfm_lightning.backbones.load_flow`), of `max_rows` at least the batch.
        reward: a registered name; `{name: ..., and its options}`; or `{class_path, init_args}`.
        mfm: a `model.safetensors` of a `FlowAdapter` of this flow, the Meta Flow Map for the draws. None where
            `posterior` needs a drift alone (`GlassPosterior`).
        reward_scale: the reward is multiplied by it (the paper's lambda).
        guidance: scale of the flow's guidance; the pipeline's usual one where None, 1 for none.
        negative: negative prompt; the pipeline's usual one where None.
        rank: of the LoRA (`mfm_lightning.backbones.LoRA`).
        alpha: its scale is alpha / rank; the rank where None.
        ranks: others by module, a regular expression to a rank.
        targets: regular expression of whole names of linear layers that have one; all of attention and MLP where None.
        gradient: as `TiltedTraining`.
        times: as `TiltedTraining`.
        half_diffusion: as `TiltedTraining`.
        num_draws: as `TiltedTraining`.
        posterior: as `TiltedTraining`.
        normaliser_rate: of the running log E[e^r] by prompt.
        optimization: the optimiser and its learning rate.
        evaluation: what `validate` and `test` measure and draw.

    Raises:
        RewardError: for an unknown reward, one that needs labels or groups, or has no gradient where that is wanted.
        CheckpointError: if the Meta Flow Map is of another flow, or draws need one and there is none.
        ValueError: for a guidance that the Meta Flow Map has not learnt, and as `LoRA` and `TiltedTraining`.
    """

    num_classes = 0

    def __init__(
        self,
        flow: TextToImageFlow,
        reward: dict[str, Any] | str,
        mfm: str | None = None,
        reward_scale: float = 1.0,
        guidance: float | None = None,
        negative: str | None = None,
        rank: int = 16,
        alpha: float | None = None,
        ranks: dict[str, int] | None = None,
        targets: str | None = None,
        gradient: str = "reward",
        times: ConditionTimes | None = None,
        half_diffusion: DiffusionSchedule | None = None,
        num_draws: int = 1,
        posterior: Posterior | None = None,
        normaliser_rate: float = 0.02,
        optimization: Optimization | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        normaliser = LogNormaliser(SLOTS, normaliser_rate)
        super().__init__(gradient, times, half_diffusion, num_draws, posterior, normaliser, optimization, evaluation)
        self._reward = [build(reward).eval().requires_grad_(False)]  # in a list, as the flow
        for needed in ("labels", "groups"):
            if needed in self.reward.needs:
                raise RewardError(f"reward {name_of(self.reward)!r} needs {needed}, and prompts have none here")
        self.check_reward(self.reward)
        if mfm is None and (self.posterior.needs_meta_flow_map or self.posterior.needs_flow_map):
            raise CheckpointError(
                f"a {type(self.posterior).__name__} draws from a Meta Flow Map: give its file (mfm), or take a "
                "GlassPosterior"
            )
        self._flow = [flow.eval().requires_grad_(False)]  # in a list: frozen, and no part of this module's state
        self.state_shape = flow.state_shape
        self.guidance, self.negative, self.reward_scale = guidance, negative, reward_scale
        self._drawn = [flow if mfm is None else AdaptedFlow.load(mfm, flow)]  # before the LoRA, of the same transformer
        if isinstance(model := self._drawn[0], AdaptedFlow):
            model.check(Conditions(guidance=flow.usual_guidance if guidance is None else guidance))
        self.policy = LoRANetwork.on_flow(flow, rank=rank, alpha=alpha, ranks=ranks, targets=targets)
        said = {"reward": reward, "scale": reward_scale, "guidance": guidance, "negative": negative}
        said |= {"rank": rank, "alpha": alpha, "ranks": ranks, "targets": targets}
        if flow.decoder.gradients is not None:
            said["gradients"] = repr(flow.decoder.gradients)
        self.identity = {
            "flow": self.policy.config["base"],
            "mfm": None if mfm is None else fingerprint(mfm),
            "settings": json.dumps(said, sort_keys=True, default=str),
        }

    @property
    def flow(self) -> TextToImageFlow:
        """The base flow, of the same weights as the policy."""
        return self._flow[0]

    @property
    def reward(self) -> Reward:
        """The frozen reward."""
        return self._reward[0]

    def to_device(self, device: torch.device) -> None:
        self.reward.to(device)
        self.flow.to(device)
        self._drawn[0].to(device)

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.policy.meet(datamodule_of(self.trainer))

    def embedded(self, conditions: Conditions, device: torch.device) -> Conditions:
        """The prompts with their embeddings, as given or made here, guidance and negative prompt.

        Raises:
            ValueError: where there are no prompts.
        """
        if conditions.prompts is None:
            raise ValueError(
                "a text-to-image flow is fine-tuned for prompts: give the data captions (CaptionedImages, or shards of "
                "mfm prepare-latents --flow --captions)"
            )
        return self.policy.guided(conditions, self.negative, self.guidance).to(device)

    def noised(self, x1: Tensor, conditions: Conditions) -> Pair:
        given = self.embedded(conditions, x1.device).expand(len(x1), x1.device)
        t = self.times.sample(len(x1), x1.device)
        return Pair(x1, t, interpolate(t, torch.randn_like(x1), x1), given)

    def drawing(self, conditions: Conditions) -> Target:
        model = self._drawn[0]
        return Target(model, self.reward, self.flow.decoder, conditions, reward_scale=self.reward_scale)

    def base_drift(self, pair: Pair) -> Tensor:
        return self.flow.drift(pair.t, pair.x_t, pair.conditions)

    def policy_drift(self, pair: Pair) -> Tensor:
        return self.policy.drift(pair.t, pair.x_t, pair.conditions)

    def classes(self, pair: Pair) -> Tensor:
        """A slot for each prompt."""
        return prompt_slots(pair.conditions.prompts or ()).to(pair.t.device).expand(len(pair.t))

    # -- samples -------------------------------------------------------------------------------------------------------

    def sample_policy(self, noise: Tensor, conditions: Conditions | None = None, steps: int = 28) -> Tensor:
        """Euler samples of the policy's ODE on the flow's own times, from noise `(B, C, h, w)`."""
        return self._sample(self.policy, noise, conditions, steps)

    def sample_base(self, noise: Tensor, conditions: Conditions | None = None, steps: int = 28) -> Tensor:
        """The same of the base flow."""
        return self._sample(self.flow, noise, conditions, steps)

    @torch.no_grad()
    def _sample(
        self, model: LoRANetwork | TextToImageFlow, noise: Tensor, conditions: Conditions | None, steps: int
    ) -> Tensor:
        given = self.embedded(conditions or Conditions(), noise.device).expand(len(noise), noise.device)
        return integrate(lambda t, x: model.drift(t, x, given), noise, self.flow.time_grid(steps))

    @torch.no_grad()
    def policy_path(self, noise: Tensor, conditions: Conditions, steps: int = 28) -> tuple[Tensor, Tensor]:
        """`sample_policy`, and the integral over t of |b_theta - b|^2 / (sigma^2/2) on the way, `(B,)`: once the policy
        is near its optimum, its mean is KL(policy || base)."""
        given = self.embedded(conditions, noise.device).expand(len(noise), noise.device)
        x, total = noise, torch.zeros(len(noise), device=noise.device)
        for t, after in itertools.pairwise(self.flow.time_grid(steps)):
            policy, half = self.policy.drift(t, x, given), self.half_diffusion(torch.full_like(total, (t + after) / 2))
            total += (after - t) * control_cost(self.flow.drift(t, x, given), policy, half)
            x = x + (after - t) * policy
        return x, total
