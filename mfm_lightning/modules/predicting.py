"""`mfm predict` sample by sample: which are there, which are this rank's to make, and that all are of one run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from mfm_lightning.alignment.described import described
from mfm_lightning.conditions import INDEX, Batch, Conditions
from mfm_lightning.evaluation.base import datamodule_of
from mfm_lightning.networks.files import fingerprint
from mfm_lightning.sampling.batch_folder import BatchFolder
from mfm_lightning.sampling.resumable import OVERWRITE, compare_settings, dealt, write_json
from mfm_lightning.utils.distributed import gather_ranks

log = logging.getLogger(__name__)
NUMBERING = "numbering.json"  # in the folder: how samples were numbered whose data do not number them
NOT_OF_SAMPLES = {  # fields of a DataModule that say how samples are loaded, not which they are
    "batch_size", "num_workers", "shuffle_buffer", "num_samples", "allow_zero_length_dataloader_with_multiple_devices",
    "prepare_data_per_node", "trainer",
}  # fmt: skip


class PredictedSamples:
    """What `mfm predict` makes of a DataModule's samples, by their index. A sample depends on its index and the
    settings alone: a run that was stopped goes on with what is missing, by any number of ranks and in batches of any
    size.

    Made in a module's `setup`, by all ranks; its `share` is what DataModules of this package ask for before they load
    anything. Of other data, samples that are there are loaded and left out.

    Args:
        trainer: of the run.
        path: of the folder.
        settings: what the samples depend on besides the data.
        in_step: ranks compute each step together: all get as many batches.

    Raises:
        NotADirectoryError, ValueError: as `ResumableFolder.claim`.
    """

    def __init__(self, trainer: L.Trainer, path: Path, settings: Mapping[str, Any], in_step: bool = False) -> None:
        self.trainer, self.folder, self.in_step = trainer, BatchFolder(path), in_step
        settings = {**settings, "precision": trainer.precision}
        self.folder.claim({**settings, "data": data_settings(datamodule_of(trainer))}, OVERWRITE)
        self._there: set[int] = gather_ranks(self.folder.there() if trainer.is_global_zero else None)[0]
        self._numbers, self._said = SampleNumbers(), False
        self.number: int | None = None  # of samples in all, where the data have said it

    def share(self, number: int) -> list[int]:
        """The indices of this rank's samples, of so many, that are not there yet."""
        self.number = number
        missing = [index for index in range(number) if index not in self._there]
        if there := number - len(missing):
            more = "the others follow" if missing else "there is nothing to do"
            log.info("%s: %d of %d samples are there; %s", self.folder.path, there, number, more)
        self._said = True
        return dealt(missing, self.trainer.global_rank, self.trainer.world_size, even=self.in_step)

    def left(self, batch: Batch, batch_idx: int) -> tuple[Tensor, dict[str, Any]] | None:
        """The rows of a batch that are not there yet, with their `index` `(B,)` in the dictionary; None where all
        are."""
        numbered = isinstance(batch[1], Mapping) and INDEX in batch[1]
        x, given = self._numbers(batch, batch_idx, self.trainer)
        if not numbered and batch_idx == 0:
            self._check_numbering(len(x))
        missing = torch.tensor([i not in self._there for i in given[INDEX].tolist()], dtype=torch.bool)
        if self.in_step:  # all ranks, or none
            missing[:] = any(gather_ranks(bool(missing.any())))
        if not missing.all() and not self._said:
            log.info("%s: samples are there; the others follow", self.folder.path)
            self._said = True
        if missing.all():
            return x, given
        if not missing.any():
            return None
        rows = missing.nonzero()[:, 0].to(x.device)
        index = given.pop(INDEX)[rows]
        taken = Conditions.of_batch(given).take(rows).as_batch()
        return x[rows], {**({"label": taken} if isinstance(taken, Tensor) else taken), INDEX: index}

    def _check_numbering(self, batch_size: int) -> None:
        """Samples that are numbered as they come are others with other batches, ranks or workers."""
        data, note = datamodule_of(self.trainer), self.folder.path / NUMBERING
        how: dict[str, Any] = {"batch_size": batch_size, "world_size": self.trainer.world_size}
        how["num_workers"] = getattr(data, "num_workers", None)
        if not self._there:
            write_json(note, how)
        compare_settings(note, how, f"samples that {type(data).__name__} does not number by itself, and", OVERWRITE)

    def finish(self) -> bool:
        """Wait for all ranks; whether this is the one that says what was made."""
        gather_ranks(None)
        if not self.trainer.is_global_zero:
            return False
        if self.number is not None and not self.folder.left(self.number):
            self.folder.clear()
        return True


class SampleNumbers:
    """Which samples of the data a batch of `mfm predict` has, so that their noise is theirs, whatever batch and device.

    The batch says so (`index` in its dictionary). One that does not is numbered as Lightning deals samples out: in turn
    to the ranks, in batches of one size.
    """

    def __init__(self) -> None:
        self._size = 0

    def __call__(self, batch: Batch, batch_idx: int, trainer: L.Trainer) -> tuple[Tensor, dict[str, Any]]:
        """The batch with the `index` `(B,)` in its dictionary."""
        x, given = batch
        if isinstance(given, Mapping) and INDEX in given:
            return x, dict(given)
        if batch_idx == 0:
            self._size = len(x)
        index = (batch_idx * self._size + torch.arange(len(x))) * trainer.world_size + trainer.global_rank
        given = Conditions.of_batch(given).as_batch()
        return x, {**({"label": given} if isinstance(given, Tensor) else given), INDEX: index}


def data_settings(data: Any) -> dict[str, Any]:
    """What the samples of a DataModule depend on: its `samples_identity`, or its class and its plain fields."""
    name = f"{type(data).__module__}.{type(data).__qualname__}"
    if (own := getattr(data, "samples_identity", None)) is not None:
        return {"class": name, **own}
    fields = (
        {k: v for k, v in vars(data).items() if k[0] != "_" and k not in NOT_OF_SAMPLES} if data is not None else {}
    )
    found = {k: data_settings(v) if isinstance(v, L.LightningDataModule) else v for k, v in fields.items()}
    return {"class": name, **{k: described(v) for k, v in found.items() if _is_plain(v)}}


def checkpoint_identity(path: str | Path) -> Any:
    """SHA-256 of a run's checkpoint; of one in shards, of each of its files."""
    path = Path(path)
    if path.is_dir():
        return {file.name: fingerprint(file) for file in sorted(path.iterdir()) if file.is_file()}
    return fingerprint(path)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) <= 10_000 and all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str | Path) or is_dataclass(value)


def begun(predicted: PredictedSamples | None) -> PredictedSamples:
    """What a module's `setup` made; raises RuntimeError before it."""
    if predicted is None:
        raise RuntimeError("what is predicted is known once mfm predict has begun")
    return predicted
