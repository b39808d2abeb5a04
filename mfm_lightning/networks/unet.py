"""A UNet for the average velocity of images in pixels (ADM's: Dhariwal and Nichol, arXiv 2105.05233), top to bottom.

The paper's MNIST experiment (F.2) has a UNet of 9 M parameters; `UNet.base` has 8.4 M at 28x28. In a
config a size stands as `class_path: mfm_lightning.networks.UNet.base`; its `state_shape` and `num_classes` may be left
out there, and are those of the data.

    first features = conv(x) + conv'(x_t)                         conv' = 0 until trained
    down and middle see  c = s + u + class + t + guidance embeddings
    up sees              c = s + u + class + t embeddings (its own s and u embeddings)

As in the DiT the s-embedding of the way down and the u-embedding of the way up are a flow's own; the other two, and the
t-embedding, start at zero. A side is halved and rounded up, and goes back to what it was: 28, 14, 7, 4, 7, 14, 28.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.base import duals, given_sizes, result
from mfm_lightning.networks.dit import Attention
from mfm_lightning.networks.dual import Dual, add, concatenate, linear, silu
from mfm_lightning.networks.dual_conv import conv2d, group_norm, modulate_channels, upsample
from mfm_lightning.networks.two_times import TwoTimeNetwork
from mfm_lightning.networks.unet_sizes import SIZES, architecture, check_sizes, level_sizes

_Layer = TypeVar("_Layer", bound=nn.Module)


class Block(nn.Module):
    """A residual block, and self-attention over its pixels where `num_heads` is not 0; condition `(B, D)`.

    y = skip(x) + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)), then y + attention(norm(y)): both are
    `skip(x)` until trained.
    """

    def __init__(self, in_channels: int, channels: int, embedding_size: int, norm_groups: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_size, 2 * channels)
        self.norm2 = nn.GroupNorm(norm_groups, channels)
        self.conv2 = _zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1)
        self.attention_norm = nn.GroupNorm(norm_groups, channels) if num_heads else None
        self.attention = Attention(channels, num_heads, qk_norm=False) if num_heads else None
        if self.attention is not None:
            _zero(self.attention.proj)

    def forward(self, x: Dual, c: Dual) -> Dual:
        shift, scale = linear(self.modulation, silu(c)).split(lambda y: y.chunk(2, dim=1))
        y = conv2d(self.conv1, silu(group_norm(self.norm1, x)))
        y = conv2d(self.conv2, silu(modulate_channels(group_norm(self.norm2, y), shift, scale)))
        y = add(x if self.skip is None else conv2d(self.skip, x), y)
        if self.attention is None or self.attention_norm is None:
            return y
        shape = y.value.shape
        tokens = group_norm(self.attention_norm, y).map(lambda z: z.flatten(2).transpose(1, 2))
        return add(y, self.attention(tokens).map(lambda z: z.transpose(1, 2).reshape(shape)))


class Level(nn.Module):
    """The blocks of one resolution, and the convolution that leads to the next."""

    def __init__(self, size: int, blocks: Sequence[Block], resample: nn.Conv2d | None) -> None:
        super().__init__()
        self.size, self.blocks, self.resample = size, nn.ModuleList(blocks), resample


def _of_size(name: str) -> Any:
    """`UNet.small` and so on: a constructor whose signature a config can name."""

    def make(
        cls: type[UNet],
        state_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        guidance_scales: Sequence[float] = (),
    ) -> UNet:
        """A UNet of this size by name.

        In a config `state_shape` and `num_classes` may be left out: they are those of the data.

        Args:
            state_shape: channels, height and width of the state; the last two are equal.
            num_classes: number of labels; label `num_classes` is the null label.
            guidance_scales: the class-guidance scales that the network knows besides 1 (none).
        """
        return cls(**architecture(name, state_shape), num_classes=num_classes, guidance_scales=guidance_scales)

    make.__name__, make.__qualname__ = name, f"UNet.{name}"
    return classmethod(make)


class UNet(TwoTimeNetwork):
    """Average velocity v_{s,u}(x; t, x_t) of images in pixels. By name, at 28x28: `UNet.small` has 2 M parameters,
    `UNet.base` 8 M, near the paper's 9 M (F.2), and `UNet.large` 47 M.

    In a config `input_size`, `in_channels` and `num_classes` may be left out: they are those of the data.

    Args:
        input_size: height and width of the state; any, also odd.
        in_channels: channels of the state.
        channels: channels of the first level; a multiple of `norm_groups`.
        channel_multipliers: the channels of each level, in those of the first; each level has half the size of the one
            before, rounded up.
        num_blocks: residual blocks of a level on the way down; one more on the way up.
        attention_resolutions: sizes of the levels whose blocks have self-attention; those of 16 and less where None.
            The middle always has.
        num_heads: attention heads; divides the channels of those levels.
        num_classes: number of labels; label `num_classes` is the null label.
        norm_groups: groups of a group norm.
        guidance_scales: the class-guidance scales that the network knows besides 1 (none).

    Raises:
        ValueError: where these numbers do not fit each other.
    """

    small, base, large = map(_of_size, SIZES)

    def __init__(
        self,
        input_size: int | None = None,
        in_channels: int | None = None,
        channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2, 3),
        num_blocks: int = 1,
        attention_resolutions: Sequence[int] | None = None,
        num_heads: int = 4,
        num_classes: int | None = None,
        norm_groups: int = 16,
        guidance_scales: Sequence[float] = (),
    ) -> None:
        super().__init__()
        input_size, in_channels, num_classes = given_sizes(
            "a UNet", input_size=input_size, in_channels=in_channels, num_classes=num_classes
        )
        sizes = level_sizes(input_size, len(channel_multipliers))
        if attention_resolutions is None:
            attention_resolutions = [size for size in sizes if size <= 16]
        self.config = {k: v for k, v in locals().items() if k not in ("self", "sizes", "__class__")}
        for name in ("channel_multipliers", "attention_resolutions", "guidance_scales"):
            self.config[name] = list(self.config[name])
        check_sizes(**self.config)
        self.state_shape = (in_channels, input_size, input_size)

        hidden_size = 4 * channels
        self.condition_input = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.embed_conditions(hidden_size, num_classes, guidance_scales)

        def block(inputs: int, outputs: int, attends: bool) -> Block:
            return Block(inputs, outputs, hidden_size, norm_groups, num_heads if attends else 0)

        self.input = nn.Conv2d(in_channels, channels, 3, padding=1)
        widths = [channels * m for m in channel_multipliers]
        skips, width, last = [channels], channels, len(sizes) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (size, outputs) in enumerate(zip(sizes, widths, strict=True)):
            inputs = [width] + [outputs] * (num_blocks - 1)
            blocks = [block(n, outputs, size in attention_resolutions) for n in inputs]
            self.down.append(Level(size, blocks, None if i == last else nn.Conv2d(outputs, outputs, 3, 2, padding=1)))
            skips += [outputs] * (num_blocks if i == last else num_blocks + 1)
            width = outputs
        self.middle = nn.ModuleList([block(width, width, True), block(width, width, False)])
        for i, (size, outputs) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            inputs = [n + skips.pop() for n in [width] + [outputs] * num_blocks]
            blocks = [block(n, outputs, size in attention_resolutions) for n in inputs]
            self.up.append(Level(size, blocks, None if i == 0 else nn.Conv2d(outputs, outputs, 3, padding=1)))
            width = outputs
        self.norm = nn.GroupNorm(norm_groups, width)
        self.output = _zero(nn.Conv2d(width, in_channels, 3, padding=1))
        self.reset_condition()

    @property
    def regions(self) -> list[nn.Module]:
        """As in `DiT`; blocks differ in their channels and sizes."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def reset_condition(self) -> None:
        """Make the network ignore (t, x_t), guidance, and the two added inner times exactly, until trained."""
        nn.init.zeros_(self.condition_input.weight)
        self.reset_embeddings()

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
        """v_{s,u}(x; t, x_t): times `(B,)`, states `(B, C, H, W)`, conditions with label and guidance of B rows.

        With `tangents` (ds, du, dx) also its derivative along them, without a graph.
        """
        start, end, state = duals(s, u, x, tangents)
        encoder, decoder, _ = self.embeddings(start, end, t, conditions)

        h = add(conv2d(self.input, state), conv2d(self.condition_input, Dual(x_t)))
        skips = [h]
        for level in cast("list[Level]", self.down):
            for block in level.blocks:
                h = self.through(block, h, encoder)
                skips.append(h)
            if level.resample is not None:
                h = conv2d(level.resample, h)
                skips.append(h)
        for block in self.middle:
            h = self.through(block, h, encoder)
        for level in cast("list[Level]", self.up):
            for block in level.blocks:
                h = self.through(block, concatenate(h, skips.pop(), dim=1), decoder)
            if level.resample is not None:
                h = conv2d(level.resample, upsample(h, skips[-1].value.shape[-1]))
        return result(conv2d(self.output, silu(group_norm(self.norm, h))), tangents)


def _zero(layer: _Layer) -> _Layer:
    """The layer, giving zero until trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
