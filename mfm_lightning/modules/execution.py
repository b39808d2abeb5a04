"""How a network is executed; what it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class TrainingExecution:
    """How the network in training is executed.

    Args:
        compile: `torch.compile`, block by block (blocks are alike: one is compiled for all). CPUs need a C++ compiler.
        checkpoint_activations: keep the input of each block only, and compute the rest again in the backward pass: less
            memory for one more forward pass.
    """

    compile: bool = False
    checkpoint_activations: bool = False

    def prepare(self, network: nn.Module) -> None:
        """Make a network be executed so, in place; names of parameters stay.

        Raises:
            ValueError: if the network has no blocks to checkpoint.
        """
        if self.checkpoint_activations:
            if not hasattr(network, "checkpoint_activations"):
                raise ValueError(
                    f"execution.checkpoint_activations: {type(network).__name__} has no blocks to checkpoint, "
                    "use a DiT or a UNet"
                )
            setattr(network, "checkpoint_activations", True)  # noqa: B010  (an attribute that not all networks have)
        if self.compile:
            for region in getattr(network, "regions", [network]):
                region.compile()
