"""From a model's states to the images that rewards see, so that rewards never know about latents."""

from __future__ import annotations

import json
import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from mfm_lightning.networks.vae import VAE, load_vae, scale_and_shift
from mfm_rewards.execution import Precision, autocast, check_precision

log = logging.getLogger(__name__)
Numbers = float | Sequence[float]
ALIKE = 0.8  # correlation of images below which a small decoder is not taken for one of the same latents
LATENTS = "latents"  # in a file's metadata: scale and shift of the latents that its model was trained on, as JSON


class Decoder(nn.Module, ABC):
    """Base class: `(B, *shape)` states to images `(B, C, H, W)` in [0, 1], differentiable, frozen."""

    @abstractmethod
    def forward(self, states: Tensor) -> Tensor:
        """Images of states."""

    def missing(self) -> list[str]:
        """Files that it needs and that are not there, each with what would be right."""
        return []

    def check_latents(self, scale: Numbers, shift: Numbers, whose: str) -> None:
        """Raise ValueError, before any work, if it cannot know what states of x = (z - shift) scale are.

        Args:
            scale: a number, or one for each channel, by which stored latents z are made states.
            shift: the same, which is taken away before the scale.
            whose: latents they are, for the message.
        """


def decoded(x: Tensor, decoder: Decoder | None) -> Tensor:
    """Images `(B, C, H, W)` in [0, 1] of states, without gradients; without a decoder the states themselves."""
    if decoder is None:
        return x
    with torch.no_grad():
        return decoder(x)


def check_decoder(decoder: Decoder | None, metadata: Mapping[str, str], file: str | Path) -> None:
    """`Decoder.check_latents` of what a model's file says of the latents that it was trained on."""
    if decoder is not None and LATENTS in metadata:
        said = json.loads(metadata[LATENTS])
        decoder.check_latents(said["scale"], said["shift"], f"{file} was trained on latents that")


def by_channel(scale: Numbers, shift: Numbers) -> bool:
    """Whether (z - shift) scale is more than a product with one number."""
    shifts = [shift] if isinstance(shift, int | float) else shift
    return any(shifts) or not (isinstance(scale, int | float) or len(scale) == 1)


class IdentityDecoder(Decoder):
    """The states as they are: for vectors, where the reward is a function of the state."""

    def forward(self, states: Tensor) -> Tensor:
        return states


class PixelDecoder(Decoder):
    """Pixels in [-1, 1] (the range of `low` and `high`) to [0, 1].

    Args:
        low: state value of black.
        high: state value of white.
        clamp: cut off what lies outside [0, 1], so that no reward can be had by leaving the range of images; the
            gradient is zero there.
    """

    def __init__(self, low: float = -1.0, high: float = 1.0, clamp: bool = True) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"low {low} must be below high {high}")
        self.low, self.high, self.clamp = low, high, clamp

    def extra_repr(self) -> str:
        settings = {"low": (self.low, -1.0), "high": (self.high, 1.0), "clamp": (self.clamp, True)}
        return ", ".join(f"{name}={value}" for name, (value, usual) in settings.items() if value != usual)

    def forward(self, states: Tensor) -> Tensor:
        images = (states - self.low) / (self.high - self.low)
        return images.clamp(0, 1) if self.clamp else images


class VAEDecoder(Decoder):
    """Latents to images by a Stable Diffusion VAE (diffusers' AutoencoderKL), loaded when it is first used. States are
    x = (z - shift) scale of the latents z that the VAE gives, as in `LatentDataModule`.

    Memory is that of `max_rows` latents, also for gradients: each such part keeps its latents alone, and is decoded
    again in the backward pass. The images of the last latents are kept, so that what is first looked at and then
    scored is decoded once (without gradients).

    Args:
        path: a folder that `AutoencoderKL.from_pretrained` reads, or a Hugging Face id.
        scale: factor of the latents, or one for each channel; the VAE's own (0.18215 for SD's) where None.
        clamp: cut off what lies outside [0, 1]; the gradient is zero there.
        max_rows: latents decoded at once.
        tiled: decode large latents in overlapping tiles that are blended (diffusers' tiling; not exactly the same).
        precision: of the VAE, "fp32", "bf16" or "fp16", whatever the precision around it.
        allow_download: fetch the weights where they are not there.
        shift: what is subtracted from the latents before, or a number for each channel; the VAE's own (0 for SD's)
            where None.
        gradients: a `TinyDecoder` of the same latents, through which gradients go back; images are the VAE's.

    Raises:
        FileNotFoundError: when used, if the weights are not there.
        ImportError: when used, without the extra `imagenet`.
        ValueError: for numbers that are not finite, or a scale of 0; when used, for numbers of other channels than the
            states', or a VAE whose config has them by channel.
    """

    def __init__(
        self,
        path: str = "stabilityai/sd-vae-ft-mse",
        scale: float | list[float] | None = None,
        clamp: bool = True,
        max_rows: int = 32,
        tiled: bool = False,
        precision: Precision = "fp32",
        allow_download: bool = False,
        shift: float | list[float] | None = None,
        gradients: Decoder | None = None,
    ) -> None:
        super().__init__()
        for name, given in (("scale", scale), ("shift", shift)):
            for value in [given] if isinstance(given, int | float) else given or ():
                if not math.isfinite(value) or (name == "scale" and value == 0):
                    raise ValueError(f"decoder.{name} {given}: expected finite numbers" + ", not 0" * (name == "scale"))
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        check_precision(precision)
        self.path, self.scale, self.shift, self.clamp, self.max_rows = path, scale, shift, clamp, max_rows
        self.tiled, self.allow_download = tiled, allow_download
        self.precision: Precision = precision
        self.gradients, self._path = gradients, GradientPath()
        self._vae: list[VAE] = []  # in a list, so that it is no part of a checkpoint
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale}"
        scale += "" if self.shift is None else f", shift={self.shift}"
        more = ", tiled=True" if self.tiled else ""
        more += "" if self.precision == "fp32" else f", precision={self.precision}"
        return f"path={self.path}{scale}, clamp={self.clamp}{more}"

    def missing(self) -> list[str]:
        try:
            self._load()
        except (FileNotFoundError, ImportError) as error:
            return [str(error)]
        return [] if self.gradients is None else [f"gradients: {line}" for line in self.gradients.missing()]

    def check_latents(self, scale: Numbers, shift: Numbers, whose: str) -> None:
        if by_channel(scale, shift) and (self.scale is None or self.shift is None):
            raise ValueError(
                f"{whose} are shifted or scaled by channel: give decoder.scale and decoder.shift (--scale, --shift), "
                f"by which a VAE's latents become states ({scale} and {shift} if what is stored is what the VAE gives)"
            )

    def _load(self) -> VAE:
        if not self._vae:
            try:
                vae = load_vae(self.path, self.allow_download)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"decoder.path: {error}") from error
            if self.tiled:
                vae.enable_tiling()
            self._vae.append(vae)
        return self._vae[0]

    def forward(self, states: Tensor) -> Tensor:
        graph = torch.is_grad_enabled() and states.requires_grad
        if graph and self.gradients is not None:
            return self._path(self.gradients, self._own_states(states), self(states.detach()))
        if not graph and self._last is not None:
            last, version, images = self._last
            if last() is states and version == states._version:
                return images
        vae = self._load().to(states.device)
        images = (decoded_in_parts(partial(self._decode, vae), states, self.max_rows) + 1) / 2
        images = images.clamp(0, 1) if self.clamp else images
        self._last = None if graph or states.is_inference() else (weakref.ref(states), states._version, images)
        return images

    def _decode(self, vae: VAE, part: Tensor) -> Tensor:
        with autocast(part.device, self.precision):
            return vae.decode(self._latents(part)).sample.float()

    def _own_states(self, states: Tensor) -> Tensor:
        """As the VAE's own numbers make them of its latents, which a small decoder takes."""
        if self.scale is None and self.shift is None:
            return states
        own_scale, own_shift = scale_and_shift(self._load())
        return (self._latents(states) - own_shift) * own_scale

    def _latents(self, states: Tensor) -> Tensor:
        """What the VAE gave, in float32."""
        own_scale, own_shift = scale_and_shift(self._load())
        scale = own_scale if self.scale is None else self.scale
        shift = own_shift if self.shift is None else self.shift
        return states.float() / self._of(states, "scale", scale) + self._of(states, "shift", shift)

    def _of(self, part: Tensor, name: str, given: Numbers) -> Tensor:
        """The numbers of channels, as they are computed with."""
        numbers = torch.as_tensor(given, dtype=torch.float32, device=part.device).reshape(-1, 1, 1)
        if len(numbers) not in (1, part.shape[1]):
            raise ValueError(f"decoder.{name} has {len(numbers)} numbers, states have {part.shape[1]} channels")
        return numbers


class GradientPath:
    """Images of one decoder whose gradients go back through another, smaller one (straight-through): rewards are of the
    images that there will be, and their derivative by pixels is exact; that of pixels by states is the small one's."""

    def __init__(self) -> None:
        self._looked = False

    def __call__(self, small: Decoder, states: Tensor, images: Tensor) -> Tensor:
        """`images` `(B, C, H, W)` of `states`, without a graph, with the gradient of the small decoder's.

        Raises:
            ValueError: if the small decoder's images are of another size.
        """
        through = small(states)
        if through.shape != images.shape:
            raise ValueError(
                f"the small decoder gives images {tuple(through.shape[1:])}, and the VAE {tuple(images.shape[1:])}: it "
                "is for other latents"
            )
        if not self._looked and not isinstance(images, FakeTensor):  # which has no numbers, when memory is planned
            self._looked = True
            alike = torch.corrcoef(torch.stack([through.detach().flatten(), images.flatten().to(through)]))[0, 1]
            if alike < ALIKE:
                log.warning(
                    "the small decoder's images have a correlation of %.2f with the VAE's, so that gradients through "
                    "it may be wrong: is it for these latents? (%s)", alike, small,
                )  # fmt: skip
        return _StraightThrough.apply(through, images)


class _StraightThrough(torch.autograd.Function):
    """The value of `images`, the gradient of `through`."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, images: Tensor) -> Tensor:
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def decoded_in_parts(decode: Callable[[Tensor], Tensor], states: Tensor, max_rows: int) -> Tensor:
    """`decode(states)` in parts of at most `max_rows`; for a gradient each of several parts keeps its states alone, and
    is decoded again in the backward pass."""
    parts = states.split(max_rows)
    if len(parts) > 1 and torch.is_grad_enabled() and states.requires_grad:
        return torch.cat([checkpoint(decode, part, use_reentrant=False) for part in parts])
    return torch.cat([decode(part) for part in parts])
