"""Which source of latents a path is."""

from __future__ import annotations

from pathlib import Path

from mfm_lightning.data.class_folders import LABELS
from mfm_lightning.data.latent_files.arrays import ENDINGS, LatentArrays
from mfm_lightning.data.latent_files.folder import LatentFolder
from mfm_lightning.data.latent_files.source import StoredLatents


def open_latents(source: str | StoredLatents) -> StoredLatents:
    """The source of a path; one that is given comes back as it is.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: for one of another kind, or of our own shards.
    """
    if isinstance(source, StoredLatents):
        return source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no latents at {source}: expected a folder, a .zip, a .safetensors or an .npz")
    if path.suffix.lower() == ".zip" or (path / LABELS).is_file():
        return LatentFolder(source)
    if path.suffix in ENDINGS or any(any(path.glob(f"*{end}")) for end in ENDINGS):
        return LatentArrays(source)
    if (path / "index.json").is_file():
        raise ValueError(f"{source} has shards of mfm prepare-latents: read them with LatentShards")
    below = sorted(str(found.parent) for found in path.glob(f"*/{LABELS}")) if path.is_dir() else []
    hint = f": {below[0]} has one, give that" if below else ""
    raise ValueError(f"{source} has no {LABELS} with .npy files, and no {' or '.join(ENDINGS)}{hint}")
