"""A small residual MLP for vectors (the paper's mixture experiment, F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.dual import Dual, add, concatenate, linear, silu
from mfm_lightning.networks.embeddings import TimeFeatures, nearest_scale


class MLP(nn.Module):
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

    @property
    def null_conditions(self) -> Conditions:
        """What stands for no class and no guidance, one row."""
        return Conditions(label=self.num_classes, guidance=1.0)

    def reset_condition(self) -> None:
        """Make the network ignore (t, x_t) and guidance exactly, until trained."""
        nn.init.zeros_(self.condition[2].weight)
        nn.init.zeros_(self.condition[2].bias)
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
        s, u, x = (Dual(*pair) for pair in zip((s, u, x), tangents or (None,) * 3, strict=True))
        features = self.time_features
        first, _, second = self.condition
        condition = linear(second, silu(linear(first, concatenate(Dual(x_t), features(Dual(t))))))
        index = nearest_scale(conditions.guidance, self.guidance_scales)
        embeddings = Dual(self.label_embedding(conditions.label) + self.guidance_embedding(index))
        h = add(linear(self.input, concatenate(x, features(s), features(u))), condition, embeddings)
        for first, second in self.blocks:
            h = add(h, linear(second, silu(linear(first, silu(h)))))
        velocity = linear(self.output, silu(h))
        return velocity.value if tangents is None else tuple(velocity)
