"""From a model's states to the images that rewards see, so that rewards never know about latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Decoder(nn.Module):
    """Base class: `(B, *shape)` states to images `(B, C, H, W)` in [0, 1], differentiable, frozen."""

    def forward(self, states: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must implement forward(states) -> images")

    def missing(self) -> list[str]:
        """Files that it needs and that are not there, each with what would be right."""
        return []


class IdentityDecoder(Decoder):
    """The states as they are: for vectors, where the reward is a function of the state."""

    def forward(self, states: Tensor) -> Tensor:
        return states


class PixelDecoder(Decoder):
    """Pixels in [-1, 1] (the range of `low` and `high`) to [0, 1].

    Args:
        low, high: state values of black and white.
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
    """Latents to images by a Stable Diffusion VAE (diffusers' AutoencoderKL), loaded when it is first used.

    Args:
        path: a folder that `AutoencoderKL.from_pretrained` reads, or a Hugging Face id.
        scale: factor of the latents (0.18215 for SD's VAE).
        clamp: cut off what lies outside [0, 1]; the gradient is zero there.
        max_rows: latents decoded at once.
        allow_download: fetch the weights where they are not there.

    Raises:
        FileNotFoundError: when used, if the weights are not there.
        ImportError: when used, without the extra `imagenet`.
    """

    def __init__(
        self,
        path: str = "stabilityai/sd-vae-ft-mse",
        scale: float = 0.18215,
        clamp: bool = True,
        max_rows: int = 32,
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.path, self.scale, self.clamp, self.max_rows = path, scale, clamp, max_rows
        self.allow_download = allow_download
        self._vae: list[nn.Module] = []  # in a list, so that it is no part of a checkpoint

    def extra_repr(self) -> str:
        return f"path={self.path}, scale={self.scale}, clamp={self.clamp}"

    def missing(self) -> list[str]:
        try:
            self._load()
        except (FileNotFoundError, ImportError) as error:
            return [str(error)]
        return []

    def _load(self) -> nn.Module:
        if not self._vae:
            try:
                from diffusers import AutoencoderKL
            except ImportError as error:
                raise ImportError("VAEDecoder needs diffusers: pip install 'mfm-lightning[imagenet]'") from error
            try:
                vae = AutoencoderKL.from_pretrained(self.path, local_files_only=not self.allow_download)
            except OSError as error:
                raise FileNotFoundError(
                    f"decoder.path: no VAE at {self.path}: give a folder with config.json and "
                    "diffusion_pytorch_model.safetensors, or a Hugging Face id with allow_download: true"
                ) from error
            self._vae.append(vae.eval().requires_grad_(False))
        return self._vae[0]

    def forward(self, states: Tensor) -> Tensor:
        vae = self._load().to(states.device)
        decoded = [vae.decode(part / self.scale).sample for part in states.split(self.max_rows)]
        images = (torch.cat(decoded) + 1) / 2
        return images.clamp(0, 1) if self.clamp else images
