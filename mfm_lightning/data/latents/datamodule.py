"""Sharded latents as a DataModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
from torch import Tensor

from mfm_lightning.backbones.embeddings import Embedded
from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import StepDataModule, check_same_data, counted, say_changed_order
from mfm_lightning.data.latents.epoch_plan import EpochPlan, FewShards
from mfm_lightning.data.latents.index import LatentIndex, LatentIndexError, Shard, read_classes, read_null
from mfm_lightning.data.latents.stream import LatentLoader, LatentStream, Reading
from mfm_lightning.data.latents.urls import join, local_path
from mfm_lightning.data.skipped import Corrupt, Skipped, check_corrupt
from mfm_lightning.networks.decoders import Decoder, decoded
from mfm_lightning.utils.digests import digest_of

log = logging.getLogger(__name__)
MUCH = 16e9  # bytes of buffers of which is said that they take memory


class LatentShards(StepDataModule):
    """Latents `(C, H, W)` drawn from the VAE moments that `mfm prepare-latents` wrote, shifted and scaled, with their
    labels. Where shards have captions (`mfm prepare-latents --flow --captions`), batches are
    `(x1, {label, prompts, text (B, L, D), and mask (B, L), pooled (B, P) of flows that have them})`: a text-to-image
    network takes these embeddings, and training needs no text encoder.

    Guaranteed:

    - In training each sample comes at most once an epoch, on one rank and in one worker, whatever their numbers. An
      epoch has `N // (W B)` batches of B on each of W ranks, for any sizes of shards and any `num_workers`; what is
      left of the N samples is another part in each epoch.
    - A batch depends on its step, the seed, the rank, and on the numbers of ranks and workers, batch size and buffer:
      a run that was stopped and resumed sees the batches that it would have seen. With another number of ranks or
      workers the order is another one (and a warning says so).
    - In validation and test all ranks have the same number of batches of equal sizes, which together hold every sample:
      once, but for up to W - 1 that two ranks see, where W does not divide their number. Draws are the same each time.

    Args:
        folder: of the shards and their index.json: a path, or a URL that webdataset opens; for `pipe:` a command with
            `{name}` in place of a file's name.
        batch_size: training batch on each device.
        num_workers: processes that read, for each device; 0: the training process itself.
        shuffle_buffer: samples that are shuffled with each other in each worker; with shards in a new order each epoch.
            They are held in memory: 35 KB each for latents of 4 x 32 x 32; the index of shards with embeddings says
            more (SD3 at 1024 pixels: 5 MB each, so give 64 or so).
        flip: take the mirror image's moments for half of the samples.
        classes: labels that are kept (the others are not renamed); all where None.
        val_folder: shards for validation and test; where None, the last `val_shards` of `folder`.
        val_shards: shards held out where there is no `val_folder`; 0: no validation.
        few_shards: with fewer shards than ranks: "split" shares them out in parts, "error" refuses, "resample" draws
            shards for each rank with replacement (also where there is not one batch for each rank).
        corrupt: "raise" at a sample that is damaged or missing, or "skip" it: the next good one takes its place, so
            that batches stay as long; `skipped` counts each once.
        scale: factor of the latents, after the VAE's own shift; the VAE's own (0.18215 for SD's) where None.
        decoder: for pictures, from latents to images.
        allow_pipe: run the command of a `pipe:` folder.
        seed: of order and draws.

    Raises:
        FileNotFoundError: without an index, or a shard.
        LatentIndexError: for an index without shards, with labels outside its classes, or with other sizes than the
            files' (a truncated shard); for a `val_folder` of another shape, other classes, VAE or scale.
        ValueError: for settings out of range, or too few samples or shards.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 256,
        num_workers: int = 4,
        shuffle_buffer: int = 2048,
        flip: bool = True,
        classes: list[int] | None = None,
        val_folder: str | None = None,
        val_shards: int = 1,
        few_shards: FewShards = "split",
        corrupt: Corrupt = "raise",
        scale: float | None = None,
        decoder: Decoder | None = None,
        allow_pipe: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if num_workers < 0 or shuffle_buffer < 1 or val_shards < 0:
            raise ValueError(
                f"num_workers {num_workers} and val_shards {val_shards} must be at least 0, shuffle_buffer "
                f"{shuffle_buffer} at least 1"
            )
        if classes is not None and (not classes or min(classes) < 0):
            raise ValueError(f"classes {classes} must be labels from 0 on, or left out")
        if few_shards not in get_args(FewShards):
            raise ValueError(f"few_shards {few_shards!r}: expected one of {', '.join(get_args(FewShards))}")
        check_corrupt(corrupt)
        self.folder, self.val_folder, self.val_shards = str(folder), val_folder and str(val_folder), val_shards
        self.num_workers, self.classes = num_workers, classes
        self.few_shards: FewShards = few_shards
        self.decoder, self._given_scale = decoder, scale
        self.reading = Reading(flip, 0.0, shuffle_buffer, corrupt, allow_pipe)
        self._parts: dict[str, tuple[str, LatentIndex]] | None = None
        self._skipped = Skipped()
        self._random_access: LatentStream | None = None

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.index.state_shape

    @property
    def num_classes(self) -> int:
        return self.index.num_classes

    @property
    def index(self) -> LatentIndex:
        """Of the training shards."""
        return self._part("train")[1]

    @property
    def embedded(self) -> Embedded | None:
        """What made the embeddings, and that of the empty prompt; None without captions."""
        index = self.index
        if index.captions is None:
            return None
        return Embedded(index.flow or {}, read_null(self.folder, self.reading.allow_pipe), self.folder)

    @property
    def skipped(self) -> int:
        """Corrupt samples skipped by this process and its workers so far, each counted once."""
        return len(self._skipped)

    def _part(self, split: str) -> tuple[str, LatentIndex]:
        """Folder and shards of "train" or "val"; an index without shards where there is no validation."""
        if self._parts is None:
            index = LatentIndex.load(self.folder, self.reading.allow_pipe)
            self.reading.scale = index.scale if self._given_scale is None else self._given_scale
            self.reading.shift = index.shift
            if self.classes is not None and max(self.classes) >= index.num_classes:
                raise ValueError(f"classes {self.classes}: the shards have labels 0..{index.num_classes - 1}")
            if self.val_folder is not None:
                val = self.val_folder, LatentIndex.load(self.val_folder, self.reading.allow_pipe)
                self._check_like_training(index, val[1])
            else:
                kept = len(index.shards) - self.val_shards
                if kept < 1:
                    raise ValueError(
                        f"val_shards {self.val_shards} of the {len(index.shards)} in {self.folder} leave none to train "
                        "on: lower it, give a val_folder, or prepare smaller shards"
                    )
                val = self.folder, _with(index, index.shards[kept:])
                index = _with(index, index.shards[:kept])
            self._parts = {"train": (self.folder, index), "val": val}
        return self._parts[split]

    def _check_like_training(self, index: LatentIndex, val: LatentIndex) -> None:
        """Raise LatentIndexError unless one network takes both, and one scale (where none was given) fits both."""
        if (val.state_shape, val.num_classes) != (index.state_shape, index.num_classes):
            raise LatentIndexError(
                f"{self.val_folder} has latents {val.state_shape} of {val.num_classes} classes, "
                f"{self.folder} {index.state_shape} of {index.num_classes}"
            )
        if self.val_folder is not None:
            train, named = (read_classes(f, self.reading.allow_pipe) for f in (self.folder, self.val_folder))
            if train is not None and named is not None and train != named:
                name = next(n for n in sorted(train.keys() | named.keys()) if train.get(n) != named.get(n))
                raise LatentIndexError(
                    f"{self.val_folder} has other classes than {self.folder}: {name!r} is {_label(named, name)} there, "
                    f"{_label(train, name)} in training; prepare both with one --class-index"
                )
        ours, theirs = (str(i.made_with.get("vae_sha256", "")) for i in (index, val))
        if ours and theirs and ours != theirs:  # shards that were made by other means may not say
            raise LatentIndexError(
                f"{self.val_folder} was made with another VAE (sha256 {theirs[:12]}) than {self.folder} ({ours[:12]}): "
                "prepare both with the same"
            )
        if self._given_scale is None and val.scale != index.scale:
            raise LatentIndexError(
                f"{self.val_folder} has latents to be scaled by {val.scale}, {self.folder} by {index.scale}: prepare "
                "both with the same VAE, or give the scale"
            )
        ours, theirs = ({"shift": i.shift, "captions": i.captions, **_flow(i)} for i in (index, val))
        if other := next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None):
            raise LatentIndexError(
                f"{self.val_folder} was made with {other} {theirs.get(other)}, {self.folder} with {ours.get(other)}: "
                "prepare both with the same --flow and options"
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of training and validation shards their number, samples and bytes, and a digest of the SHA-256 of each, which
        the index has."""
        found = {}
        for split in ("train", "val"):
            shards = self._part(split)[1].shards
            found[split] = {
                "samples": sum(shard.samples for shard in shards), "shards": len(shards),
                "bytes": sum(shard.bytes for shard in shards),
                "sha256": digest_of([[shard.name, shard.sha256] for shard in shards]),
            }  # fmt: skip
        return found

    def setup(self, stage: str | None = None) -> None:
        each, readers = self.index.layout.stride, max(1, self.num_workers)
        if (total := self.reading.shuffle_buffer * each * readers) > MUCH:
            log.warning(
                "shuffle_buffer: %d samples of %.2g MB in each of %d workers take %.2g GB of memory: lower it",
                self.reading.shuffle_buffer, each / 1e6, readers, total / 1e9,
            )  # fmt: skip
        splits = ("train", "val") if stage in (None, "fit") else ("val",)
        if "train" in splits:
            _ = self._identity  # read now, and not with the first checkpoint
        for folder, index in map(self._part, splits):
            problems = missing_or_truncated(folder, index)
            if problems and self.reading.corrupt == "raise":
                kind = FileNotFoundError if "is missing" in problems[0] else LatentIndexError
                raise kind(f"{len(problems)} of {len(index.shards)} shards cannot be used: {'; '.join(problems[:5])}")
            for problem in problems[:5]:
                log.warning("corrupt samples are skipped: %s", problem)

    def teardown(self, stage: str) -> None:
        if self.skipped:
            log.warning("%d corrupt samples were skipped", self.skipped)

    # -- batches -------------------------------------------------------------------------------------------------------

    def loader(
        self,
        split: str = "train",
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        length: int | None = None,
        num_workers: int | None = None,
        where: Callable[[], int] | None = None,
    ) -> LatentLoader:
        """Batches `start..length-1` of a rank; one epoch where `length` is None.

        Args:
            split: "train", whose loader goes on with each pass, or "val", where all passes are the same.
            num_workers: other than this DataModule's.
            where: as of `StepLoader`.
        """
        workers = self.num_workers if num_workers is None else num_workers
        return LatentLoader(self._stream(split, rank, world_size, workers, start, length), workers, where=where)

    def _stream(
        self, split: str, rank: int, world_size: int, lanes: int, start: int, length: int | None
    ) -> LatentStream:
        folder, index = self._part(split)
        rows = [_kept(shard, self.classes) for shard in index.shards]
        plan = EpochPlan(
            [len(r) for r in rows], self.batch_size, rank, world_size, lanes, self.seed, split == "train",
            self.few_shards,
        )  # fmt: skip
        return LatentStream(index, folder, rows, plan, self.reading, start, length, self._skipped)

    def train_dataloader(self) -> LatentLoader:
        start, length = self.steps()
        return self.loader("train", *self.rank(), start=start, length=length, where=self.position)

    def val_dataloader(self) -> LatentLoader | list:
        return self.loader("val", *self.rank()) if self._part("val")[1].shards else []

    def test_dataloader(self) -> LatentLoader | list:
        return self.val_dataloader()

    def predict_dataloader(self) -> LatentLoader | list:
        return self.val_dataloader()

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step, read by this process (for `OffPolicyDataModule`)."""
        if self._random_access is None:
            self._random_access = self._stream("train", *self.rank(), 1, 0, None)
        return self._random_access.batch(step)

    def origin(self, step: int) -> str:
        stream = self._stream("train", *self.rank(), self.num_workers, 0, None)
        return f"of {', '.join(stream.shards_of(step))} in {self.folder}"

    def label_counts(self) -> dict[str, np.ndarray]:
        shards = {name: self._part(name)[1].shards for name in ("train", "val")}
        labels = {name: [s.labels[_kept(s, self.classes)] for s in found] for name, found in shards.items() if found}
        return {name: counted(np.concatenate(found), self.num_classes) for name, found in labels.items()}

    def decode(self, x: Tensor) -> Tensor:
        """Latents to images in [0, 1], by the decoder; as they are without one."""
        return decoded(x, self.decoder)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on, and what tells the shards from others, to say so where a resumed run
        has another order, or others."""
        return {
            **self._identity, "samples": self.index.samples, "seed": self.seed, "batch_size": self.batch_size,
            "num_workers": self.num_workers, "shuffle_buffer": self.reading.shuffle_buffer, "flip": self.reading.flip,
            "classes": self.classes, "few_shards": self.few_shards, "world_size": self.rank()[1],
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours = self.state_dict()
        check_same_data(state_dict, ours, self.trains)
        say_changed_order(state_dict, ours)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """As `check_same_data` takes it: names of the classes by label, where all have one, and the training shards."""
        try:
            labels = read_classes(self.folder, self.reading.allow_pipe) or {}
        except LatentIndexError as error:  # training does not need them
            log.warning("%s: names of classes are not compared", error)
            labels = {}
        names = sorted(labels, key=lambda name: labels[name])
        whole = [labels[name] for name in names] == list(range(len(names)))
        return {"class_names": names if whole else [], "contents": self.fingerprint["train"]["sha256"]}


def missing_or_truncated(folder: str, index: LatentIndex) -> list[str]:
    """What is wrong with local shards at a glance; a URL's are not looked at."""
    problems = []
    for shard in index.shards:
        path = local_path(join(folder, shard.name))
        if path is None:
            return []
        if shard.samples and not path.is_file():
            problems.append(f"{path} is missing")
        elif shard.samples and (size := path.stat().st_size) != shard.bytes:
            problems.append(f"{path} has {size:,} bytes, the index says {shard.bytes:,}: truncated or another file")
    return problems


def _flow(index: LatentIndex) -> dict[str, Any]:
    """What must be the same of the flow, whose name and revision may differ."""
    return {name: value for name, value in (index.flow or {}).items() if name not in ("name", "revision")}


def _label(labels: dict[str, int], name: str) -> str:
    return f"label {labels[name]}" if name in labels else "no class"


def _kept(shard: Shard, classes: list[int] | None) -> np.ndarray:
    if classes is None:
        return np.arange(shard.samples)
    return np.flatnonzero(np.isin(shard.labels, classes))


def _with(index: LatentIndex, shards: Sequence[Shard]) -> LatentIndex:
    return replace(index, shards=shards, broken=[])
