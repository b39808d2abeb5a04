"""What training leaves beside `model.safetensors` appears whole, as all files here do."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from mfm_lightning.callbacks.export import write_folder
from mfm_lightning.networks import Autoencoder


def vae(seed):
    torch.manual_seed(seed)
    return Autoencoder(3, 2, [8, 8], 1, 4)


def test_a_folder_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    first, second = vae(0), vae(1)
    assert write_folder(first, tmp_path) == tmp_path / "vae"
    (tmp_path / "vae" / "of_the_run_before.txt").write_text("")

    def full(folder, *args, **options):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(second.vae, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            write_folder(second, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]  # nothing half written is left

    def read():
        return AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()

    assert all(torch.equal(value, first.vae.state_dict()[name]) for name, value in read().items())
    write_folder(second, tmp_path)
    assert all(torch.equal(value, second.vae.state_dict()[name]) for name, value in read().items())
    assert not (tmp_path / "vae" / "of_the_run_before.txt").exists()  # it is this run's alone
