"""Images of one's own as a DataModule."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mfm_lightning.data.base import check_same_data, counted, say_changed_order
from mfm_lightning.data.images.opening import open_images
from mfm_lightning.data.images.pixels import PixelForm, to_images
from mfm_lightning.data.images.reading import SplitReader, TrainBatches, refused
from mfm_lightning.data.images.source import LabelledImages, names_line
from mfm_lightning.data.images.splits import Split, labels_of, stratified, whole
from mfm_lightning.data.indexed import IndexedDataModule, Samples, part_fingerprint
from mfm_lightning.data.skipped import Corrupt, Skipped, check_corrupt
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.digests import digest, digest_of
from mfm_lightning.utils.distributed import is_first_rank

log = logging.getLogger(__name__)
FEW_CAPTIONS = 1000


class ImageDataModule(IndexedDataModule):
    """Images as float tensors `(C, size, size)` in [-1, 1], with their labels, from a folder, a file, or a source.

    Guaranteed:

    - In training each image comes once in an epoch, on one rank, whatever their number; the next epoch follows without
      a gap, in another order. A batch depends on its step, the seed, the rank and the numbers of ranks and of images
      alone: a resumed run sees the batches that it would have seen.
    - Validation and test images are the same for every seed, and in no training batch unless their source has the same.

    Images that fit in `memory` are decoded once, when they are first needed (each process has a copy, one byte a
    number). Others are decoded for each batch, by `num_workers` processes.

    Args:
        source: a folder of class folders or of images, an .npz (arr_0, arr_1), an IDX file (also .gz), or a source of
            `mfm_lightning.data.images`.
        batch_size: training batch on each device.
        size: height and width to which images are cut, as in ADM; left out, that of the first, which all must have.
        channels: 1 (grey) or 3 (colour); left out, that of the first image.
        mirror: take half of the training images mirrored.
        classes: labels or names that are kept (the others are not renamed); all where None.
        val_source: images for validation, as source; where None, `val_fraction` of source.
        test_source: images for test, as source; where None, `test_fraction` of source.
        val_fraction: share of each class held out for validation; 0 with no val_source: those of test.
        test_fraction: share of each class held out for test; 0 with no test_source: those of validation.
        memory: megabytes that the images may take in memory.
        num_workers: processes that decode, for each device; 0: the training process itself.
        seed: of order and mirror images.
        corrupt: "raise" at an image that cannot be decoded, or "skip" it: another of its split, of its class where
            one is found, takes its place, always the same, and `skipped` counts it once. Images of another size or
            colour are refused in both.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: for settings out of range, a class that there is not, or no images to train on.
    """

    def __init__(
        self,
        source: str | LabelledImages,
        batch_size: int = 256,
        size: int | None = None,
        channels: int | None = None,
        mirror: bool = False,
        classes: list[str | int] | None = None,
        val_source: str | LabelledImages | None = None,
        test_source: str | LabelledImages | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        memory: float = 2000.0,
        num_workers: int = 0,
        seed: int = 0,
        corrupt: Corrupt = "raise",
    ) -> None:
        super().__init__(batch_size, seed)
        check_corrupt(corrupt)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels {channels}: expected 1 (grey) or 3 (colour)")
        if size is not None and size < 1:
            raise ValueError(f"size {size} must be at least 1 pixel")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} must be at least 0, and less than 1 "
                "together"
            )
        if num_workers < 0 or memory < 0 or seed < 0:
            raise ValueError(f"num_workers {num_workers}, memory {memory} and seed {seed} must be at least 0")
        if classes is not None and not classes:
            raise ValueError("classes [] leave no image: name some, or leave it out")
        self.sources = {"train": open_images(source)}
        for name, given in (("val", val_source), ("test", test_source)):
            if given is not None:
                self.sources[name] = open_images(given)
        self.size, self.channels, self.mirror, self.classes = size, channels, mirror, classes
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.memory, self.num_workers, self._said = memory, num_workers, False
        self.corrupt: Corrupt = corrupt
        self._skipped = Skipped() if corrupt == "skip" else None

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """A name for each label."""
        return self.sources["train"].class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.form.channels, self.form.size, self.form.size

    @cached_property
    def form(self) -> PixelForm:
        """Size and channels of all images: those of the first one that can be decoded, where they are not given."""
        source, i = self.sources["train"], 0
        while True:
            try:
                return PixelForm.of(source, self.size, self.channels, i)
            except ImageError as error:
                if self._skipped is None:
                    raise refused(error) from error
                if i + 1 == len(source.labels):
                    raise
                self._skipped.add(source.place(i), str(error))
                i += 1

    @cached_property
    def parts(self) -> dict[str, Split]:
        """The images of "train", "val" and "test"; without any held out, of "train" alone."""
        names, split = self.class_names, whole(self.sources["train"], self.class_names, "source")
        fractions = {n: f for n, f in self.fractions.items() if n not in self.sources and f}
        *held_out, rest = stratified(split.labels, list(fractions.values()))
        found = {"train": split.at(rest)}
        found |= {name: split.at(index) for name, index in zip(fractions, held_out, strict=True)}
        found |= {name: whole(self.sources[name], names, f"{name}_source") for name in self.sources if name != "train"}
        if self.classes is not None:
            kept = labels_of(self.classes, names)
            found = {name: part.only(kept) for name, part in found.items()}
        for name, other in (("val", "test"), ("test", "val")):
            if name not in found and other in found:
                found[name] = found[other]
        for name, part in found.items():
            if not len(part):
                more = f": raise {name}_fraction, set it to 0, or give {name}_source" if name in fractions else ""
                raise ValueError(
                    f"no {name} images: {self.sources['train'].line()}, classes {self.classes or 'all'}, "
                    f"{', '.join(f'{n}_fraction {f}' for n, f in self.fractions.items())}{more}"
                )
        return found

    def _say_what_there_is(self) -> None:
        """What was read, what is missing from it, and what is in it twice."""
        names, counts = self.class_names, self.label_counts()
        log.info("%s", self.summary())
        kept = range(len(names)) if self.classes is None else labels_of(self.classes, names)
        if untrained := [label for label in kept if not counts["train"][label]]:
            log.warning("no training images of %d classes: %s", len(untrained), names_line(names, untrained))
        for name, source in self.sources.items():
            if name != "train" and self._is_training_source(source):
                log.warning("%s_source has the training images: what is measured on it is not of held-out ones", name)

    def _is_training_source(self, source: LabelledImages) -> bool:
        """Whether it has as many images, of the same labels, and the same first and last one."""
        train = self.sources["train"]
        if source is train:
            return True
        ours, theirs = (SplitReader(whole(of, of.class_names, ""), self.form, self._skipped) for of in (train, source))
        ends = np.array([0, len(train.labels) - 1])
        return np.array_equal(source.labels, train.labels) and torch.equal(ours.pixels(ends), theirs.pixels(ends))

    @cached_property
    def captions(self) -> list[str]:
        """The different captions of all images, where they are few (at most `FEW_CAPTIONS`): a network that embeds
        texts does it beforehand then. Else, and without captions, none."""
        found: dict[str, None] = {}
        for part in {id(part): part for part in self.parts.values()}.values():
            for row in part.rows.tolist() if part.source.has_captions else ():
                found[part.source.caption(row)] = None
                if len(found) > FEW_CAPTIONS:
                    return []
        return list(found)

    @cached_property
    def readers(self) -> dict[str, SplitReader]:
        """What reads them, by split."""
        made: dict[int, SplitReader] = {}
        for name, part in self.parts.items():
            made.setdefault(id(part), SplitReader(part, self.form, self._skipped, name))
        return {name: made[id(part)] for name, part in self.parts.items()}

    @property
    def in_memory(self) -> bool:
        """Whether the images are held in `memory`."""
        return self.megabytes <= self.memory

    @property
    def megabytes(self) -> float:
        """Of memory that all images take when they are decoded."""
        return sum(reader.megabytes for reader in set(self.readers.values()))

    @property
    def splits(self) -> Mapping[str, tuple[Tensor, Tensor]] | None:
        """`(x, label)` by "train", "val" and "test", each made when it is asked for; None unless they fit in memory."""
        return Splits(self) if self.in_memory else None

    def setup(self, stage: str | None = None) -> None:
        self._identity  # noqa: B018 # files may change later
        if not self._said and is_first_rank():
            self._said = True
            self._say_what_there_is()
        if not self.in_memory:
            who = f"{self.num_workers} workers" if self.num_workers else "the process itself"
            log.warning(
                "the images take %.3g MB decoded, more than memory: %g; they are decoded for each batch by %s",
                self.megabytes, self.memory, who,
            )  # fmt: skip
            for reader in self.readers.values():  # what does not fit is found out before training, not at validation
                reader.pixels(np.zeros(1, dtype=int))
            return
        for name in ("train", "val") if stage in (None, "fit") else ("test",):
            if name in self.readers:
                self.reader(name)

    @property
    def skipped(self) -> int:
        """Images that were skipped by this process and its workers so far, each counted once."""
        return 0 if self._skipped is None else len(self._skipped)

    def teardown(self, stage: str) -> None:
        if self.skipped:
            log.warning("images skipped, for they cannot be decoded: %d", self.skipped)

    def reader(self, name: str) -> SplitReader:
        """The reader of a split, with its images in memory if all fit.

        Raises:
            ValueError: if there is no such split.
        """
        if name not in self.readers:
            raise ValueError(f"no {name} images are held out: set {name}_source, or val_fraction above 0")
        if self.in_memory:
            self._keep(self.readers[name])
        return self.readers[name]

    def _keep(self, reader: SplitReader) -> None:
        """Read it into memory, and say which classes have lost all their images."""
        if reader.kept is not None:
            return
        reader.keep(self.num_workers)
        if lost := int((reader.taken != np.arange(len(reader.split))).sum()):
            before, after = (counted(x, self.num_classes) for x in (reader.split.labels, reader.all_labels.numpy()))
            gone = np.flatnonzero((before > 0) & (after == 0)).tolist()
            log.warning(
                "%s: %d of %d images cannot be decoded, others are taken in their place%s", reader.name, lost,
                len(reader.split), f"; none is left of {names_line(self.class_names, gone)}" if gone else "",
            )  # fmt: skip

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return 0 if self.in_memory else self.num_workers

    def batches(self, rank: int = 0, world_size: int = 1) -> TrainBatches:
        return TrainBatches(self.batch_size, rank, world_size, self.seed, self.reader("train"), self.mirror)

    def held_out(self, name: str) -> Samples | None:
        if name not in self.parts:
            return None
        reader = self.reader(name)
        return Samples(len(reader.split), reader.sample)

    def place(self, row: int) -> str:
        return self.sources["train"].place(row)

    def origin(self, step: int) -> str:
        if self._skipped is None:
            return super().origin(step)
        reader, index = self.reader("train"), self.batches(*self.rank()).index(step)[:3]
        return f"of {', '.join(self.place(int(row)) for row in reader.split.rows[reader.read(index)[1]])}, ..."

    def predict_dataloader(self) -> DataLoader | list:
        self.reader("test")  # raises where no images are held out
        return super().predict_dataloader()

    def decode(self, x: Tensor) -> Tensor:
        """States in [-1, 1] to images in [0, 1]."""
        return to_images(x)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """The names of the labels, what tells that images or captions were replaced, and which are held out."""
        source, rows = self.sources["train"], self.parts["train"].rows
        texts = [source.caption(i) for i in range(len(source.labels))] if source.has_captions else []
        contents = None if source.contents is None else digest_of([source.contents, texts])
        return {"class_names": self.class_names, "contents": contents, "rows": digest(torch.from_numpy(rows))}

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on, and what tells the images from others, to say so where a resumed run
        has another order, or others."""
        return {
            "images": len(self.parts["train"]), "seed": self.seed, "batch_size": self.batch_size,
            "mirror": self.mirror, "classes": self.classes, "world_size": self.rank()[1],
            **self._identity,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours = self.state_dict()
        check_same_data(state_dict, ours, self.trains)
        say_changed_order(state_dict, ours, one_line=True, drawn="mirrored" if self.mirror else None)

    def label_counts(self) -> dict[str, np.ndarray]:
        """Images of each label by split; of those in memory without what cannot be decoded."""
        if self._skipped is None:
            return {name: counted(part.labels, self.num_classes) for name, part in self.parts.items()}
        return {name: counted(reader.all_labels.numpy(), self.num_classes) for name, reader in self.readers.items()}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of each split `part_fingerprint`."""
        return {name: part_fingerprint(self.parts[name].labels, read.sample) for name, read in self.readers.items()}

    def summary(self) -> str:
        """What the sources have, in a line each."""
        lines = [f"{name}: {source.line()}" for name, source in self.sources.items()]
        if self.classes is not None:
            kept = labels_of(self.classes, self.class_names)
            lines.append(f"classes kept: {names_line(self.class_names, kept)}")
        return "\n".join(lines)


class Splits(Mapping[str, tuple[Tensor, Tensor]]):
    """`(states, label)` by split."""

    def __init__(self, data: ImageDataModule) -> None:
        self.data = data

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self.data.parts:
            raise KeyError(name)
        reader = self.data.reader(name)
        return reader.all_states(), reader.all_labels

    def __iter__(self) -> Iterator[str]:
        return iter(self.data.parts)

    def __len__(self) -> int:
        return len(self.data.parts)
