"""Networks for the amortised value V_phi(t, x_t, label): one number a state (paper, section 4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import given_sizes
from mfm_lightning.networks.dit import DiT, FinalLayer, QKNorm
from mfm_lightning.networks.dual import Dual
from mfm_lightning.networks.embeddings import TimeFeatures


class ValueNetwork(nn.Module, ABC):
    """Base: the call with defaults, and the level at which an untrained network starts."""

    state_shape: tuple[int, ...]
    num_classes: int
    config: dict[str, Any]

    @property
    def null_conditions(self) -> Conditions:
        """What stands for no class, one row."""
        return Conditions(label=self.num_classes)

    def forward(self, t: Tensor, x: Tensor, conditions: Conditions | None = None) -> Tensor:
        """V_phi `(B,)` at times `(B,)` and states `(B, *shape)`; without a label, for the null label."""
        conditions = (conditions or Conditions()).filled(self.null_conditions).expand(len(x), x.device)
        return self.value(t, x, conditions).float()

    @abstractmethod
    def value(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        """The same with a label for each state."""

    @torch.no_grad()
    def set_level(self, level: Tensor | float) -> None:
        """Make the network constant, V = `level`, until it is trained further."""
        last = self.last_layer()
        last.weight.zero_()
        last.bias.fill_(float(level))

    @abstractmethod
    def last_layer(self) -> nn.Linear:
        """To one number."""


class ValueDiT(ValueNetwork):
    """A `DiT` whose final layer makes one number of each token, averaged; it sees (t, x_t) as a base flow sees (s, x).

    So it can start from the weights of a flow of the same sizes (`start_from`), which knows images already.

    In a config `input_size`, `in_channels` and `num_classes` may be left out: they are those of the data.

    Args:
        input_size: height and width of the state.
        patch_size: side of a patch; divides `input_size`.
        in_channels: channels of the state.
        hidden_size: width of the transformer; a multiple of `num_heads` and of 4.
        depth: number of blocks.
        num_heads: attention heads of a block.
        num_classes: number of labels; label `num_classes` is the null label.
        mlp_ratio: width of a block's MLP, in widths of the transformer.
        encoder_depth: as of `DiT`; all blocks where None.
        qk_norm: as of `DiT`.
        guidance_scales: as of `DiT`; values of guided flows.
        flip_time: as of `DiT`.
    """

    def __init__(
        self,
        input_size: int | None = None,
        patch_size: int = 2,
        in_channels: int | None = None,
        hidden_size: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        num_classes: int | None = None,
        mlp_ratio: float = 4.0,
        encoder_depth: int | None = None,
        qk_norm: QKNorm = False,
        guidance_scales: Sequence[float] = (),
        flip_time: bool = False,
    ) -> None:
        super().__init__()
        input_size, in_channels, num_classes = given_sizes(
            "a ValueDiT", input_size=input_size, in_channels=in_channels, num_classes=num_classes
        )
        self.flow = DiT(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads,
            depth if encoder_depth is None else encoder_depth, num_classes, mlp_ratio, qk_norm, guidance_scales,
            flip_time,
        )  # fmt: skip
        self.config = dict(self.flow.config)
        self.state_shape, self.num_classes = self.flow.state_shape, num_classes
        self.flow.final_layer = FinalLayer(hidden_size, 1)
        self.flow.final_layer.adaLN_modulation.zero_output()
        self.set_level(0.0)

    @property
    def null_conditions(self) -> Conditions:
        return self.flow.null_conditions

    @property
    def regions(self) -> list[nn.Module]:
        """As in `DiT`."""
        return self.flow.regions

    def last_layer(self) -> nn.Linear:
        return self.flow.final_layer.linear

    def start_from(self, flow: DiT) -> None:
        """Take the weights of a flow of the same sizes, all but what makes its velocity; see `DiT.start_from`.

        Raises:
            ValueError: for a network of another kind or other sizes, or one with more blocks.
        """
        self.flow.start_from(flow, without=("final_layer.linear",))

    def value(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        time, zero = Dual(t), torch.zeros_like(t)
        return self.flow.by_token(time, time, Dual(x), zero, torch.zeros_like(x), conditions).value.mean(dim=(1, 2))


class ValueMLP(ValueNetwork):
    """A residual MLP on vectors, conditioned on t and the label.

    Args:
        dim: size of the state vector.
        hidden_size: width.
        depth: number of residual blocks.
        num_classes: number of labels (0: none); label `num_classes` is the null label.
    """

    def __init__(self, dim: int = 2, hidden_size: int = 256, depth: int = 3, num_classes: int = 0) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.state_shape, self.num_classes = (dim,), num_classes
        self.time_features = TimeFeatures(num_frequencies=8, max_frequency=2 * math.pi)
        self.input = nn.Linear(dim + self.time_features.size, hidden_size)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
            )
            for _ in range(depth)
        )
        self.output = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        self.set_level(0.0)

    def last_layer(self) -> nn.Linear:
        return self.output

    def value(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        h = self.input(torch.cat([x, self.time_features(Dual(t)).value], dim=1)) + self.label_embedding(
            conditions.label
        )
        for block in self.blocks:
            h = h + block(h)
        return self.output(F.silu(h)).squeeze(1)
