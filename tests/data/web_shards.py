"""Shards as other people's tools write them, by tarfile alone."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


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
