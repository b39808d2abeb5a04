"""Real images for tests: an extract of Fashion-MNIST (see README.md here)."""

from pathlib import Path

import numpy as np

EXTRACT = Path(__file__).with_name("extract.npz")


def as_torchvision(root: Path, name: str) -> None:
    """The extract in the files that torchvision's MNIST or FashionMNIST reads: the last 40 images are its test set."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    with np.load(EXTRACT) as file:
        images, labels = file["arr_0"], file["arr_1"].astype(np.uint8)
    for split, rows in (("train", slice(-40)), ("t10k", slice(-40, None))):
        x, y = images[rows], labels[rows]
        head = b"\x00\x00\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in x.shape)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + x.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            b"\x00\x00\x08\x01" + len(y).to_bytes(4, "big") + y.tobytes()
        )
