"""Rewards of a classifier: of one class, and the log-probability of a mixture of classes (paper, section 7.1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfm_rewards.classifiers import class_index, class_names, load_classifier
from mfm_rewards.pretrained import at_least_float32
from mfm_rewards.protocol import Reward, nearest
from mfm_rewards.registry import register


@register("classifier")
class ClassProbability(Reward):
    """log p(class | x) of a classifier, or the class's logit, times `scale`.

    Args:
        classifier: a file that `mfm fit` wrote; a name: mnist, or efficientnet_lite0 of ImageNet's 1,000 classes; a
            dictionary of a `class_path`, its `init_args` and a file of `weights`; or a module.
        target: label or name of the class, such as 281 or "tabby"; or a dictionary of them by prompt, for text-to-image
            flows: {a photo of a cat: tabby}.
        output: "log_probability", or "logit", whose gradient does not vanish where the class is nearly certain.
        scale: factor of the reward.
    """

    def __init__(
        self,
        classifier: nn.Module | dict[str, Any] | str,
        target: int | str | dict[str, int | str],
        output: Literal["log_probability", "logit"] = "log_probability",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if output not in ("log_probability", "logit"):
            raise ValueError(f"output {output!r}: expected log_probability or logit")
        self.classifier = load_classifier(classifier)
        names = class_names(self.classifier)
        self.by_prompt: dict[str, int] | None = None
        if isinstance(target, dict):
            if not target:
                raise ValueError("target {}: expected a class for each prompt")
            self.by_prompt = {str(prompt): class_index(one, names) for prompt, one in target.items()}
            self.needs = ("images", "prompts")
        else:
            self.target = class_index(target, names)
        self.output, self.scale = output, scale

    def forward(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        targets = self._targets(prompts) if self.by_prompt is not None else [self.target] * len(images)
        if len(targets) != len(images):
            raise ValueError(f"{len(targets)} prompts for {len(images)} images: target has a class for each prompt")
        logits = _logits(self.classifier, images, max(targets, default=0) + 1)
        chosen = logits if self.output == "logit" else logits.log_softmax(dim=1)
        return self.scale * chosen.gather(1, torch.tensor(targets, device=chosen.device)[:, None])[:, 0]

    def _targets(self, prompts: Sequence[str]) -> list[int]:
        known = self.by_prompt or {}
        if unknown := [prompt for prompt in prompts if prompt not in known]:
            raise ValueError(
                f"target has no class for prompt {unknown[0]!r}: did you mean {nearest(unknown[0], known)!r}?"
            )
        return [known[prompt] for prompt in prompts]


@register("class_mixture")
class ClassMixture(Reward):
    """log sum_i w_i p(y_i | x) of a classifier's class probabilities, times `scale` (paper, section 7.1.2).

    Args:
        classifier: as of the reward `classifier`.
        weights: w, one number for each class, or a dictionary of them by class; none negative, not all zero. They are
            normalised to sum to 1.
        scale: factor of the reward.
    """

    weights: Tensor

    def __init__(
        self,
        classifier: nn.Module | dict[str, Any] | str,
        weights: Sequence[float] | dict[int, float],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.classifier = load_classifier(classifier)
        if isinstance(weights, dict):
            by_class = {int(k): float(w) for k, w in weights.items()}  # YAML and JSON may have strings
            weights = [by_class.get(k, 0.0) for k in range(max(by_class) + 1)]
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float32))
        if self.weights.dim() != 1 or (self.weights < 0).any() or not self.weights.sum() > 0:
            raise ValueError(f"weights {list(weights)} must be one number a class, none negative, not all zero")
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        logits = _logits(self.classifier, images, len(self.weights))
        log_weights = (self.weights / self.weights.sum()).log().to(logits)
        chosen = logits.log_softmax(dim=1)[:, : len(log_weights)]
        # only classes of positive weight: a log-weight of -inf would give NaN gradients
        return self.scale * (chosen + log_weights)[:, self.weights > 0].logsumexp(dim=1)


def _logits(classifier: nn.Module, images: Tensor, least: int) -> Tensor:
    """`(B, K)`, at least float32; raises ValueError for fewer classes than `least`."""
    logits = at_least_float32(classifier(images))  # autocast may have made them 16 bits
    if logits.dim() != 2 or logits.shape[1] < least:
        raise ValueError(f"the classifier gave {tuple(logits.shape)}: expected (B, K), K >= {least}")
    return logits
