"""Value estimation: measures estimators of V (`mfm test`), and fits an amortised V_phi(t, x_t, label) (`mfm fit`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.alignment.values import log_mean_exp
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.interpolant import interpolate, randn
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.objectives import ConditionTimes
from mfm_lightning.objectives.value import amortised_value_loss


class ValueEstimation(TrainingModule):
    """Fits V_phi by `amortised_value_loss` on noised data, with draws from the frozen Meta Flow Map.

    Args:
        network: a network of `mfm_lightning.networks.VALUE_NETWORKS`.
        target: model, reward and decoder; frozen, in neither the checkpoint nor the optimiser.
        times: outer times t.
        class_dropout: probability that a label becomes the null label.
        num_draws: posterior draws for each state.
        posterior: source of draws; one step of the flow map where None.
        optimization: the optimiser and its learning rate.
        evaluation: what `test` measures.

    Raises:
        ValueError: if the network's states or classes are not the model's, or the reward needs labels that class
            dropout takes away.
    """

    exported_kind = "value"

    def __init__(
        self,
        network: nn.Module,
        target: TargetSettings,
        times: ConditionTimes | None = None,
        class_dropout: float = 0.2,
        num_draws: int = 1,
        posterior: Posterior | None = None,
        optimization: Optimization | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        super().__init__(optimization, evaluation)
        self.network, self.target = network, target.load()
        self.state_shape, self.num_classes = tuple(network.state_shape), network.num_classes
        model = self.target.model
        if (self.state_shape, self.num_classes) != (model.state_shape, model.num_classes):
            raise ValueError(
                f"the value network takes {self.state_shape} with {self.num_classes} classes, the model "
                f"{model.state_shape} with {model.num_classes}"
            )
        self.target.check_labels(all_labelled=class_dropout == 0)
        if num_draws < 1 or not 0 <= class_dropout <= 1:
            raise ValueError(f"num_draws {num_draws} must be at least 1 and class_dropout {class_dropout} in [0, 1]")
        self.times, self.class_dropout = times or ConditionTimes(power=1.0, zero_rate=0.05), class_dropout
        self.num_draws, self.posterior = num_draws, posterior or FlowMapPosterior()
        self._levelled = False

    @property
    def trained(self) -> nn.Module:
        return self.network

    @property
    def exported(self) -> nn.Module:
        return self.network

    @property
    def frozen(self) -> dict[str, Any]:
        return self.target.identity

    def to_device(self, device: torch.device) -> None:
        self.target.to(device)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        raise ValueError(
            "there is nothing to predict: mfm test measures values, mfm predict with RewardAlignment steers"
        )

    def losses(self, x1: Tensor, label: Tensor, training: bool) -> dict[str, Tensor]:
        state, rewards = self._states_and_rewards(x1, label)
        if training and not self._levelled and self.global_step == 0:
            # start at the level of the rewards: e^{r - V} is then near 1
            self.network.set_level(log_mean_exp(self.all_gather(rewards).flatten()))
        self._levelled = self._levelled or training
        value = self.network(*state)
        gap = (rewards - value.detach()[:, None]).clamp_max(20.0)
        return {
            "loss": amortised_value_loss(value, rewards).mean(),
            "value": value.detach().mean(),
            "mean_exp_gap": gap.exp().mean(),  # E[e^{r - V}], 1 where V is exact
        }

    @torch.no_grad()
    def _states_and_rewards(self, x1: Tensor, label: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """(t, x_t, label) of a batch, and the rewards `(B, N)` of draws from their posteriors."""
        label = torch.where(torch.rand(len(x1), device=x1.device) < self.class_dropout, self.num_classes, label)
        t = self.times.sample(len(x1), x1.device)
        x_t = interpolate(t, torch.randn_like(x1), x1)
        target = self.target(label)
        noise = randn((len(x1), self.num_draws, *x1.shape[1:]), x1)
        draws = self.posterior(target, t, x_t, noise)
        return (t, x_t, label), target.rewards(draws.flatten(0, 1)).reshape(len(x1), self.num_draws)
