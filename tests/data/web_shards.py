"""Shards as other people write them, by tarfile alone, and what tests ask of them."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mfm_lightning.data import WebDatasetDataModule


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> Path:
    """A tar of samples: contents by ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples, first):
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"folder/{i:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def picture(i: int, size: int = 8) -> np.ndarray:
    """Sample i: grey level i all over, but for a column on the left."""
    pixels = np.full((size, size, 3), i, dtype=np.uint8)
    pixels[:, 0] = 255
    return pixels


def sample(i: int) -> dict[str, bytes]:
    return {
        "png": png(picture(i)),
        "cls": str(i % 3).encode(),
        "txt": f"picture {i}\n".encode(),
        "json": json.dumps({"label": i % 3, "text": f"picture {i}"}).encode(),
    }


def image_shards(folder: Path, counts: list[int]) -> str:
    """Shards of so many samples, numbered through; returns their URLs."""
    first = 0
    for k, count in enumerate(counts):
        write(folder / f"{k:03d}.tar", [sample(i) for i in range(first, first + count)], first)
        first += count
    return f"{folder}/{{000..{len(counts) - 1:03d}}}.tar" if len(counts) > 1 else f"{folder}/000.tar"


def numbers(batches) -> list[int]:
    """Which samples batches of `picture` have."""
    return [round(float(x[0, -1, -1] + 1) * 127.5) for batch in batches for x in batch[0]]


def data(urls: str, batch_size: int = 4, num_workers: int = 0, **more) -> WebDatasetDataModule:
    more = {"image": "jpg;png"} | more
    return WebDatasetDataModule(urls, batch_size, num_workers=num_workers, shuffle_buffer=5, **more)


def warnings_of(caplog):
    """What was logged for sure, whatever level other tests have left."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


def latents(folder: Path, arrays: list[np.ndarray]) -> dict:
    write(folder / "l.tar", [{"npy": npy(array), "cls": b"0"} for array in arrays])
    return {"urls": str(folder / "l.tar"), "image": None, "latent": "npy", "label": None, "num_samples": len(arrays)}
