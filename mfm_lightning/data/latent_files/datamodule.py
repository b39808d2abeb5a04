"""Stored latents as a DataModule."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import counted, say_changed_order
from mfm_lightning.data.images.splits import stratified
from mfm_lightning.data.indexed import IndexedBatches, IndexedDataModule, Samples, part_fingerprint
from mfm_lightning.data.latent_files.opening import open_latents
from mfm_lightning.data.latent_files.source import LatentFileError, StoredLatents
from mfm_lightning.data.latent_form import Holds, LatentForm, check_holds
from mfm_lightning.networks.decoders import Decoder, decoded
from mfm_lightning.utils.distributed import is_first_rank

log = logging.getLogger(__name__)
CONTENTS = {"labels": "labels", "first": "the first latent", "last": "the last latent"}


@dataclass(frozen=True, eq=False)
class LatentSplit:
    """Latents of a source, as states.

    Args:
        source: that has them.
        rows: their numbers in it, `(N,)`.
        form: what they are made to be.
        null: label of those without one.
    """

    source: StoredLatents
    rows: np.ndarray
    form: LatentForm
    null: int

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def labels(self) -> np.ndarray:
        """`(N,)`."""
        labels = self.source.labels
        return np.full(len(self.rows), self.null) if labels is None else labels[self.rows]

    def states(self, index: np.ndarray, mirrored: np.ndarray, noise: torch.Generator) -> Tensor:
        """`(B, C, H, W)`; raises as `StoredLatents.array` and `LatentForm.check`."""
        arrays = []
        for row, flip in zip(self.rows[index].tolist(), mirrored.tolist(), strict=True):
            array = self.source.array(row, flip)
            self.form.check(array, self.source.place(row))
            arrays.append(array)
        return self.form.states(torch.stack(arrays), noise)

    def sample(self, i: int) -> tuple[Tensor, Tensor]:
        """State and label of a latent, the same draw each time."""
        x = self.states(np.array([i]), np.array([False]), torch.Generator().manual_seed(i))
        return x[0], torch.tensor(self.labels[i])


@dataclass(frozen=True, eq=False)
class LatentBatches(IndexedBatches):
    """Of latents.

    Args:
        split: the training latents.
        labels: theirs, `(N,)`.
        flip: take the mirror image's latents for half of the samples.
    """

    split: LatentSplit
    labels: Tensor
    flip: bool

    @property
    def rows(self) -> np.ndarray:
        return self.split.rows

    def __call__(self, step: int) -> Batch:
        index, random = self.index(step), self.random(step)
        mirrored = random.random(len(index)) < 0.5 if self.flip else np.zeros(len(index), dtype=bool)
        noise = torch.Generator().manual_seed(int(random.integers(2**63)))
        return self.split.states(index, mirrored, noise), self.labels[torch.from_numpy(index)]


class LatentDataModule(IndexedDataModule):
    """Latents `(C, H, W)` as other people's scripts leave them, scaled, with their labels.

    In training each comes once in an epoch, on one rank, whatever their number; a batch depends on its step, the seed,
    the rank and the numbers of ranks and of latents alone: a resumed run sees the batches that it would have seen.

    Args:
        source: a folder (or .zip) with dataset.json and .npy files, a .safetensors or .npz file, a folder of such, or a
            source of `mfm_lightning.data.latent_files`.
        scale: factor of latents, or one for each channel: 0.18215 for SD's VAE, 1 where they are scaled.
        holds: what arrays hold: latent, mean_std or mean_logvar, the mean first; None: latent, which is said.
        shift: what is subtracted from latents before.
        batch_size: training batch on each device.
        flip: take the mirror image's latents for half of the training samples, from a source that has them.
        num_classes: number of labels; the highest label and one where left out, 0 without labels.
        val_source: latents for validation and test, as source; where None, `val_fraction` of source.
        val_fraction: share of each class held out for validation; 0: none.
        decoder: for pictures, from latents to images.
        num_workers: processes that read, for each device; 0: the training process itself.
        seed: of order, draws and mirror images.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: for settings out of range, labels outside of num_classes, latents that are no floats, or a
            val_fraction that leaves none for validation.
    """

    def __init__(
        self,
        source: str | StoredLatents,
        scale: float | list[float],
        holds: Holds | None = None,
        shift: float | list[float] = 0.0,
        batch_size: int = 256,
        flip: bool = False,
        num_classes: int | None = None,
        val_source: str | StoredLatents | None = None,
        val_fraction: float = 0.01,
        decoder: Decoder | None = None,
        num_workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        check_holds(holds or "latent")
        if decoder is not None:
            decoder.check_latents(scale, shift, "the latents")
        if not 0 <= val_fraction < 1 or num_workers < 0 or seed < 0 or (num_classes or 0) < 0:
            raise ValueError(
                f"val_fraction {val_fraction} must be in [0, 1); num_workers {num_workers}, seed {seed} and "
                f"num_classes {num_classes} at least 0"
            )
        self.source, self.val_source = open_latents(source), None if val_source is None else open_latents(val_source)
        if flip and not self.source.has_mirrored:
            raise ValueError(f"{self.source} has no latents of mirror images: set flip: false, or name their array")
        self.scale, self.shift, self.flip = scale, shift, flip
        self.holds: Holds | None = holds
        self.given_classes, self.val_fraction = num_classes, val_fraction
        self.decoder, self.num_workers = decoder, num_workers

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.form.state_shape

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @cached_property
    def _num_classes(self) -> int:
        labels, given = self.source.labels, self.given_classes
        needed = 0 if labels is None else int(labels.max()) + 1
        if given is not None and given < needed:
            raise ValueError(f"{self.source} has labels 0..{needed - 1}, more than num_classes {given}")
        return needed if given is None else given

    @cached_property
    def form(self) -> LatentForm:
        """What all latents are made to be, by the first one."""
        len(self.source)  # of none, that is what is said
        return LatentForm.of(self.source.array(0), self.source.place(0), self.holds, self.scale, self.shift)

    @cached_property
    def parts(self) -> dict[str, LatentSplit]:
        """The latents of "train" and, where there are any, "val"."""
        rows = {"train": np.arange(len(self.source))}
        labels = np.zeros(len(self.source)) if self.source.labels is None else self.source.labels
        if self.val_source is None and self.val_fraction:
            rows["val"], rows["train"] = stratified(labels, [self.val_fraction])
        found = {name: LatentSplit(self.source, index, self.form, self.num_classes) for name, index in rows.items()}
        if self.val_source is not None:
            self._check_like_training(self.val_source)
            index = np.arange(len(self.val_source))
            found["val"] = LatentSplit(self.val_source, index, self.form, self.num_classes)
        for name, part in found.items():
            if not len(part):
                enough = "" if len(np.unique(labels)) == len(labels) else f"set {1 / len(labels):.2g} or more, "
                raise ValueError(
                    f"no {name} latents: val_fraction {self.val_fraction} of the {len(self.source)} of {self.source}, "
                    f"of which each class keeps one for training, is none: {enough}set 0 for no validation, or give "
                    "val_source"
                )
        if (
            self.val_source is not None
            and is_first_rank()
            and (same := _fingerprint(found["train"])) == _fingerprint(found["val"])
        ):
            log.warning(
                "val_source %s has the same %d latents as source %s: validation is on what is trained on",
                self.val_source, same["samples"], self.source,
            )  # fmt: skip
        return found

    def _check_like_training(self, held_out: StoredLatents) -> None:
        """Raise ValueError unless both have labels, of the same classes, or none, and arrays of one shape."""
        ours, theirs = self.source.labels, held_out.labels
        if (theirs is None) != (ours is None) or (theirs is not None and theirs.max() >= self.num_classes):
            found = "no labels" if theirs is None else f"labels up to {theirs.max()}"
            raise LatentFileError(f"{held_out} has {found}, {self.source} {self.num_classes} classes")
        self.form.check(held_out.array(0), held_out.place(0))

    def setup(self, stage: str | None = None) -> None:
        self.parts  # noqa: B018 # labels and the first array are read

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return self.num_workers

    def batches(self, rank: int = 0, world_size: int = 1) -> LatentBatches:
        split = self.parts["train"]
        labels = torch.from_numpy(split.labels.astype(np.int64))
        return LatentBatches(self.batch_size, rank, world_size, self.seed, split, labels, self.flip)

    def held_out(self, name: str) -> Samples | None:
        """Validation and test have the same."""
        found = self.parts.get("val")
        return None if found is None else Samples(len(found), found.sample)

    def place(self, row: int) -> str:
        return self.source.place(row)

    @property
    def latents(self) -> dict[str, Any]:
        """How stored latents become states."""
        return {"scale": self.scale, "shift": self.shift}

    def label_counts(self) -> dict[str, np.ndarray]:
        if self.source.labels is None:
            return {}
        return {name: counted(part.labels, self.num_classes) for name, part in self.parts.items()}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of each split `part_fingerprint`."""
        return {name: _fingerprint(part) for name, part in self.parts.items()}

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images in [0, 1], by the decoder; as they are without one."""
        return decoded(x, self.decoder)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @cached_property
    def _contents(self) -> dict[str, Any]:
        return _fingerprint(self.parts["train"])

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on, and what tells the training latents from others, to say so where a
        resumed run has another order, or others."""
        return {
            "latents": len(self.parts["train"]), "seed": self.seed, "batch_size": self.batch_size, "flip": self.flip,
            "world_size": self.rank()[1], "val_fraction": self.val_fraction, "contents": self._contents,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        drawn = "drawn from their moments, or mirrored," if self.flip or self.form.holds != "latent" else None
        ours = self.state_dict()
        before, now = state_dict.get("contents", {}), ours["contents"]
        say_changed_order(state_dict, ours, one_line=True, drawn=drawn)
        if state_dict.get("val_fraction", self.val_fraction) != self.val_fraction:
            return  # which is said
        if changed := [what for key, what in CONTENTS.items() if before.get(key, now[key]) != now[key]]:
            log.warning(
                "%s: the latents are not those of the run that goes on, or are scaled otherwise; there changed %s",
                self.source, ", ".join(changed),
            )  # fmt: skip


def _fingerprint(part: LatentSplit) -> dict[str, Any]:
    return part_fingerprint(part.labels, part.sample)
