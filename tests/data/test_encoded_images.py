"""Images as latents: the VAE is read once, as the settings say."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from mfm_lightning.data.images import EncodedImages, latents
from mfm_lightning.networks import Autoencoder
from tests.fashion_mnist import EXTRACT


def test_the_vae_is_read_once_and_fetched_where_that_is_allowed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    Autoencoder(3, 4, [8, 8, 8], 1, 4).write_beside(tmp_path)
    asked, load = [], latents.load_vae

    def counted(path, allow_download=False):
        asked.append(allow_download)
        return load(path, allow_download)

    monkeypatch.setattr(latents, "load_vae", counted)
    data = EncodedImages(str(EXTRACT), str(tmp_path / "vae"), size=32, allow_download=True)
    assert data.splits is not None
    found = {name: z for name, (z, _) in data.splits.items()}
    assert data.state_shape == data.state_shape == found["train"].shape[1:] == (4, 8, 8)
    assert asked == [True]
    pixels = data.reader("test").pixels(torch.arange(2).numpy())
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.no_grad():
        expected = vae.encode(pixels / 127.5 - 1).latent_dist.mean
    assert torch.allclose(found["test"][:2], expected, atol=1e-5)
