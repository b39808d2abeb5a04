"""Networks for the amortised value V_phi(t, x_t, label): one number a state (paper, section 4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import given_sizes
from mfm_lightning.networks.dit import AdaLN, Block, PatchEmbedding
from mfm_lightning.networks.dual import Dual, add, layer_norm, modulate
from mfm_lightning.networks.embeddings import TimeEmbedding, TimeFeatures, sincos_positions


class ValueNetwork(nn.Module, ABC):
    """Base: the call with defaults, and the level at which an untrained network starts."""

    state_shape: tuple[int, ...]
    num_classes: int
    output: nn.Linear
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
        self.output.weight.zero_()
        self.output.bias.fill_(float(level))


class ValueDiT(ValueNetwork):
    """A DiT on images or latents whose tokens are averaged to one number; conditioned on t and the label.

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
    """

    pos_embed: Tensor

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
    ) -> None:
        super().__init__()
        input_size, in_channels, num_classes = given_sizes(
            "a ValueDiT", input_size=input_size, in_channels=in_channels, num_classes=num_classes
        )
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"input_size {input_size} must be a multiple of patch_size {patch_size}, and hidden_size {hidden_size} "
                f"of num_heads {num_heads} and of 4"
            )
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.state_shape, self.num_classes = (in_channels, input_size, input_size), num_classes
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size))
        self.time_embedding = TimeEmbedding(hidden_size)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm=False) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation = AdaLN(hidden_size, 2)
        self.output = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLN):
                module.zero_output()
        self.set_level(0.0)

    @property
    def regions(self) -> list[nn.Module]:
        """As in `DiT`."""
        return list(self.blocks)

    def value(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        condition = add(self.time_embedding(Dual(t)), Dual(self.label_embedding(conditions.label)))
        tokens = add(self.x_embedder(Dual(x)), Dual(self.pos_embed))
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens = modulate(layer_norm(self.norm, tokens), *self.modulation(condition))
        return self.output(tokens.value.mean(dim=1)).squeeze(1)


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

    def value(self, t: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        h = self.input(torch.cat([x, self.time_features(Dual(t)).value], dim=1)) + self.label_embedding(
            conditions.label
        )
        for block in self.blocks:
            h = h + block(h)
        return self.output(F.silu(h)).squeeze(1)
