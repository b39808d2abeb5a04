"""States of latent models to pictures, where the data say how latents were normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfm_lightning.networks.decoders import Decoder, VAEDecoder

Numbers = float | Sequence[float]


def check_decoder(decoder: Decoder | None, scale: Numbers, shift: Numbers) -> None:
    """Raise ValueError for a VAE that does not say what it divides latents by, where they are shifted or scaled by
    channel."""
    if isinstance(decoder, VAEDecoder) and decoder.scale is None and _by_channel(scale, shift):
        raise ValueError(
            "decoder.scale must be given where latents are shifted or scaled by channel: what the stored latents were "
            "multiplied by, 1 for those that the VAE gives"
        )


def decoded(x: Tensor, decoder: Decoder | None, scale: Numbers, shift: Numbers) -> Tensor:
    """Images `(B, C, H, W)` in [0, 1] of states x; without a decoder x itself. A `VAEDecoder` knows one scale: where
    there is a shift, or a scale by channel, it is given the latents as they are stored, z = x / scale + shift."""
    if decoder is None:
        return x
    if isinstance(decoder, VAEDecoder) and _by_channel(scale, shift):
        factor, moved = (torch.tensor(given).to(x).reshape(-1, 1, 1) for given in (scale, shift))
        x = x / factor + moved
    with torch.no_grad():
        return decoder(x)


def _by_channel(scale: Numbers, shift: Numbers) -> bool:
    """Whether z = x / scale + shift is more than a division by one number."""
    shifts = [shift] if isinstance(shift, int | float) else shift
    return any(shifts) or not (isinstance(scale, int | float) or len(scale) == 1)
