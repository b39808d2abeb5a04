"""Images as latents: the VAE is read once, as the settings say."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

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


def test_latents_have_the_label_of_the_image_that_was_encoded(tmp_path):
    """In the place of a class's only image, damaged, there is one of another class."""
    torch.manual_seed(0)
    Autoencoder(3, 4, [8, 8, 8], 1, 4).write_beside(tmp_path)
    for k, name in enumerate("ab"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (100 * k, 40 * i, 0)).save(tmp_path / "images" / name / f"{i}.png")
        (tmp_path / "images/a" / f"{k}.png").write_bytes(b"")
    data = EncodedImages(
        str(tmp_path / "images"), str(tmp_path / "vae"), val_fraction=0, test_fraction=0, corrupt="skip"
    )
    latents, labels = data.splits["train"]
    assert labels.tolist() == [1, 1, 1, 1]
    assert all(any(torch.equal(latents[i], latents[j]) for j in (2, 3)) for i in (0, 1))
    assert data.reader("train").sample(1)[1] == 1
