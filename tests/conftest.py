"""Fixtures of several files."""

import signal

import pytest

from mfm_lightning.prepare_command import main
from tests import latent_data, processes


@pytest.fixture(scope="module")
def one_thread():
    """See `processes.one_thread`."""
    with processes.one_thread():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Photographs, a VAE, and their shards: 18 images of 2 classes in 5 shards."""
    folder = tmp_path_factory.mktemp("latents")
    latent_data.photographs(folder / "images")
    vae = latent_data.small_vae(folder / "vae")
    with processes.one_thread():
        main([*latent_data.arguments(folder, vae), "--output", str(folder / "shards"), "--verify"])
    return folder


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """Ctrl-C is heard, also where the tests are a shell's background job, for which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Shards of `latent_data.COUNTS` samples."""
    return latent_data.shards(tmp_path_factory.mktemp("uneven"), latent_data.COUNTS)
