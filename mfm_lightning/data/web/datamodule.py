"""WebDataset's shards as a DataModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.base import StepDataModule, check_same_data, counted, say_changed_order
from mfm_lightning.data.images.pixels import PixelForm, to_images
from mfm_lightning.data.latent_form import Holds, LatentForm, check_holds
from mfm_lightning.data.latents.urls import local_path
from mfm_lightning.data.skipped import Corrupt, Skipped, check_corrupt
from mfm_lightning.data.web.batches import Epochs, HeldOutLoader, WebStream
from mfm_lightning.data.web.fields import Fields
from mfm_lightning.data.web.samples import SampleReader, count_labels
from mfm_lightning.data.web.shards import Faults, Rank, expand_urls, named, of_worker, pipeline, say_shared
from mfm_lightning.networks.decoders import Decoder, decoded
from mfm_lightning.utils.digests import digest_of

log = logging.getLogger(__name__)


class WebDatasetDataModule(StepDataModule):
    """Images or latents in shards that others made, as they are, read by the library webdataset.

    Guaranteed:

    - All ranks have the same number of batches, of one size. In an epoch each worker of each rank takes other shards.
      One whose shards have fewer samples than others' then goes on with shards that are dealt out anew, also those of
      others: of uneven shards some samples come twice in an epoch, and others not at all.
    - A run that was stopped goes on at its epoch, whose shards are begun anew in another order; the epochs after it are
      those of a run that was not stopped. `LatentShards` and `ImageDataModule` go on at the step. The same holds
      wherever reading begins within an epoch, as with `trainer.limit_train_batches`, and after each renewal of
      `OffPolicyDataModule`'s buffer: the first time it is said.
    - In validation and test the batches hold every sample once, but for up to W - 1 of each worker that two of W ranks
      see; the same each time. Each rank reads all shards.

    Args:
        urls: of shards, as webdataset takes them: paths, https:, s3:, gs:, hf: or pipe:, with braces
            (train-{0000..0127}.tar) or `::` between several; or a list of such.
        batch_size: training batch on each device.
        image: endings of images, such as jpg;png;webp.
        latent: ending of arrays in .npy, in place of images, such as npy.
        label: ending of labels, such as cls, or json:label for a key of a JSON file; null: no labels.
        caption: ending of texts, such as txt, or json:caption; they become prompts.
        num_classes: number of labels; counted where left out.
        num_samples: in all shards; counted where left out. Counting reads all shards, each time. A wrong one is refused
            where they are read anyway, to count classes; else training warns of one that is more than twice too large.
        size: height and width to which images are cut, as in ADM; left out, that of the first, which all must have.
        channels: 1 (grey) or 3 (colour); left out, that of the first image.
        mirror: take half of the training images mirrored.
        holds: what arrays hold: latent, mean_std or mean_logvar, the mean first; None: latent, which is said.
        scale: factor of latents, or one for each channel: 0.18215 for SD's VAE, 1 where they are scaled.
        shift: what is subtracted from latents before.
        decoder: for pictures, from latents to images.
        val_urls: shards for validation and test, as urls.
        resampled: draw shards with replacement, for each rank by itself; with fewer shards than ranks.
        shuffle_buffer: samples that are shuffled with each other in each worker.
        num_workers: processes that read, for each device; 0: the training process itself.
        corrupt: "raise" at a sample or shard that is damaged, or "skip" it; `skipped` counts each once.
        allow_pipe: run the commands of `pipe:` URLs.
        seed: of order and draws.

    Raises:
        FileNotFoundError: for a local shard that is not there.
        ValueError: for settings out of range or of the other kind of data; for fewer shards than ranks, unless
            resampled.
    """

    def __init__(
        self,
        urls: str | list[str],
        batch_size: int = 256,
        image: str | None = None,
        latent: str | None = None,
        label: str | None = "cls",
        caption: str | None = None,
        num_classes: int | None = None,
        num_samples: int | None = None,
        size: int | None = None,
        channels: int | None = None,
        mirror: bool = False,
        holds: Holds | None = None,
        scale: float | list[float] | None = None,
        shift: float | list[float] = 0.0,
        decoder: Decoder | None = None,
        val_urls: str | list[str] | None = None,
        resampled: bool = False,
        shuffle_buffer: int = 1000,
        num_workers: int = 4,
        corrupt: Corrupt = "raise",
        allow_pipe: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if (image is None) == (latent is None):
            raise ValueError("give image or latent: the ending of the files, such as image: jpg;png, or latent: npy")
        if latent is not None and (size, channels, mirror) != (None, None, False):
            raise ValueError("size, channels and mirror are for images, not for latents")
        if image is not None and (holds or "latent", scale, shift) != ("latent", None, 0.0):
            raise ValueError("holds, scale and shift are for latents, not for images")
        if latent is not None and scale is None:
            raise ValueError("scale must be given for latents: 0.18215 for SD's VAE, 1 where they are scaled already")
        if num_classes == 0 and label is not None:
            raise ValueError(f"num_classes 0 with label {label}: set label: null, or leave num_classes out")
        check_holds(holds or "latent")
        if decoder is not None and latent is not None:
            decoder.check_latents(scale or 1.0, shift, "the latents")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels {channels}: expected 1 (grey) or 3 (colour)")
        for name, value, least in (
            ("size", size, 1), ("num_classes", num_classes, 0), ("num_samples", num_samples, 1), ("seed", seed, 0),
            ("num_workers", num_workers, 0), ("shuffle_buffer", shuffle_buffer, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"{name} {value} must be at least {least}")
        check_corrupt(corrupt)
        self.urls = expand_urls(urls, allow_pipe)
        self.val_urls = None if val_urls is None else expand_urls(val_urls, allow_pipe)
        say_shared(self.urls, self.val_urls or [])
        self.fields = Fields(image or latent or "", label, caption, num_classes)
        self.is_latent, self.size, self.channels, self.mirror = latent is not None, size, channels, mirror
        self.holds: Holds | None = holds
        self.scale, self.shift, self.decoder = scale, shift, decoder
        self.given_classes, self.given_samples = num_classes, num_samples
        self.resampled, self.shuffle_buffer, self.num_workers = resampled, shuffle_buffer, num_workers
        self.corrupt: Corrupt = corrupt
        self._skipped = Skipped()
        self._stream: WebStream | None = None
        self._walk: tuple[int, Iterator[Batch]] | None = None

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def state_shape(self) -> tuple[int, ...]:
        form = self.form
        return form.state_shape if isinstance(form, LatentForm) else (form.channels, form.size, form.size)

    @property
    def num_classes(self) -> int:
        if self.given_classes is not None:
            return self.given_classes
        return 0 if self.fields.label is None else len(self.counts)

    @property
    def num_samples(self) -> int:
        """Of all training shards."""
        return int(self.counts.sum()) if self.given_samples is None else self.given_samples

    @property
    def skipped(self) -> int:
        """Corrupt samples and shards skipped by this process and its workers so far, each counted once."""
        return len(self._skipped)

    @cached_property
    def form(self) -> PixelForm | LatentForm:
        """What all samples are made to be, by the first one, whose label and caption are looked at, too."""
        faults = self._faults()
        for sample in pipeline(self.urls, faults, of_worker):
            try:
                self.fields.check(sample)
                if not self.is_latent:
                    return PixelForm.of_image(*self.fields.image(sample), self.size, self.channels)
                return LatentForm.of(*self.fields.array(sample), self.holds, self.scale or 0.0, self.shift)
            except ValueError as error:
                faults(error)
        raise ValueError(f"no sample that can be used in {named(self.urls)}")

    @cached_property
    def counts(self) -> np.ndarray:
        """Samples of each label, `(classes,)`; of samples without labels their number, `(1,)`."""
        found = count_labels(self.urls, self.fields, self._faults())
        classes = len(found) if self.fields.label is not None else self.given_classes or 0
        if self.given_samples not in (None, found.sum()) and self.corrupt == "raise":  # else some may be skipped
            raise ValueError(
                f"num_samples {self.given_samples}: {named(self.urls)} have {found.sum()}; give that, or leave it out"
            )
        log.info(
            "%d shards read once: num_samples: %d, num_classes: %d; give both to begin at once",
            len(self.urls), found.sum(), classes,
        )  # fmt: skip
        return found

    def _faults(self) -> Faults:
        return Faults(self.corrupt, self._skipped)

    def teardown(self, stage: str) -> None:
        if self.skipped:
            log.warning("%d corrupt samples or shards were skipped", self.skipped)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of training and validation shards their number, and a digest of names and, of local ones, sizes in bytes."""
        held_out = self.val_urls or []
        return {
            "train": {"shards": len(self.urls), "names_and_sizes": self._contents},
            "val": {"shards": len(held_out), "names_and_sizes": self._names_and_sizes(held_out)},
        }

    @cached_property
    def _contents(self) -> str:
        """What tells the training shards: as they were when the training began."""
        return self._names_and_sizes(self.urls)

    @staticmethod
    def _names_and_sizes(urls: list[str]) -> str:
        paths = [local_path(url) for url in urls]
        sizes = [None if path is None else path.stat().st_size for path in paths]
        names = [url.rsplit("/", 1)[-1] for url in urls]
        return digest_of([*zip(names, sizes, strict=True)])

    # -- batches -------------------------------------------------------------------------------------------------------

    def reader(self, mirror: bool = False) -> SampleReader:
        """What reads samples; what is asked of the shards first is asked here, and not in each worker."""
        return SampleReader(replace(self.fields, num_classes=self.num_classes), self.form, mirror)

    def epochs(self, rank: int = 0, world_size: int = 1, workers: int = 0) -> Epochs:
        """How a rank's training batches are made.

        Raises:
            ValueError: for fewer shards than ranks, unless resampled; for fewer samples than a batch for each rank.
        """
        if len(self.urls) < world_size and not self.resampled:
            raise ValueError(
                f"{len(self.urls)} shards for {world_size} ranks: set resampled: true, which draws shards for each "
                "rank, or make more shards"
            )
        # of shards that are drawn, each rank takes as many samples as there are: else it would end within its first one
        batches = self.num_samples // (self.batch_size * (1 if self.resampled else world_size))
        if not batches and not self.resampled:
            raise ValueError(
                f"{self.num_samples} samples are not one batch of {self.batch_size} for each of {world_size} ranks: "
                "lower batch_size, or set resampled: true"
            )
        return Epochs(
            self.urls, self.reader(self.mirror), self._faults(), self.batch_size, max(1, batches),
            self.shuffle_buffer, Rank(rank, world_size), self.resampled, self.seed,
        )  # fmt: skip

    def workers(self, world_size: int) -> int:
        """Processes of each rank: at most as many as it has shards."""
        fewest = len(self.urls) if self.resampled else len(self.urls) // world_size
        if self.num_workers > fewest:
            log.info(
                "%d shards for %d ranks: %d workers each, not %d", len(self.urls), world_size, fewest, self.num_workers
            )
        return min(self.num_workers, fewest)

    def loader(
        self,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        length: int = 1,
        where: Callable[[], int] | None = None,
    ) -> WebStream:
        """Training batches start..length-1 of a rank."""
        epochs = self.epochs(rank, world_size, workers := self.workers(world_size))
        return WebStream(epochs, workers, length, start, where)

    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit"):
            _ = self._contents  # now, and not with the first checkpoint, when shards may be gone

    def train_dataloader(self) -> WebStream:
        start, length = self.steps()
        return self.loader(*self.rank(), start, length, self.position)

    def val_dataloader(self) -> HeldOutLoader | list:
        return [] if self.val_urls is None else self.held_out(*self.rank())

    def held_out(self, rank: int = 0, world_size: int = 1) -> HeldOutLoader:
        """Validation batches of a rank."""
        urls, workers = self.val_urls or [], min(self.num_workers, len(self.val_urls or []))
        ours = Rank(rank, world_size)
        return HeldOutLoader(
            Epochs(urls, self.reader(), self._faults(), self.batch_size, 1, 1, ours, False, 0), workers
        )

    def test_dataloader(self) -> HeldOutLoader | list:
        return self.val_dataloader()

    def predict_dataloader(self) -> HeldOutLoader | list:
        return self.val_dataloader()

    def train_batch(self, step: int) -> Batch:
        """The training batch of a step, read by this process: at once where it is asked for after the one before it,
        else its epoch is begun anew, as in a resumed run."""
        ours = Rank(*self.rank())
        if self._stream is None or self._stream.epochs.rank != ours:
            self._stream, self._walk = WebStream(self.epochs(ours.number, ours.count), 0, 2**62), None
        if self._walk is None or self._walk[0] != step:
            self._walk = step, self._stream.batches(step, self._stream.length)
        batch = next(self._walk[1])
        self._walk = step + 1, self._walk[1]
        return batch

    @property
    def latents(self) -> dict[str, Any]:
        """How stored latents become states, where these are latents."""
        return {"scale": self.scale, "shift": self.shift} if self.is_latent else {}

    def label_counts(self) -> dict[str, np.ndarray]:
        if self.fields.label is None or (self.given_classes is not None and self.given_samples is not None):
            return {}
        return {"train": counted(np.repeat(np.arange(len(self.counts)), self.counts), self.num_classes)}

    def decode(self, x: Tensor) -> Tensor:
        """States to images in [0, 1]; latents by the decoder, as they are without one."""
        if not self.is_latent:
            return to_images(x)
        return decoded(x, self.decoder)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the order of batches depends on, to say so where a resumed run has another one."""
        return {
            "shards": len(self.urls), "samples": self.num_samples, "seed": self.seed, "batch_size": self.batch_size,
            "num_workers": self.num_workers, "shuffle_buffer": self.shuffle_buffer, "mirror": self.mirror,
            "resampled": self.resampled, "world_size": self.rank()[1], "contents": self._contents,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ours = self.state_dict()
        check_same_data(state_dict, ours, self.trains)
        say_changed_order(state_dict, ours)
