"""The Meta Flow Map diffusion transformer (paper, Eqs. 71-72), top to bottom.

A DiT with two inner times and a second image input:

    tokens = patch(x) + positions + (1 + scale(t)) * patch'(x_t) + shift(t)     scale = -1, shift = 0 until trained
    encoder blocks see  c = s + u + class + t + guidance embeddings
    decoder blocks see  c = s + u + class + t embeddings (their own s and u embeddings)

Following Decoupled MeanFlow (arXiv 2510.24474) the encoder's s-embedding and the decoder's u-embedding are the ones
that a pretrained flow fills; the other two, and the t-embedding, start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.networks.attention_tangents import AttentionTangent
from mfm_lightning.networks.base import check_guidance_scales, differing, duals, given_sizes, image_sizes, result
from mfm_lightning.networks.dual import (
    Dual,
    add,
    add_gated,
    attention,
    gelu,
    layer_norm,
    linear,
    modulate,
    rms_norm,
    silu,
)
from mfm_lightning.networks.embeddings import patches, sincos_positions
from mfm_lightning.networks.two_times import TwoTimeNetwork

SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6, "encoder_depth": 8},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12, "encoder_depth": 8},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16, "encoder_depth": 18},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16, "encoder_depth": 20},
}


def architecture(name: str) -> dict[str, int]:
    """Keyword arguments of `DiT` for a size by name, e.g. "B/2": widths of the paper (Table 5), then the patch size.

    Raises:
        ValueError: if the name is not `S|B|L|XL`, a slash, and a patch size.
    """
    size, _, patch = name.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"unknown model size {name!r}: expected one of {', '.join(SIZES)} and a patch size, e.g. 'B/2'"
        )
    return {**SIZES[size], "patch_size": int(patch)}


class PatchEmbedding(nn.Module):
    """`(B, C, H, W) -> (B, T, D)`: one token a patch, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Dual) -> Dual:
        # A strided convolution as the matrix product that it is: several times faster on CPU for small patches.
        p, weight = self.proj.kernel_size[0], self.proj.weight.flatten(1)
        value = F.linear(patches(x.value, p), weight, self.proj.bias)
        if x.tangent is None:
            return Dual(value)
        with torch.no_grad():
            return Dual(value, F.linear(patches(x.tangent, p), weight))


QKNorm = bool | Literal["rms", "layer"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) times a learned scale, over the last dimension; the scale's name is the release's."""

    eps = 1e-6

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Dual) -> Dual:
        return rms_norm(self.scale, self.eps, x)


class LayerNorm(nn.LayerNorm):
    """torch's, of a value with its tangent."""

    def forward(self, x: Dual) -> Dual:  # type: ignore[override]
        return layer_norm(self, x)


def _qk_norm(kind: QKNorm, head_size: int) -> RMSNorm | LayerNorm | None:
    if kind not in (False, True, "rms", "layer"):
        raise ValueError(f"qk_norm {kind!r}: expected true or 'rms' (the release's), 'layer', or false")
    if kind is False:
        return None
    return LayerNorm(head_size) if kind == "layer" else RMSNorm(head_size)


class Attention(nn.Module):
    """Multi-head self-attention, `(B, T, D) -> (B, T, D)`; `qk_norm`: see `DiT`.

    Attributes:
        attention_tangent: how the tangent is computed, see `mfm_lightning.networks.attention_tangents`.
    """

    attention_tangent: AttentionTangent = "auto"

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: QKNorm) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = _qk_norm(qk_norm, head_size), _qk_norm(qk_norm, head_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Dual) -> Dual:
        B, T, D = x.value.shape
        heads = linear(self.qkv, x).map(lambda y: y.reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4))
        q, k, v = heads.split(lambda y: y.unbind(0))
        if self.q_norm is not None and self.k_norm is not None:  # a norm may compute in another type
            q, k = (norm(y).map(lambda y: y.to(v.value.dtype)) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        y = attention(q, k, v, self.attention_tangent)
        return linear(self.proj, y.map(lambda y: y.transpose(1, 2).reshape(B, T, D)))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * ratio))
        self.fc2 = nn.Linear(int(hidden_size * ratio), hidden_size)

    def forward(self, x: Dual) -> Dual:
        return linear(self.fc2, gelu(linear(self.fc1, x)))


class AdaLN(nn.Module):
    """`num` vectors for each sample from its condition, `(B, D) -> num x (B, D)`."""

    def __init__(self, hidden_size: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.add_module("1", nn.Linear(hidden_size, num * hidden_size))  # its name in released weights, after a SiLU

    @property
    def projection(self) -> nn.Linear:
        """From the condition to all vectors."""
        return cast(nn.Linear, self.get_submodule("1"))

    def forward(self, c: Dual) -> list[Dual]:
        return linear(self.projection, silu(c)).split(lambda y: y.chunk(self.num, dim=1))

    def zero_output(self) -> None:
        """Make all vectors zero until trained."""
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)


class Block(nn.Module):
    """A transformer block with AdaLN-Zero: tokens `(B, T, D)`, condition `(B, D)`."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: QKNorm) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = AdaLN(hidden_size, 6)

    def forward(self, x: Dual, c: Dual) -> Dual:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)
        x = add_gated(x, gate1, self.attn(modulate(layer_norm(self.norm1, x), shift1, scale1)))
        return add_gated(x, gate2, self.mlp(modulate(layer_norm(self.norm2, x), shift2, scale2)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = AdaLN(hidden_size, 2)

    def forward(self, x: Dual, c: Dual) -> Dual:
        shift, scale = self.adaLN_modulation(c)
        return linear(self.linear, modulate(layer_norm(self.norm, x), shift, scale))


def _of_size(name: str) -> Any:
    """`DiT.S` and so on: a constructor whose signature a config can name."""

    def make(
        cls: type[DiT],
        state_shape: Sequence[int] | None = None,
        patch_size: int = 2,
        num_classes: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm: QKNorm = False,
        guidance_scales: Sequence[float] = (2.5,),
        flip_time: bool = False,
    ) -> DiT:
        """A DiT of this size by name (Table 5).

        In a config `state_shape` and `num_classes` may be left out: they are those of the data.

        Args:
            state_shape: channels, height and width of the state; the last two are equal.
            patch_size: side of a patch; divides height and width.
            num_classes: number of labels; label `num_classes` is the null label.
            mlp_ratio: width of a block's MLP, in widths of the transformer.
            qk_norm: normalise queries and keys, as of `DiT`.
            guidance_scales: the class-guidance scales that the network knows besides 1 (none).
            flip_time: the weights were trained with t=1 for noise, as of `DiT`.
        """
        in_channels, input_size = image_sizes("a DiT", state_shape)
        return cls(
            input_size, patch_size, in_channels, **SIZES[name], num_classes=num_classes, mlp_ratio=mlp_ratio,
            qk_norm=qk_norm, guidance_scales=guidance_scales, flip_time=flip_time,
        )  # fmt: skip

    make.__name__, make.__qualname__ = name, f"DiT.{name}"
    return classmethod(make)


class DiT(TwoTimeNetwork):
    """Average velocity v_{s,u}(x; t, x_t) of images or latents. In a config a size of the paper (Table 5) stands as
    `class_path: mfm_lightning.networks.DiT.B`, `init_args: {patch_size: 2}`.

    In a config `input_size`, `in_channels` and `num_classes` may be left out: they are those of the data.

    Args:
        input_size: height and width of the state.
        patch_size: side of a patch; divides `input_size`.
        in_channels: channels of the state.
        hidden_size: width of the transformer; a multiple of `num_heads` and of 4.
        depth: number of blocks.
        num_heads: attention heads of a block.
        encoder_depth: number of blocks that see the encoder's condition; the rest see the decoder's.
        num_classes: number of labels; label `num_classes` is the null label.
        mlp_ratio: width of a block's MLP, in widths of the transformer.
        qk_norm: normalise each head's queries and keys: "rms" (or true), by their root mean square, as the release
            does; "layer", by a LayerNorm, as timm's attention and REPA's SiT do.
        guidance_scales: the class-guidance scales that the network knows besides 1 (none).
        flip_time: the weights were trained with t=1 for noise: embed 1-s and 1-u and negate the output (the outer
            time is not flipped). True for released MFM and DMF weights.

    Raises:
        ValueError: where these numbers do not fit each other.
    """

    pos_embed: Tensor
    S, B, L, XL = map(_of_size, SIZES)

    def __init__(
        self,
        input_size: int | None = None,
        patch_size: int = 2,
        in_channels: int | None = None,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        encoder_depth: int = 8,
        num_classes: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm: QKNorm = False,
        guidance_scales: Sequence[float] = (2.5,),
        flip_time: bool = False,
    ) -> None:
        super().__init__()
        input_size, in_channels, num_classes = given_sizes(
            "a DiT", input_size=input_size, in_channels=in_channels, num_classes=num_classes
        )
        _check_sizes(input_size, patch_size, hidden_size, depth, num_heads, encoder_depth, guidance_scales)
        qk_norm = "rms" if qk_norm is True else qk_norm
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config["guidance_scales"] = list(guidance_scales)
        self.state_shape = (in_channels, input_size, input_size)
        self.patch_size, self.encoder_depth, self.flip_time = patch_size, encoder_depth, flip_time

        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size))
        self.condition_patch = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.condition_gate = AdaLN(hidden_size, 2)
        self.embed_conditions(hidden_size, num_classes, guidance_scales)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self._initialise()

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that hold most of the work, all alike: what is compiled, checkpointed and sharded one by one."""
        return list(self.blocks)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.condition_time, self.encoder_s, self.encoder_u, self.decoder_s, self.decoder_u):
            nn.init.normal_(embedding.first.weight, std=0.02)
            nn.init.normal_(embedding.second.weight, std=0.02)
        nn.init.normal_(self.label_embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                module.adaLN_modulation.zero_output()
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        self.reset_condition()

    def reset_condition(self) -> None:
        """Make the network ignore (t, x_t), guidance, and the two added inner times exactly, until trained."""
        self.condition_gate.zero_output()
        gate = self.condition_gate.projection
        with torch.no_grad():  # tokens of x_t enter times 1 + scale: a scale of -1 shuts them out
            gate.bias[gate.out_features // 2 :] = -1.0
        self.reset_embeddings()

    @torch.no_grad()
    def start_from(self, other: DiT, without: tuple[str, ...] = ()) -> None:
        """Take the weights of a DiT of the same sizes with as many blocks or fewer, and compute what it computes.

        Blocks that it lacks follow the others of the encoder and of the decoder. They pass tokens on unchanged, as
        AdaLN-Zero begins, until they are trained.

        Args:
            other: the network.
            without: beginnings of the names of weights that are not taken.

        Raises:
            ValueError: for a network of another kind or other sizes, or one with more blocks.
        """
        if not isinstance(other, DiT):
            raise ValueError(f"a DiT starts from a DiT, not from a {type(other).__name__}")
        depths = ("depth", "encoder_depth")
        ours, theirs = ({k: v for k, v in net.config.items() if k not in depths} for net in (self, other))
        encoders, decoders = zip(self._parts(), other._parts(), strict=True)
        deeper = encoders[0] >= encoders[1] and decoders[0] >= decoders[1]
        if different := differing(*((ours, theirs) if deeper else (self.config, other.config))):
            raise ValueError(f"another architecture than the network's: {', '.join(different)}")
        added = encoders[0] - encoders[1]
        weights = {}
        for name, tensor in other.state_dict().items():
            part, _, rest = name.partition(".")
            if part == "blocks":
                i, _, rest = rest.partition(".")
                name = f"blocks.{int(i) + (added if int(i) >= encoders[1] else 0)}.{rest}"
            if not name.startswith(without):
                weights[name] = tensor
        for block in self.blocks:
            cast(Block, block).adaLN_modulation.zero_output()
        self.load_state_dict(self.state_dict() | weights)

    def _parts(self) -> tuple[int, int]:
        """How many blocks see the encoder's condition, and how many the decoder's."""
        return self.encoder_depth, len(self.blocks) - self.encoder_depth

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
        velocity = self.by_token(*duals(s, u, x, tangents), t, x_t, conditions).map(self._unpatchify)
        if self.flip_time:
            velocity = velocity.map(torch.neg)
        return result(velocity, tangents)

    def by_token(self, start: Dual, end: Dual, state: Dual, t: Tensor, x_t: Tensor, conditions: Conditions) -> Dual:
        """What the final layer makes of each patch, `(B, tokens, F)`; the arguments are those of `forward`."""
        if self.flip_time:
            start, end = (
                Dual(1 - time.value, None if time.tangent is None else -time.tangent) for time in (start, end)
            )
        encoder, decoder, t_embedding = self.embeddings(start, end, t, conditions)

        condition = modulate(self.condition_patch(Dual(x_t)), *self.condition_gate(t_embedding))
        tokens = add(self.x_embedder(state), Dual(self.pos_embed), condition)
        for i, block in enumerate(self.blocks):
            tokens = self.through(block, tokens, encoder if i < self.encoder_depth else decoder)
        return self.final_layer(tokens, decoder)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        C, H, W = self.state_shape
        p = self.patch_size
        patches = tokens.reshape(-1, H // p, W // p, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, C, H, W)


def _check_sizes(
    input_size: int,
    patch_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    encoder_depth: int,
    guidance_scales: Sequence[float],
) -> None:
    if input_size % patch_size:
        raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4")
    if not 0 <= encoder_depth <= depth:
        raise ValueError(f"encoder_depth {encoder_depth} must lie between 0 and depth {depth}")
    check_guidance_scales(guidance_scales)
