"""A small VAE of diffusers' kind to train on images of one's own, for flows in its latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = "vae"


class Autoencoder(nn.Module):
    """diffusers' `AutoencoderKL` by its sizes: images `(B, channels, H, W)` in [-1, 1] to latents
    `(B, latent_channels, h, w)`, h = H / 2^(len(widths) - 1), and back.

    Args:
        channels: of the images; the pipelines of diffusers take 3.
        latent_channels: of the latents.
        widths: channels of each resolution, the first one the images'.
        layers: residual blocks of each resolution.
        groups: of the group norms; must divide the widths.

    Raises:
        ImportError: without diffusers.
        ValueError: for sizes that do not fit.
    """

    scale: Tensor

    def __init__(
        self,
        channels: int = 3,
        latent_channels: int = 4,
        widths: Sequence[int] = (32, 64, 64),
        layers: int = 1,
        groups: int = 8,
    ) -> None:
        super().__init__()
        try:
            from diffusers.models.autoencoders import autoencoder_kl
        except ImportError as error:
            raise ImportError("a VAE needs diffusers: pip install 'mfm-lightning[text-to-image]'") from error
        if not widths or any(width % groups for width in widths):
            raise ValueError(f"widths {list(widths)}: expected multiples of groups ({groups}), at least one")
        self.config = {
            "channels": channels, "latent_channels": latent_channels, "widths": list(widths), "layers": layers,
            "groups": groups,
        }  # fmt: skip
        self.channels = channels
        kind: Any = autoencoder_kl.AutoencoderKL  # whose types take one resolution alone
        self.vae: Any = kind(
            in_channels=channels, out_channels=channels, latent_channels=latent_channels,
            block_out_channels=tuple(widths), layers_per_block=layers, norm_num_groups=groups,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
        )  # fmt: skip
        self.register_buffer("scale", torch.ones(()))  # of latents to unit variance, once it is measured

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions of latents drawn for the images, and the latents' mean and log variance."""
        found = self.vae.encode(images).latent_dist
        return self.vae.decode(found.sample()).sample, found.mean, found.logvar

    def encode(self, images: Tensor) -> Tensor:
        """Means of the latents, without `scale`."""
        return self.vae.encode(images).latent_dist.mean

    def write_beside(self, folder: Path) -> Path:
        """Write the VAE as diffusers reads it, with its scale, to `vae` in a folder."""
        self.vae.register_to_config(scaling_factor=float(self.scale))
        self.vae.save_pretrained(folder / FOLDER)
        return folder / FOLDER
