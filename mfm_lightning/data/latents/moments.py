"""Images to the moments of a VAE's posterior."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.networks.vae import VAE, LatentSpace, load_vae, moments
from mfm_rewards.execution import Precision, autocast, check_precision


class MomentEncoder:
    """A frozen VAE of diffusers: pixels to mean and standard deviation, of the image and its mirror image.

    Args:
        path: a folder that `AutoencoderKL.from_pretrained` reads, or a Hugging Face id; or an AutoencoderKL or
            AutoencoderDC.
        device: that it runs on.
        precision: "fp32", "bf16" or "fp16".
        allow_download: fetch the weights where they are not there.

    Raises:
        FileNotFoundError: if the weights are not there.
        ImportError: without the extra `imagenet`.
        ValueError: for a VAE of another class, or whose latents are scaled by channel; for an unknown precision.
    """

    def __init__(
        self,
        path: str | VAE = "stabilityai/sd-vae-ft-mse",
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        allow_download: bool = False,
    ) -> None:
        check_precision(precision)
        self.device = torch.device(device)
        self.precision: Precision = precision
        self.vae = (load_vae(path, allow_download) if isinstance(path, str) else path).to(self.device)
        self.space = LatentSpace.of(self.vae)

    def state_shape(self, image_size: int) -> tuple[int, int, int]:
        """`(C, H, W)` of the latents of square images.

        Raises:
            ValueError: if the size is no multiple of the VAE's factor.
        """
        factor = self.space.factor
        if image_size < 1 or image_size % factor:
            raise ValueError(f"image size {image_size} must be a multiple of {factor}, the VAE's factor")
        return self.space.channels, image_size // factor, image_size // factor

    @cached_property
    def identity(self) -> str:
        """A hash of the weights, equal on every machine."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """`(B, S, S, 3)` uint8 to `(B, 2, 2, C, H, W)` float16: [image, mirror image] x [mean, std].

        Raises:
            FloatingPointError: if a moment is not finite in float16.
        """
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = torch.stack([self._encode(x), self._encode(x.flip(-1))], dim=1).half()
        if not torch.isfinite(found).all():
            raise FloatingPointError(f"the VAE's moments are not finite in float16 (precision {self.precision})")
        return found.cpu().numpy()

    def _encode(self, x: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            mean, std = moments(self.vae, x)
        return torch.stack([mean.float(), std.float()], dim=1)
