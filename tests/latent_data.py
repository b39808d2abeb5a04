"""What the tests of latent shards share: photographs, a small VAE, and shards without either."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mfm_lightning.data import LatentShards
from mfm_lightning.data.latents.index import INDEX, LatentIndex, Shard
from mfm_lightning.data.latents.shard_writer import PARTS, finished, write_shard, write_text

STATE_SHAPE = (4, 2, 2)
COUNTS = [5, 1, 9, 0, 3, 6, 2, 10, 4]  # of uneven shards, 40 in all


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


def arguments(folder: Path, vae: str | None = None) -> list[str]:
    vae = vae or str(folder / "vae")
    sizes = ["--image-size", "32", "--shard-size", "4", "--batch-size", "3", "--threads", "1", "--device", "cpu"]
    return ["--input", str(folder / "images"), "--vae", vae, *sizes]


def data(folder: Path, **settings) -> LatentShards:
    return LatentShards(str(folder), **{"batch_size": 4, "num_workers": 0, "val_shards": 0, **settings})
