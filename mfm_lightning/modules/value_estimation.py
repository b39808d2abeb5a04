"""Value estimation: measures estimators of V (`mfm test`), fits an amortised V_phi(t, x_t, conditions) (`mfm fit`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.posteriors import FlowMapPosterior, Posterior
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.alignment.values import log_mean_exp
from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.interpolant import randn
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.modules.optimization import Optimization
from mfm_lightning.networks.dit import DiT
from mfm_lightning.networks.value import ValueDiT, ValueNetwork
from mfm_lightning.objectives import ConditionTimes, Pair, noised
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
        initial: flow from whose weights the network starts (`ValueDiT.start_from`): a `model.safetensors`, a name
            ("mnist/flow") or a Hugging Face id; random weights where None.
        optimization: the optimiser and its learning rate.
        evaluation: what `test` measures.

    Raises:
        ValueError: if the network's states or classes are not the model's, or the reward needs labels that class
            dropout takes away.
        CheckpointError: for an initial flow of another architecture.
    """

    exported_kind = "value"
    measures_untrained = True  # the estimators from draws

    def __init__(
        self,
        network: nn.Module,
        target: TargetSettings,
        times: ConditionTimes | None = None,
        class_dropout: float = 0.2,
        num_draws: int = 1,
        posterior: Posterior | None = None,
        initial: str | None = None,
        optimization: Optimization | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        super().__init__(optimization, evaluation)
        self.network, self.target = cast(ValueNetwork, network), target.load()  # or one that keeps to its attributes
        self.state_shape, self.num_classes = tuple(self.network.state_shape), self.network.num_classes
        model = self.target.model
        if (self.state_shape, self.num_classes) != (model.state_shape, model.num_classes):
            raise ValueError(
                f"the value network takes {self.state_shape} with {self.num_classes} classes, the model "
                f"{model.state_shape} with {model.num_classes}"
            )
        self.target.check_labels(all_labelled=class_dropout == 0)
        if initial is not None:
            _initialise(self.network, initial)
        if num_draws < 1 or not 0 <= class_dropout <= 1:
            raise ValueError(f"num_draws {num_draws} must be at least 1 and class_dropout {class_dropout} in [0, 1]")
        self.times, self.class_dropout = times or ConditionTimes(power=1.0, zero_rate=0.05), class_dropout
        self.num_draws, self.posterior = num_draws, posterior or FlowMapPosterior()
        self._levelled = False

    @property
    def trained(self) -> nn.Module:
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

    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        pair = noised(x1, conditions, self.times, self.class_dropout, self.target.model.null_conditions)
        rewards = self._rewards(pair)
        if training and not self._levelled and self.global_step == 0:
            # start at the level of the rewards: e^{r - V} is then near 1
            self.network.set_level(log_mean_exp(cast(Tensor, self.all_gather(rewards)).flatten()))
        self._levelled = self._levelled or training
        value = self.network(pair.t, pair.x_t, pair.conditions)
        gap = (rewards - value.detach()[:, None]).clamp_max(20.0)
        return {
            "loss": amortised_value_loss(value, rewards).mean(),
            "value": value.detach().mean(),
            "mean_exp_gap": gap.exp().mean(),  # E[e^{r - V}], 1 where V is exact
        }

    @torch.no_grad()
    def _rewards(self, pair: Pair) -> Tensor:
        """Rewards `(B, N)` of draws from the states' posteriors."""
        x_t = pair.x_t
        noise = randn((len(x_t), self.num_draws, *x_t.shape[1:]), x_t)
        target = self.target(pair.conditions)
        draws = self.posterior(target, pair.t, x_t, noise)
        return target.rewards(draws.flatten(0, 1)).reshape(len(x_t), self.num_draws)


def _initialise(network: ValueNetwork, path: str) -> None:
    if not isinstance(network, ValueDiT):
        raise ValueError(f"initial: a {type(network).__name__} cannot start from a flow, a ValueDiT can")
    try:
        network.start_from(cast(DiT, load_model(path).network))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
