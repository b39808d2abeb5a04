"""The Meta Flow Map: a network for v_{s,u}(x; t, x_t) and what follows from it (paper, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfm_lightning.interpolant import as_times, expand, randn
from mfm_lightning.tangents import velocity_and_jvp

__all__ = ["MetaFlowMap", "velocity_and_jvp"]


class MetaFlowMap(nn.Module):
    """Average velocity, flow map, base drift and posterior draws of one network.

    Everywhere: inner times `s <= u` and outer time `t` are `(B,)` or numbers in [0, 1]; inner state `x` and outer state
    `x_t` are `(B, *shape)`; `label` is `(B,)` long, a number, or None for the null label; `guidance` is the
    class-guidance scale fed to the network: `(B,)`, a number, or None for none (1).

    Args:
        network: a network of `mfm_lightning.networks`, or any module with their `forward`, `state_shape`,
            `num_classes` and `guidance_scales`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.network.state_shape)

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """Class-guidance scales that the network knows besides 1."""
        return tuple(self.network.guidance_scales)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(self, s, u, x: Tensor, t, x_t: Tensor, label=None, guidance=None, tangents=None):
        """v_{s,u}(x; t, x_t), `(B, *shape)`; with `tangents` (see `velocity_and_jvp`) also its derivative, for networks
        that propagate tangents themselves.

        Raises:
            ValueError: if a state's shape, a label's type or a guidance scale does not fit the network.
        """
        self._check(x, x_t)
        s, u, t = (as_times(time, x) for time in (s, u, t))
        condition = (t, x_t, self._labels(label, x), self._guidance(guidance, x))
        return self.network(s, u, x, *condition, **({} if tangents is None else {"tangents": tangents}))

    def velocity(self, s, u, x: Tensor, t, x_t: Tensor, label=None, guidance=None) -> Tensor:
        """Average velocity v_{s,u}(x; t, x_t), `(B, *shape)`."""
        return self(s, u, x, t, x_t, label, guidance)

    def flow_map(self, s, u, x: Tensor, t, x_t: Tensor, label=None, guidance=None) -> Tensor:
        """X_{s,u}(x; t, x_t) = x + (u-s) v_{s,u}(x; t, x_t), `(B, *shape)`."""
        velocity = self(s, u, x, t, x_t, label, guidance)
        return x + expand(as_times(u, x) - as_times(s, x), x) * velocity

    def drift(self, t, x: Tensor, label=None, guidance=None) -> Tensor:
        """The base flow that every MFM contains: b_t(x) = v_{t,t}(x; 0, 0), `(B, *shape)`."""
        return self(t, t, x, 0.0, torch.zeros_like(x), label, guidance)

    def sample_posterior(
        self,
        x_t: Tensor,
        t,
        num_samples: int = 1,
        steps: int = 1,
        noise: Tensor | None = None,
        label=None,
        guidance=None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws from p_{1|t}(. | x_t) by `steps` flow-map steps on a uniform inner grid, `(B, N, *shape)`.

        Differentiable in `x_t`. With one step the draw is X_{0,1}(eps; t, x_t).

        Args:
            noise: inner noise eps, `(B, N, *shape)`; drawn from `generator` where None.
        """
        if steps < 1 or num_samples < 1:
            raise ValueError(f"steps ({steps}) and num_samples ({num_samples}) must be at least 1")
        if noise is None:
            noise = randn((len(x_t), num_samples, *x_t.shape[1:]), x_t, generator)
        if noise.shape[:1] + noise.shape[2:] != x_t.shape:
            raise ValueError(
                f"noise of shape {tuple(noise.shape)} for states of shape {tuple(x_t.shape)}: "
                f"expected (B, N, *shape) = ({len(x_t)}, N, {', '.join(map(str, x_t.shape[1:]))})"
            )
        N = noise.shape[1]

        def repeat(value):
            return value.repeat_interleave(N, dim=0) if isinstance(value, Tensor) and value.dim() else value

        outer, time, label, guidance = repeat(x_t), repeat(as_times(t, x_t)), repeat(label), repeat(guidance)
        x = noise.flatten(0, 1)
        for k in range(steps):
            x = self.flow_map(k / steps, (k + 1) / steps, x, time, outer, label, guidance)
        return x.reshape(noise.shape)

    def _check(self, x: Tensor, x_t: Tensor) -> None:
        if tuple(x.shape[1:]) != self.state_shape or x_t.shape != x.shape:
            raise ValueError(
                f"states of shape {tuple(x.shape)} and conditions of shape {tuple(x_t.shape)}: "
                f"this network takes (B, {', '.join(map(str, self.state_shape))}) for both"
            )

    def _labels(self, label, x: Tensor) -> Tensor:
        if label is None:
            label = self.num_classes
        label = torch.as_tensor(label, device=x.device)
        if label.is_floating_point():
            raise ValueError(f"labels of type {label.dtype}: expected integers in 0..{self.num_classes}")
        return label.long().expand(len(x))

    def _guidance(self, guidance, x: Tensor) -> Tensor:
        if guidance is None:
            guidance = 1.0
        known = (1.0, *self.network.guidance_scales)
        if not isinstance(guidance, Tensor) and not any(abs(guidance - g) < 1e-6 for g in known):
            raise ValueError(f"guidance {guidance} is not a scale that this network knows: {list(known)}")
        return as_times(guidance, x)
