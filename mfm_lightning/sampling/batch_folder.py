"""A folder of samples in the batches in which they were made: tensors, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_lightning.conditions import INDEX
from mfm_lightning.sampling.resumable import ResumableFolder, write_json
from mfm_lightning.utils.atomic import clear_partials, save_tensors

UNFINISHED = "_unfinished"  # after the name of a batch that failed


class BatchFolder(ResumableFolder):
    """`batch_FIRST.safetensors` for each batch, named by the smallest index in it, with the `index` `(B,)` of its
    samples; and `batch_FIRST.json` beside it, where something was measured.

    A batch is there when its tensors are, which are written last. Several processes may write, of any batch size: a
    sample is in one batch. Where it is in two, made twice, the first counts.
    """

    def begun(self) -> bool:
        return any(self._files())

    def there(self) -> set[int]:
        return {index for path in self._files() for index in self._index(path)}

    def write(self, index: Tensor, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> Path:
        """Store a batch, whole or not at all; one whose samples are in the batch of its name already stays out.

        Args:
            index: of its samples, `(B,)`.
            tensors: of any shapes; `index` is added.
            record: what was measured, for JSON; the batch's name and index are added.

        Returns:
            The file of the tensors.
        """
        name = self.name(index)
        path = self.path / f"{name}.safetensors"
        if path.is_file() and set(index.tolist()) <= set(self._index(path)):  # ranks in step make some samples twice
            return path
        if record is not None:
            write_json(self.path / f"{name}.json", {"batch": name, INDEX: index.tolist(), **record})
        save_tensors({**tensors, INDEX: index}, path)
        self._unfinished(index).unlink(missing_ok=True)
        return path

    def write_unfinished(self, index: Tensor, states: Tensor) -> Path:
        """Store where a batch stood when it failed; it does not count as made."""
        return save_tensors({"states": states, INDEX: index}, self._unfinished(index))

    def records(self) -> list[dict[str, Any]]:
        """What was measured of the batches that are there, by their first index."""
        files = (path.with_suffix(".json") for path in self._files())
        found = [json.loads(path.read_text(encoding="utf-8")) for path in files if path.is_file()]
        return sorted(found, key=lambda record: min(record[INDEX]))

    def rows(self, indices: Iterable[int], names: Iterable[str]) -> dict[int, dict[str, Tensor]]:
        """Tensors of some samples, by index; what is not there, or has not a row a sample in its batch, is left out."""
        wanted, found = set(indices), dict[int, dict[str, Tensor]]()
        names = list(names)
        for path in self._files():
            index = self._index(path)
            if not wanted.intersection(index):
                continue
            with safe_open(path, "pt") as batch:
                parts = {name: batch.get_slice(name) for name in names if name in batch.keys()}  # noqa: SIM118
                if len(parts) < len(names) or any(part.get_shape()[0] != len(index) for part in parts.values()):
                    continue
                for row, i in enumerate(index):
                    if i in wanted and i not in found:
                        found[i] = {name: part[row : row + 1][0] for name, part in parts.items()}
        return found

    def clear(self) -> None:
        """Remove what stopped processes left: half-written files, and records and states of batches that were
        made again under another name; only where nothing is missing and nobody writes."""
        clear_partials(self.path)
        whole = {path.stem for path in self._files()}
        for path in self.path.glob("batch_*"):
            if path.suffix in (".json", ".safetensors") and path.stem not in whole:
                path.unlink(missing_ok=True)

    @staticmethod
    def name(index: Tensor) -> str:
        """Of the files of a batch."""
        return f"batch_{int(index.min()):04d}"

    def _unfinished(self, index: Tensor) -> Path:
        return self.path / f"{self.name(index)}{UNFINISHED}.safetensors"

    def _files(self) -> list[Path]:
        found = self.path.glob("batch_*.safetensors")
        return sorted(path for path in found if not path.stem.endswith(UNFINISHED))

    def _index(self, path: Path) -> list[int]:
        try:
            with safe_open(path, "pt") as batch:
                index: Tensor = batch.get_tensor(INDEX)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): delete it, and its samples are made again") from error
        return index.to(torch.int64).flatten().tolist()
