"""Test states of captioned data, in a random order, for what is measured at noised states of a text-to-image flow."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from mfm_lightning.backbones import TextToImageFlow
from mfm_lightning.backbones.network import check_same_parts
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import StepDataModule

log = logging.getLogger(__name__)


@dataclass
class CaptionedStates:
    """Clean states `(B, C, h, w)`, on the CPU, with a caption each."""

    x1: Tensor
    captions: list[str]


def captioned_states(data: StepDataModule, flow: TextToImageFlow, num: int, seed: int) -> CaptionedStates:
    """The first `num` test states of data in the order that a seed gives; of more, these are the first ones too.

    Args:
        flow: whose latents they must be.

    Raises:
        ValueError: for data without captions, of another shape, of another VAE or other text encoders than the flow's
            where the data say so, or with fewer test states.
        FileNotFoundError: for data that are not there.
    """
    what = type(data).__name__
    if tuple(data.state_shape) != tuple(flow.state_shape):
        raise ValueError(
            f"{what} has states of shape {tuple(data.state_shape)}, and the flow has {tuple(flow.state_shape)}: give "
            "latents of the flow's VAE at its image size"
        )
    if (embedded := getattr(data, "embedded", None)) is not None:
        check_same_parts(embedded, flow)
    log.info("%s: reading its test states", what)
    data.setup("test")
    # the states with the smallest of random keys: any order, from one pass over batches that are only read in turn
    generator, kept, total = torch.Generator().manual_seed(seed), [], 0
    for x1, given in data.test_dataloader():
        captions = Conditions.of_batch(given, len(x1)).prompts
        if captions is None:
            raise ValueError(
                f"{what} without captions: give CaptionedImages as the source of EncodedImages, or shards of "
                "mfm prepare-latents --flow --captions"
            )
        keys = torch.rand(len(x1), generator=generator, dtype=torch.float64).tolist()
        kept = sorted([*kept, *zip(keys, x1, captions, strict=True)], key=lambda one: one[0])[:num]
        total += len(x1)
    if total < num:
        raise ValueError(f"{what} with {total} test states, and {num} are wanted: lower num_states, or hold out more")
    return CaptionedStates(torch.stack([x1 for _, x1, _ in kept]), [caption for _, _, caption in kept])
