"""A small distilled decoder of latents, through which gradients cost little."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.networks.decoders import Decoder, decoded_in_parts
from mfm_lightning.networks.vae import CONFIG, check_weights
from mfm_lightning.utils.devices import out_of_memory
from mfm_rewards.execution import Precision, autocast, check_precision
from mfm_rewards.weights import CheckpointError


class TinyDecoder(Decoder):
    """Latents to images by diffusers' AutoencoderTiny, such as TAESD (madebyollin/taesd for SD's latents, taesdxl for
    SDXL's, taesd3 for SD3's, taef1 for FLUX.1's). It takes states as flows have them, x = (z - shift) scale of the
    latents z of the large VAE by that VAE's own numbers. Its images are blurred beside the VAE's: it is for gradients
    of rewards (`VAEDecoder.gradients`, `load_flow(gradient_vae=...)`), which take most memory and time there.

    Args:
        path: a folder that `AutoencoderTiny.from_pretrained` reads, or a Hugging Face id.
        clamp: cut off what lies outside [0, 1]; the gradient is zero there.
        max_rows: latents decoded at once; for a gradient each of several parts is decoded again in the backward pass.
        precision: of the network, "fp32", "bf16" or "fp16", whatever the precision around it.
        allow_download: fetch the weights where they are not there.

    Raises:
        ValueError: for a number or a precision out of range; when used, for states of other channels.
        FileNotFoundError: when used, if the weights are not there.
        ImportError: when used, without diffusers.
        CheckpointError: when used, if the folder holds something else, or not all of it.
    """

    def __init__(
        self,
        path: str,
        clamp: bool = True,
        max_rows: int = 32,
        precision: Precision = "fp32",
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} must be at least 1")
        self.path, self.clamp, self.max_rows, self.allow_download = path, clamp, max_rows, allow_download
        self.precision: Precision = check_precision(precision)
        self._network: list[Any] = []  # in a list, so that it is no part of a checkpoint

    @classmethod
    def of_network(cls, network: Any, **options: Any) -> TinyDecoder:
        """Of an AutoencoderTiny in memory."""
        made = cls(str(network.config.get("_name_or_path", "")), **options)
        made._network.append(network.eval().requires_grad_(False))
        return made

    def extra_repr(self) -> str:
        more = "" if self.precision == "fp32" else f", precision={self.precision}"
        return f"path={self.path}, clamp={self.clamp}{more}"

    def missing(self) -> list[str]:
        try:
            self.load()
        except (FileNotFoundError, ImportError) as error:
            return [str(error)]
        return []

    def load(self) -> Any:
        """The network, which is read once."""
        if not self._network:
            self._network.append(load_tiny(self.path, self.allow_download))
        return self._network[0]

    def check_channels(self, channels: int) -> None:
        """Raise ValueError unless it decodes latents of so many channels."""
        own = self.load().config["latent_channels"]
        if own != channels:
            raise ValueError(
                f"the small decoder {self.path} decodes latents of {own} channels, and these have {channels}"
            )

    def forward(self, states: Tensor) -> Tensor:
        self.check_channels(states.shape[1])
        network = self.load()
        if network.device != states.device:
            network.to(states.device)
        images = (decoded_in_parts(partial(self._decode, network), states, self.max_rows) + 1) / 2
        return images.clamp(0, 1) if self.clamp else images

    def _decode(self, network: Any, part: Tensor) -> Tensor:
        with out_of_memory("the small decoder", "max_rows"), autocast(part.device, self.precision):
            return network.decode(part.to(network.dtype)).sample.float()


def load_tiny(path: str, allow_download: bool = False) -> Any:
    """A frozen AutoencoderTiny in float32, from a folder or by a Hugging Face id.

    Raises:
        FileNotFoundError: if it is not there, and may not be fetched.
        ImportError: without diffusers.
        CheckpointError: if the folder holds something else, or not all of it; if a number is not finite.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    except ImportError as error:
        raise ImportError("a small decoder needs diffusers: pip install 'mfm-lightning[imagenet]'") from error
    try:
        loaded: Any = AutoencoderTiny.from_pretrained(
            path, local_files_only=not allow_download, output_loading_info=True, torch_dtype=torch.float32
        )
        network, found = loaded
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if (Path(path) / CONFIG).is_file():
            raise CheckpointError(f"the small decoder in {path} cannot be read: {reason[:300]}") from error
        raise FileNotFoundError(
            f"no small decoder at {path}: give a folder with {CONFIG} and its weights, or a Hugging Face id (such as "
            "madebyollin/taesd3) and allow the download (allow_download: true)"
        ) from error
    check_weights(network, found, f"small decoder {path}", "AutoencoderTiny's")
    return network.eval().requires_grad_(False)
