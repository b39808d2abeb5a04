"""What the tests of latent shards share: photographs, a small VAE, shards without either, and processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from mfm_lightning.data.latent_index import INDEX, LatentIndex, Shard
from mfm_lightning.data.shard_writer import PARTS, finished, write_shard, write_text

STATE_SHAPE = (4, 2, 2)


def photographs(root: Path, per_class: int = 9, size: int = 40) -> Path:
    """An ImageFolder of crops of scikit-learn's two colour photographs, one class each."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            top, left = random.integers(0, 300, 2)
            crop = image[top : top + size + i, left : left + size + 3 * i]
            Image.fromarray(crop).save(root / name / f"{name}.{i:02d}.png")
    return root


def small_vae(folder: Path, blocks: int = 3) -> str:
    """An AutoencoderKL with random weights: factor 2^(blocks - 1), 4 latent channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return str(folder)


def shards(
    folder: Path,
    counts: list[int],
    num_classes: int = 4,
    state_shape=STATE_SHAPE,
    std: float = 0.0,
    key: str = "{:06d}",
) -> Path:
    """Shards of so many samples; sample i of all has mean i everywhere, its mirror image -i, and label i % classes."""
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    found, i = [], 0
    for k, count in enumerate(counts):
        samples = []
        for _ in range(count):
            moments = np.full((2, 2, *state_shape), std, np.float16)
            moments[0, 0], moments[1, 0] = i, -i
            samples.append((key.format(i), i % num_classes, moments))
            i += 1
        name = f"latents-{k:06d}.tar"
        write_shard(folder, name, samples, [])
        found.append(Shard.from_dict(finished(folder, name)))
    write_text(folder / INDEX, LatentIndex(tuple(state_shape), num_classes, 0.5, found).text())
    return folder


def numbers(batch) -> list[int]:
    """Which samples of `shards` a batch holds, in its order."""
    return (batch[0][:, 0, 0, 0] / 0.5).abs().round().int().tolist()


@contextmanager
def one_thread() -> Iterator[None]:
    """In this process and in spawned ones, as forked ones have it: then sums are the same to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield
    torch.set_num_threads(threads)


def arguments(folder: Path, vae: str | None = None) -> list[str]:
    vae = vae or str(folder / "vae")
    sizes = ["--image-size", "32", "--shard-size", "4", "--batch-size", "3", "--threads", "1", "--device", "cpu"]
    return ["--input", str(folder / "images"), "--vae", vae, *sizes]


def forked(function: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that has all imported already; with one thread, since a fork does not take OpenMP's along."""

    def alone() -> None:
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    process.join(timeout=120)
    if process.is_alive():  # it hangs: that is no exit status
        process.kill()
    return process.exitcode
