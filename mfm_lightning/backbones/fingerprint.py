"""A short name of what is in the folders of a pipeline's parts, without reading gigabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

WHOLE = 1 << 22  # bytes: files up to it are read whole
_STRETCH, _STRETCHES = 1 << 16, 64  # of others so many stretches, the first and the last bytes among them
_WEIGHTS, _SETTINGS = (".safetensors", ".bin"), (".json", ".txt", ".model")


def fingerprint_of(folders: Sequence[Path], variant: str | None = None, more: str = "") -> str:
    """A hash of the files that are loaded of these folders, equal on every machine and for every copy; not of when they
    were written, nor by which version of a library, nor of where they are. Large files count by their size and 64
    stretches of 64 KB: other weights differ in all of them.

    Args:
        folders: of parts, whose own names count as well.
        variant: of the weights' files, such as "fp16".
        more: what else they depend on.
    """
    digest = hashlib.sha256(more.encode())
    for folder in folders:
        for path in _files(folder, variant):
            if path.suffix == ".json" and (content := _settings(path)) is not None:
                digest.update(f"{folder.name}/{path.name}:{content}\n".encode())
                continue
            size = path.stat().st_size
            digest.update(f"{folder.name}/{path.name}:{size}\n".encode())
            with open(path, "rb") as file:
                if size <= WHOLE:
                    digest.update(file.read())
                    continue
                for k in range(_STRETCHES):
                    file.seek(k * (size - _STRETCH) // (_STRETCHES - 1))
                    digest.update(file.read(_STRETCH))
    return digest.hexdigest()


def _settings(path: Path) -> str | None:
    """The content of a JSON object without the notes of who wrote it; None for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return json.dumps({k: v for k, v in found.items() if k[:1] != "_" and k != "transformers_version"}, sort_keys=True)


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Settings, and the weights of the variant; where it has none, all weights."""
    found = sorted(path for path in folder.glob("*") if path.is_file())
    settings = [p for p in found if p.suffix in _SETTINGS and not p.name.endswith(".index.json")]
    weights = [p for p in found if p.suffix in _WEIGHTS]
    of_variant = [p for p in weights if _variant(p) == variant]
    return [*settings, *(of_variant or weights)]


def _variant(path: Path) -> str | None:
    """Such as "fp16" of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    _, _, rest = path.stem.partition(".")
    return rest.split("-")[0] or None
