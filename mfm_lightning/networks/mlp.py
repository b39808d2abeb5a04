"""A small residual MLP for vectors (the paper's mixture experiment, F.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.networks.embeddings import TimeEmbedding


class MLP(nn.Module):
    """Average velocity v_{s,u}(x; t, x_t) of vectors.

    Residual blocks h + W2 silu(W1 h + W3 c), where c embeds the times and the label. The outer state enters through a
    gate that is zero until trained, like the outer time's embedding.

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
        times = {"num_frequencies": 16, "max_frequency": 2 * math.pi}
        self.s_embedding = TimeEmbedding(hidden_size, **times)
        self.u_embedding = TimeEmbedding(hidden_size, **times)
        self.t_embedding = TimeEmbedding(hidden_size, **times)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.guidance_embedding = nn.Embedding(len(self.guidance_scales) + 1, hidden_size)
        self.input = nn.Linear(dim, hidden_size)
        self.condition_input = nn.Linear(dim, hidden_size)
        self.condition_gate = nn.Linear(hidden_size, hidden_size)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Linear(hidden_size, hidden_size),
                    nn.Linear(hidden_size, hidden_size, bias=False),
                    nn.Linear(hidden_size, hidden_size),
                ]
            )
            for _ in range(depth)
        )
        self.output = nn.Linear(hidden_size, dim)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.reset_condition()

    def reset_condition(self) -> None:
        """Make the network ignore (t, x_t) and guidance exactly, until trained."""
        self.t_embedding.zero_output()
        nn.init.zeros_(self.condition_gate.weight)
        nn.init.zeros_(self.condition_gate.bias)
        nn.init.zeros_(self.guidance_embedding.weight)

    def forward(self, s: Tensor, u: Tensor, x: Tensor, t: Tensor, x_t: Tensor, label: Tensor, guidance: Tensor):
        """v_{s,u}(x; t, x_t): times `(B,)`, states `(B, dim)`, `label` `(B,)` long, `guidance` `(B,)` scales."""
        t_embedding = self.t_embedding(t)
        scales = torch.tensor([1.0, *self.guidance_scales], device=guidance.device, dtype=guidance.dtype)
        index = (guidance[:, None] - scales).abs().argmin(dim=1)
        c = self.s_embedding(s) + self.u_embedding(u) + t_embedding
        c = F.silu(c + self.label_embedding(label) + self.guidance_embedding(index))
        h = self.input(x) + self.condition_gate(F.silu(t_embedding)) * self.condition_input(x_t)
        for first, condition, second in self.blocks:
            h = h + second(F.silu(first(h) + condition(c)))
        return self.output(F.silu(h))
