"""Rewards of a classifier: the log-probability of a mixture of classes (paper, section 7.1.2)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfm_rewards.protocol import Reward
from mfm_rewards.registry import register
from mfm_rewards.weights import load_state_dict, unwrapped


@register("class_mixture")
class ClassMixture(Reward):
    """log sum_i w_i p(y_i | x) of a classifier's class probabilities, times `scale` (paper, section 7.1.2).

    Args:
        classifier: a module from images `(B, C, H, W)` in [0, 1] to logits `(B, K)`; or a dictionary of its
            `class_path`, and where needed of its `init_args` and of a file of `weights` (`.safetensors` or `.pt`; a
            `.pt` is read with `weights_only=True`).
        weights: w, one number for each class, or a dictionary of them by class; none negative, not all zero. They are
            normalised to sum to 1.
        scale: factor of the reward.
    """

    weights: Tensor

    def __init__(
        self, classifier: nn.Module | dict[str, Any], weights: Sequence[float] | dict[int, float], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.classifier = classifier if isinstance(classifier, nn.Module) else load_classifier(**classifier)
        self.classifier.eval().requires_grad_(False)
        if isinstance(weights, dict):
            by_class = {int(k): float(w) for k, w in weights.items()}  # YAML and JSON may have strings
            weights = [by_class.get(k, 0.0) for k in range(max(by_class) + 1)]
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))
        if self.weights.dim() != 1 or (self.weights < 0).any() or not self.weights.sum() > 0:
            raise ValueError(f"weights {list(weights)} must be one number a class, none negative, not all zero")
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        logits = self.classifier(images).float()  # autocast may have made them 16 bits
        if logits.dim() != 2 or logits.shape[1] < len(self.weights):
            raise ValueError(f"the classifier gave {tuple(logits.shape)}: expected (B, K), K >= {len(self.weights)}")
        log_weights = (self.weights / self.weights.sum()).log().to(logits)
        chosen = logits.log_softmax(dim=1)[:, : len(log_weights)]
        # only classes of positive weight: a log-weight of -inf would give NaN gradients
        return self.scale * (chosen + log_weights)[:, self.weights > 0].logsumexp(dim=1)


def load_classifier(class_path: str, init_args: dict[str, Any] | None = None, weights: str | None = None) -> nn.Module:
    """A classifier by its class, with weights from a file of plain tensors.

    Raises:
        ValueError: if the class cannot be imported, or the weights are not plain tensors or do not fit.
    """
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"classifier {class_path!r} cannot be imported: {error}") from error
    classifier = target(**(init_args or {}))
    if weights is not None:
        try:
            state = unwrapped(load_state_dict(weights), list(classifier.state_dict())[:1], weights)
            classifier.load_state_dict(state)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"weights {weights!r} of the classifier cannot be loaded: {error}") from error
    return classifier
