"""How a network is executed; what it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mfm_lightning.networks.attention_tangents import AttentionTangent, check_attention_tangent


@dataclass
class TrainingExecution:
    """How the network in training is executed.

    Args:
        compile: `torch.compile`, block by block (one for all that are alike: a DiT's all are, a UNet's few, and
            its first step takes minutes on CPUs). CPUs need a C++ compiler.
        checkpoint_activations: keep the input of each block only, and compute the rest again in the backward pass: less
            memory for one more forward pass.
        attention_tangent: how the derivative of attention is computed where it is explicit: "chunked" (plain products,
            some heads at a time), "fused" (by the backward pass of torch's fused attention), "triton" (by the kernel of
            jvp-flash-attention, the extra `triton`; GPUs). "auto" is "chunked". They differ by rounding alone.

    Raises:
        ValueError: for an unknown `attention_tangent`.
        ModuleNotFoundError: for "triton" without its package.
    """

    compile: bool = False
    checkpoint_activations: bool = False
    attention_tangent: AttentionTangent = "auto"

    def __post_init__(self) -> None:
        check_attention_tangent(self.attention_tangent)

    def prepare(self, network: nn.Module) -> None:
        """Make a network be executed so, in place; names of parameters stay.

        Raises:
            ValueError: if the network has no blocks to checkpoint, or no attention whose tangent is explicit.
        """
        if self.attention_tangent != "auto":
            layers = [module for module in network.modules() if hasattr(module, "attention_tangent")]
            if not layers:
                raise ValueError(
                    f"execution.attention_tangent {self.attention_tangent}: {type(network).__name__} has no attention "
                    "with explicit tangents; leave it at auto"
                )
            for layer in layers:
                setattr(layer, "attention_tangent", self.attention_tangent)  # noqa: B010  (not all modules have it)
        if self.checkpoint_activations:
            if not hasattr(network, "checkpoint_activations"):
                raise ValueError(
                    f"execution.checkpoint_activations: {type(network).__name__} has no blocks to checkpoint, "
                    "use a DiT or a UNet"
                )
            setattr(network, "checkpoint_activations", True)  # noqa: B010  (an attribute that not all networks have)
        if self.compile:
            regions: list[nn.Module] = getattr(network, "regions", [network])
            kinds = {tuple(p.shape for p in region.parameters()) for region in regions}
            config = torch._dynamo.config  # it gives up after 8 versions of a function, here of all kinds of blocks
            config.recompile_limit = max(config.recompile_limit, 8 * len(kinds))
            for region in regions:
                region.compile()
