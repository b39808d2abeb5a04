"""A small residual MLP for vectors (the paper's mixture experiment, F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import VelocityNetwork, duals, label_and_guidance, result
from mfm_lightning.networks.dual import Dual, add, concatenate, linear, silu
from mfm_lightning.networks.embeddings import TimeFeatures, nearest_scale


class MLP(VelocityNetwork):
    """Average velocity v_{s,u}(x; t, x_t) of vectors.

    The state, features of the inner times and the label enter first; residual blocks h + W2 silu(W1 h) follow.
    The condition (t, x_t) enters through a branch of its own, whose output is zero until trained.

    Args:
        dim: size of the state vector.
        hidden_size: width.
        depth: number of residual blocks.
        num_classes: number of labels (0: none); label `num_classes` is the null label.
        guidance_scales: class-guidance scales that the network knows besides 1 (none).
    """

    def __init__(
        self,
        dim: int = 2,
        hidden_size: int = 256,
        depth: int = 3,
        num_classes: int = 0,
        guidance_scales: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["guidance_scales"] = list(guidance_scales)
        self.state_shape = (dim,)
        self.num_classes, self.guidance_scales = num_classes, tuple(guidance_scales)
        self.time_features = TimeFeatures(num_frequencies=8, max_frequency=2 * math.pi)
        size = self.time_features.size
        self.input = nn.Linear(dim + 2 * size, hidden_size)
        self.condition = nn.Sequential(
            nn.Linear(dim + size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.guidance_embedding = nn.Embedding(len(self.guidance_scales) + 1, hidden_size)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, hidden_size)])
            for _ in range(depth)
        )
        self.output = nn.Linear(hidden_size, dim)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.reset_condition()

    def reset_condition(self) -> None:
        """Make the network ignore (t, x_t) and guidance exactly, until trained."""
        last = cast(nn.Linear, self.condition[2])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.zeros_(self.guidance_embedding.weight)

    def forward(
        self,
        s: Tensor,
        u: Tensor,
        x: Tensor,
        t: Tensor,
        x_t: Tensor,
        conditions: Conditions,
        tangents: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """v_{s,u}(x; t, x_t): times `(B,)`, states `(B, dim)`, conditions with label and guidance of B rows.

        With `tangents` (ds, du, dx) also its derivative along them, without a graph.
        """
        label, guidance = label_and_guidance(conditions)
        start, end, state = duals(s, u, x, tangents)
        features = self.time_features
        condition = _two_layers(self.condition[0], self.condition[2], concatenate(Dual(x_t), features(Dual(t))))
        index = nearest_scale(guidance, self.guidance_scales)
        embeddings = Dual(self.label_embedding(label) + self.guidance_embedding(index))
        h = add(linear(self.input, concatenate(state, features(start), features(end))), condition, embeddings)
        for block in self.blocks:
            first, second = block.children()
            h = add(h, _two_layers(first, second, silu(h)))
        velocity = linear(self.output, silu(h))
        return result(velocity, tangents)


def _two_layers(first: nn.Module, second: nn.Module, x: Dual) -> Dual:
    return linear(cast(nn.Linear, second), silu(linear(cast(nn.Linear, first), x)))
