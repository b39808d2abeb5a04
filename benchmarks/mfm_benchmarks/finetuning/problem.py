"""What is fine-tuned to what: a policy, its base flow, a reward, and where training states come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.target import Target
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import Times
from mfm_lightning.samplers import sample_ode


class Policy(Protocol):
    """What is trained: a flow with parameters, such as a MetaFlowMap, or a text-to-image flow with an adapter."""

    @property
    def state_shape(self) -> tuple[int, ...]: ...

    def drift(self, t: Times, x: Tensor, conditions: Conditions | None = None) -> Tensor: ...


class Problem:
    """A policy, and the reward that it is fine-tuned to; all evaluations of training are counted on one meter.

    Args:
        policy: begins as the base flow.
        parameters: those of the policy that are trained.
        make_target: base flow and reward for conditions `(B)`; its drift is the base's, its rewards are scaled.
        draw: conditions of so many training samples.
        data: so many clean states `(B, *shape)` with their conditions; None where there are none.
        device: of the policy.

    Raises:
        ValueError: if there is no parameter to train.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: Sequence[nn.Parameter],
        make_target: Callable[[Conditions], Target],
        draw: Callable[[int], Conditions],
        data: Callable[[int], tuple[Tensor, Conditions]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.policy, self.parameters = policy, [p for p in parameters if p.requires_grad]
        self.draw, self.data, self.device = draw, data, torch.device(device)
        self._make_target, self.meter = make_target, Meter()
        if not self.parameters:
            raise ValueError(f"{type(policy).__name__} has no parameter to train: give those with requires_grad")

    def target(self, conditions: Conditions) -> Target:
        """Base flow and reward of samples with these conditions."""
        target = self._make_target(conditions)
        target.meter = self.meter
        return target

    def on_policy(self, conditions: Conditions) -> Target:
        """The same with the policy's drift."""
        return self.target(conditions).with_drift(self.policy.drift)

    def noise(self, num: int) -> Tensor:
        """`(num, *shape)`, of torch's global random state."""
        return torch.randn(num, *self.policy.state_shape, device=self.device)

    @torch.no_grad()
    def sample(self, conditions: Conditions, num: int, steps: int) -> Tensor:
        """Euler samples of the policy's ODE, `(num, *shape)`, without gradients."""
        x0 = self.noise(num)
        return sample_ode(self.on_policy(conditions).expand(x0).drift, x0, steps)


@contextmanager
def with_weights(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Iterator[None]:
    """The parameters have other values inside. Graphs that are made inside must not be differentiated outside."""
    own = [p.data for p in parameters]
    try:
        for p, tensor in zip(parameters, tensors, strict=True):
            p.data = tensor
        yield
    finally:
        for p, tensor in zip(parameters, own, strict=True):
            p.data = tensor


def weights_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters' values."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def move_towards(average: Sequence[Tensor], parameters: Sequence[nn.Parameter], share: float) -> None:
    """average <- (1 - share) average + share parameters, in place."""
    for mean, p in zip(average, parameters, strict=True):
        mean.lerp_(p.detach(), share)
