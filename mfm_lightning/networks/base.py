"""What a network for the average velocity says of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.dual import Dual


class VelocityNetwork(nn.Module, ABC):
    """A network v_{s,u}(x; t, x_t), as `MetaFlowMap` takes it; subclassing it is a convenience, not a duty.

    Attributes:
        state_shape: shape of a state.
        num_classes: number of labels; label `num_classes` is the null label.
        guidance_scales: class-guidance scales that the network knows besides 1 (none).
        null_conditions: what it takes for no condition at all, one row.
        config: its constructor's arguments, from which a file of its weights makes it again.
    """

    state_shape: tuple[int, ...]
    num_classes: int
    guidance_scales: tuple[float, ...]
    config: dict[str, Any]

    @property
    def null_conditions(self) -> Conditions:
        """What stands for no class and no guidance, one row."""
        return Conditions(label=self.num_classes, guidance=1.0)

    @abstractmethod
    def forward(
        self,
        s: Tensor,
        u: Tensor,
        x: Tensor,
        t: Tensor,
        x_t: Tensor,
        conditions: Conditions,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """v_{s,u}(x; t, x_t), `(B, *shape)`: times `(B,)`, states `(B, *shape)`, conditions of B rows.

        A network that also takes `tangents` (ds, du, dx), or None, returns with them the derivative along them too,
        without a graph (`mfm_lightning.networks.dual`). One that does not is differentiated by `torch.func.jvp`.
        """


class EmbedsPrompts(ABC):
    """A network that is conditioned on texts, and makes their embeddings itself. By its class, not by its attributes: a
    network of a user's may have an `embed` of another kind."""

    @abstractmethod
    def embed(self, conditions: Conditions) -> Conditions:
        """With the embeddings of the prompts; raises ValueError where there are no prompts."""

    def meet(self, data: Any) -> None:  # noqa: B027
        """Look, before training, at what a DataModule brings: embeddings (`embedded`), or captions (`captions`) that
        can be embedded beforehand.

        Raises:
            ValueError: for embeddings of another network's kind.
        """


def label_and_guidance(conditions: Conditions) -> tuple[Tensor, Tensor]:
    """What a class-conditional network reads, `(B,)` both; `MetaFlowMap` fills in what a caller leaves out.

    Raises:
        ValueError: if one of them is missing.
    """
    if conditions.label is None or conditions.guidance is None:
        raise ValueError("a class-conditional network needs label and guidance: call it through a MetaFlowMap")
    return conditions.label, conditions.guidance


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What a network's config has otherwise than ours, in words; not only the shapes of weights, which fit another
    convention of time, too."""
    return [f"{k} {theirs.get(k)} there, {ours[k]} here" for k in ours if ours[k] != theirs.get(k)]


def given_sizes(kind: str, **sizes: int | None) -> list[int]:
    """The sizes, by name, in their order.

    Args:
        kind: of the network, for the message.

    Raises:
        ValueError: for one that is None. A config may leave it out: `mfm fit` then takes that of the data.
    """
    if missing := [name for name, size in sizes.items() if size is None]:
        zero = " (0: none)" if "num_classes" in missing else ""
        raise ValueError(f"{kind} needs {', '.join(missing)}{zero}: give them; mfm fit takes those of the data")
    return [size for size in sizes.values() if size is not None]


def image_sizes(kind: str, state_shape: Sequence[int] | None) -> tuple[int, int]:
    """Channels and side of a state `(C, H, H)`.

    Raises:
        ValueError: if it is None (as of `given_sizes`), or no square image.
    """
    if state_shape is None:
        raise ValueError(f"{kind} needs state_shape: give it; mfm fit takes that of the data")
    if len(state_shape) != 3 or state_shape[1] != state_shape[2]:
        raise ValueError(f"state_shape {tuple(state_shape)}: {kind} takes square images, (channels, size, size)")
    return state_shape[0], state_shape[1]


def check_guidance_scales(scales: Sequence[float]) -> None:
    """Raise ValueError where a class-guidance scale is not above 1."""
    if any(g <= 1 for g in scales):
        raise ValueError(f"guidance_scales {list(scales)} must all be above 1 (1, no guidance, is always there)")


def duals(s: Tensor, u: Tensor, x: Tensor, tangents: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Dual, Dual, Dual]:
    """A network's own times and state, with their tangents where they are given."""
    ds, du, dx = (None, None, None) if tangents is None else tangents
    return Dual(s, ds), Dual(u, du), Dual(x, dx)


def result(velocity: Dual, tangents: tuple[Tensor, Tensor, Tensor] | None) -> Tensor | tuple[Tensor, Tensor]:
    """What `forward` returns: the value, with its tangent where tangents were given."""
    if tangents is None:
        return velocity.value
    tangent = torch.zeros_like(velocity.value) if velocity.tangent is None else velocity.tangent
    return velocity.value, tangent
