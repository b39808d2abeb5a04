"""Fixtures of several files."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_sample_image

from mfm_lightning.commands.main import run
from mfm_lightning.utils import decoding
from tests import latent_data, processes
from tests.fashion_mnist import as_torchvision
from tests.short_jobs import NEEDS, short
from tests.tiny_rewards import tiny_rewards

ROOT = Path(__file__).parents[1]
# a core for each worker, and for the processes that it starts; in one process, too: a forked process has OpenMP's pool
# without its threads, and threads that it starts (as torch.distributed.checkpoint does) would wait for them forever
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


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
        run(["prepare-latents", *latent_data.arguments(folder, vae), "--output", str(folder / "shards"), "--verify"])
    return folder


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    """What a process says once, each test may see."""
    decoding._enlarged.value = False


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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the configs in it, as the current one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    """A command that is run here has not been given the tests' own arguments."""
    monkeypatch.setattr(sys, "argv", ["mfm"])


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """A test that leaves torch's settings changed, or code that does, would make others fail or pass by their order."""
    before = _settings()
    yield
    assert _settings() == before, "torch's settings are not as they were before the test"


def _settings() -> dict[str, object]:
    attention = torch.backends.cuda
    return {
        "flash attention": attention.flash_sdp_enabled(),
        "memory-efficient attention": attention.mem_efficient_sdp_enabled(),
        "attention written out": attention.math_sdp_enabled(),
        "gradients": torch.is_grad_enabled(),
        "default type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products of float32": torch.get_float32_matmul_precision(),
        "diffusers' attention": _diffusers_attention(),
    }


def _diffusers_attention() -> str:
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    return str(dispatch._AttentionBackendRegistry.get_active_backend()[0].value) if dispatch else "native"


@pytest.fixture(scope="session")
def _short_fits(tmp_path_factory, worker_id):
    """A folder in which each config is fitted once, by the first test of all workers of pytest-xdist that asks for it;
    and the function that does it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "short_fits"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "configs").symlink_to(ROOT / "configs")
            for name in ("MNIST", "FashionMNIST"):
                as_torchvision(folder / "data", name)

    def fit(config):
        for needed in NEEDS.get(config, ()):
            fit(needed)
        done = folder / f"{config.replace('/', '_')}.done"
        with FileLock(f"{done}.lock"), pytest.MonkeyPatch.context() as patched:
            if not done.exists():
                patched.chdir(folder)
                patched.setattr(sys, "argv", ["mfm"])
                run(short("fit", config))
                done.touch()

    return folder, fit


@pytest.fixture
def fitted(_short_fits, tmp_path):
    """`fitted(config, ...)`: the files of `mfm fit` with these configs, made short, and with those that they need, in
    `outputs/` of the test's folder. Each is trained once, however many tests ask for it."""
    source, fit = _short_fits

    def copied(*configs):
        for config in configs:
            fit(config)
            for name in (*NEEDS.get(config, ()), config):
                place = Path("outputs") / name
                shutil.copytree(source / place, tmp_path / place, dirs_exist_ok=True)

    return copied


@pytest.fixture
def digits_outputs(fitted):
    """`outputs/` in the test's folder, after four steps of configs/digits/flow.yaml and mfm.yaml."""
    fitted("digits/mfm")
