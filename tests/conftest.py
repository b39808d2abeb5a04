"""Fixtures of several files."""

import shutil
import signal
import sys

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mfm_lightning.commands.main import run
from mfm_lightning.commands.prepare_latents import main
from tests import latent_data, processes
from tests.short_jobs import FOUR_STEPS
from tests.tiny_rewards import tiny_rewards


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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Options of each preference reward, small and of random weights."""
    return tiny_rewards(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def photos():
    """scikit-learn's two photographs, 427 x 640, and an upright part of one."""
    found = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [*found, found[0].crop((100, 20, 353, 420))]


@pytest.fixture(scope="session")
def _digits_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["mfm"])
        for name in ("flow", "mfm"):
            run(["fit", "--config", f"configs/digits/{name}.yaml", *FOUR_STEPS])
    return folder / "outputs"


@pytest.fixture
def digits_outputs(_digits_runs, tmp_path):
    """`outputs/` in the test's folder, after four steps of configs/digits/flow.yaml and mfm.yaml; trained once."""
    return shutil.copytree(_digits_runs, tmp_path / "outputs")
