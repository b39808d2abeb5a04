"""Images as the latents of a VAE, encoded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mfm_lightning.conditions import Batch
from mfm_lightning.data.images.datamodule import ImageDataModule, Splits
from mfm_lightning.data.images.reading import SplitReader
from mfm_lightning.data.images.source import LabelledImages
from mfm_lightning.data.skipped import Corrupt
from mfm_lightning.networks.decoders import VAEDecoder
from mfm_lightning.networks.vae import VAE, LatentSpace, load_vae, moments
from mfm_lightning.utils.console import track

log = logging.getLogger(__name__)


class EncodedImages(ImageDataModule):
    """The images of an `ImageDataModule` as latents of a VAE: its means, with its own shift and scale. All of them are
    encoded once, when they are first needed, and held in memory; for more than fits there, `mfm prepare-latents` writes
    shards.

    Args:
        source: as `ImageDataModule`, as are `batch_size`, `size`, `classes`, `val_source`, `test_source`,
            `val_fraction`, `test_fraction`, `memory` (of the images' pixels), `seed` and `corrupt`; images are in
            colour.
        vae: folder of diffusers' AutoencoderKL, or a Hugging Face id.
        encode_batch: images that the VAE takes at once.
        allow_download: fetch the VAE where it is not there.

    Raises:
        FileNotFoundError, CheckpointError: when used, as `load_vae`.
        ValueError: as `ImageDataModule`; for images that do not fit in `memory`.
    """

    def __init__(
        self,
        source: str | LabelledImages,
        vae: str,
        batch_size: int = 256,
        size: int | None = None,
        classes: list[int | str] | None = None,
        val_source: str | LabelledImages | None = None,
        test_source: str | LabelledImages | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        memory: float = 2000.0,
        seed: int = 0,
        encode_batch: int = 256,
        allow_download: bool = False,
        corrupt: Corrupt = "raise",
    ) -> None:
        super().__init__(
            source, batch_size, size, 3, False, classes, val_source, test_source, val_fraction, test_fraction, memory,
            0, seed, corrupt,
        )  # fmt: skip
        self.vae, self.encode_batch, self.allow_download = vae, encode_batch, allow_download
        self._decoder = VAEDecoder(vae, allow_download=allow_download, max_rows=encode_batch)
        self._encoded: dict[str, EncodedReader] = {}

    @cached_property
    def _loaded(self) -> VAE:
        return load_vae(self.vae, self.allow_download)

    @property
    def state_shape(self) -> tuple[int, ...]:
        space = LatentSpace.of(self._loaded)
        return space.channels, self.form.size // space.factor, self.form.size // space.factor

    def reader(self, name: str) -> EncodedReader:
        if not self.in_memory:
            raise ValueError(
                f"the images take {self.megabytes:.0f} MB decoded, more than memory: {self.memory:g}; give more, or "
                "make shards of latents by mfm prepare-latents"
            )
        if name not in self._encoded:
            self._encoded[name] = EncodedReader.of(super().reader(name), self._loaded, self.encode_batch, name)
        return self._encoded[name]

    @property
    def splits(self) -> Splits:
        """`(latents, label)` by "train", "val" and "test"; `reader` says so where they do not fit in memory."""
        return Splits(self)

    def decode(self, x: Tensor) -> Tensor:
        """States to images in [0, 1], by the VAE."""
        with torch.no_grad():
            return self._decoder(x)


class EncodedReader(SplitReader):
    """A split whose states are latents."""

    def __init__(self, reader: SplitReader, latents: Tensor) -> None:
        super().__init__(reader.split, reader.form, reader.skipped, reader.name)
        self.kept, self.taken, self.latents = reader.kept, reader.taken, latents

    @classmethod
    def of(cls, reader: SplitReader, vae: VAE, batch_size: int, name: str) -> EncodedReader:
        """Encode a split."""
        space, parts = LatentSpace.of(vae), []
        starts: Sequence[int] = range(0, len(reader.split), batch_size)
        for k in track(starts, lambda _: f"encoding {name} images"):
            x, _ = reader.states(np.arange(k, min(k + batch_size, len(reader.split))))
            with torch.no_grad():
                parts.append(space.states(moments(vae, x)[0]))
        return cls(reader, torch.cat(parts))

    def states(self, index: np.ndarray) -> Batch:
        return self.latents[torch.from_numpy(index)], self.given(self.taken[index])

    def all_states(self) -> Tensor:
        return self.latents
