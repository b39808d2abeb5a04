"""Which source a path is."""

from __future__ import annotations

import re
from pathlib import Path

from mfm_lightning.data.images.arrays import IdxImages, NpzImages
from mfm_lightning.data.images.folder import ImageFolder
from mfm_lightning.data.images.source import LabelledImages

_IDX = re.compile(r"(-ubyte|\.idx\d?)(\.gz)?$", re.IGNORECASE)


def open_images(source: str | LabelledImages) -> LabelledImages:
    """The source of a folder, an `.npz` or an IDX file; one that is given comes back as it is.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: for a file of another kind.
    """
    if isinstance(source, LabelledImages):
        return source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no images at {source}: expected a folder, an .npz or an IDX file")
    if path.is_dir():
        return ImageFolder(source)
    if path.suffix.lower() == ".npz":
        return NpzImages(source)
    if _IDX.search(path.name):
        return IdxImages(source)
    raise ValueError(f"{source} is none of a folder of images, an .npz, and an IDX file (...-ubyte, .idx, also .gz)")
