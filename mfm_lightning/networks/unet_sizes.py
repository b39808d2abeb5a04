"""Sizes of a UNet: by name for a state's shape, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mfm_lightning.networks.base import check_guidance_scales, image_sizes

SIZES: dict[str, dict[str, int]] = {
    "small": {"channels": 32, "num_blocks": 1},
    "base": {"channels": 64, "num_blocks": 1},
    "large": {"channels": 128, "num_blocks": 2},
}
MULTIPLIERS = (1, 2, 3, 4)  # of the levels: as many as halve the side to 7 or less, 4 at most


def architecture(name: str, state_shape: Sequence[int] | None) -> dict[str, Any]:
    """Keyword arguments of `UNet` for a size by name and a state `(C, H, W)`.

    Raises:
        ValueError: if there is no such size, or the state is not a square image.
    """
    if name not in SIZES:
        raise ValueError(f"unknown UNet size {name!r}: expected one of {', '.join(SIZES)}")
    channels, size = image_sizes("a UNet", state_shape)
    sizes = level_sizes(size, len(MULTIPLIERS))
    levels = 1 + sum(side > 7 for side in sizes[:-1])
    return {
        "input_size": size,
        "in_channels": channels,
        **SIZES[name],
        "channel_multipliers": list(MULTIPLIERS[:levels]),
        "norm_groups": SIZES[name]["channels"] // 4,
    }


def level_sizes(input_size: int, levels: int) -> list[int]:
    """Height and width of each level: half of the one before, rounded up."""
    sizes = [input_size]
    for _ in range(levels - 1):
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def check_sizes(
    input_size: int,
    in_channels: int,
    channels: int,
    channel_multipliers: Sequence[int],
    num_blocks: int,
    attention_resolutions: Sequence[int],
    num_heads: int,
    num_classes: int,
    norm_groups: int,
    guidance_scales: Sequence[float],
) -> None:
    """Refuse a UNet's arguments that do not fit each other, before anything is built.

    Raises:
        ValueError: with the argument and what it may be.
    """
    counts = {"input_size": input_size, "in_channels": in_channels, "channels": channels, "num_blocks": num_blocks}
    counts |= {"num_heads": num_heads, "norm_groups": norm_groups}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} {count} must be at least 1")
    if num_classes < 0:
        raise ValueError(f"num_classes {num_classes} must be at least 0")
    if not channel_multipliers or any(m < 1 for m in channel_multipliers):
        raise ValueError(f"channel_multipliers {list(channel_multipliers)} must be one number or more, each 1 or more")
    sizes = level_sizes(input_size, len(channel_multipliers))
    if 1 in sizes[:-1]:
        raise ValueError(
            f"channel_multipliers {list(channel_multipliers)}: input_size {input_size} is a single pixel after "
            f"{sizes.index(1) + 1} levels, give no more"
        )
    if unknown := [size for size in attention_resolutions if size not in sizes]:
        raise ValueError(f"attention_resolutions {unknown} are no sizes of a level: expected some of {sizes}")
    if channels % norm_groups:
        raise ValueError(f"channels {channels} must be a multiple of norm_groups {norm_groups}")
    for i, (size, multiplier) in enumerate(zip(sizes, channel_multipliers, strict=True)):
        attends = size in attention_resolutions or i == len(sizes) - 1  # the middle
        if attends and channels * multiplier % num_heads:
            raise ValueError(
                f"the {channels * multiplier} channels of the level of size {size} must be a multiple of num_heads "
                f"{num_heads}, for they have attention"
            )
    check_guidance_scales(guidance_scales)
