"""What DiT and UNet have in common: how times, class and guidance enter (Decoupled MeanFlow, arXiv 2510.24474).

    encoder  c = s + u + class + t + guidance embeddings
    decoder  c = s + u + class + t embeddings (its own s and u embeddings)

The encoder's s-embedding and the decoder's u-embedding are a flow's own; the other two, and the t-embedding, start at
zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import VelocityNetwork, label_and_guidance
from mfm_lightning.networks.dual import Dual, add, checkpointed
from mfm_lightning.networks.embeddings import TimeEmbedding, nearest_scale


class TwoTimeNetwork(VelocityNetwork):
    """Base class: a network of blocks `(x, c) -> x` with these embeddings.

    Attributes:
        checkpoint_activations: keep the input of each block only, and compute the rest again in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_activations = False

    def embed_conditions(self, hidden_size: int, num_classes: int, guidance_scales: Sequence[float]) -> None:
        """Make the embeddings, of so many numbers; called once, when a network is made."""
        self.num_classes, self.guidance_scales = num_classes, tuple(guidance_scales)
        self.condition_time = TimeEmbedding(hidden_size)
        self.encoder_s, self.encoder_u = TimeEmbedding(hidden_size), TimeEmbedding(hidden_size)
        self.decoder_s, self.decoder_u = TimeEmbedding(hidden_size), TimeEmbedding(hidden_size)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.guidance_embedding = nn.Embedding(len(self.guidance_scales) + 1, hidden_size)

    def reset_embeddings(self) -> None:
        """Make the network ignore t, guidance, and the two added inner times exactly, until trained."""
        for embedding in (self.condition_time, self.encoder_u, self.decoder_s):
            embedding.zero_output()
        nn.init.zeros_(self.guidance_embedding.weight)

    def embeddings(self, start: Dual, end: Dual, t: Tensor, conditions: Conditions) -> tuple[Dual, Dual, Dual]:
        """What encoder and decoder see, `(B, D)` each, and the t-embedding, of inner times s and u `(B,)`."""
        label, guidance = label_and_guidance(conditions)
        t_embedding = self.condition_time(Dual(t))
        shared = add(t_embedding, Dual(self.label_embedding(label)))
        scale_embedding = Dual(self.guidance_embedding(nearest_scale(guidance, self.guidance_scales)))
        encoder = add(shared, self.encoder_s(start), self.encoder_u(end), scale_embedding)
        return encoder, add(shared, self.decoder_s(start), self.decoder_u(end)), t_embedding

    def through(self, block: nn.Module, x: Dual, c: Dual) -> Dual:
        """block(x, c), checkpointed where that is asked for."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpointed(block, x, c)
        return block(x, c)
