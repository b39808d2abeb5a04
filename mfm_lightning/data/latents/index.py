"""What a folder of latent shards holds: its index, and the layout of a shard.

A shard is a tar that webdataset reads: of each sample `KEY.cls` (the label in ASCII) and `KEY.npy`, float16
`(2, 2, C, H, W)`: [of the image, of its mirror image] x [mean, standard deviation] of the VAE's posterior; of captioned
ones also `KEY.safetensors`, the caption's embedding, and `KEY.txt`, the caption. All samples of a folder have the same
size, so that in a shard sample i begins at byte i * stride.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mfm_lightning.backbones.embeddings import Embedding
from mfm_lightning.data.latents.text_form import TextForm, as_rows
from mfm_lightning.data.latents.urls import check_url, join, local_path, open_url

log = logging.getLogger(__name__)
INDEX, CLASSES, NULL = "index.json", "classes.json", "null.safetensors"
VERSION, WITH_MORE = (
    1,
    2,
)  # of the index; the latter where there is a shift, or captions, which older readers do not know
_BLOCK = 512  # of a tar: headers and contents take whole ones
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # no folder, no URL: an index cannot point outside


class LatentIndexError(ValueError):
    """An index that cannot be read, or does not fit its shards."""


@dataclass(frozen=True)
class Layout:
    """Where things are in a sample's bytes.

    Args:
        state_shape: `(C, H, W)` of a latent.
        text: of captions and their embeddings, where there are any.
    """

    state_shape: tuple[int, ...]
    text: TextForm | None = None

    @property
    def moments_shape(self) -> tuple[int, ...]:
        return (2, 2, *self.state_shape)

    @property
    def npy_header(self) -> bytes:
        stream = io.BytesIO()
        header = {"descr": "<f2", "fortran_order": False, "shape": self.moments_shape}
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.getvalue()

    @property
    def label_at(self) -> int:
        return _BLOCK

    @property
    def npy_at(self) -> int:
        return 3 * _BLOCK

    @property
    def moments_at(self) -> int:
        return self.npy_at + len(self.npy_header)

    @property
    def moments_bytes(self) -> int:
        return 2 * prod(self.moments_shape)

    @property
    def _npy_end(self) -> int:
        return self.npy_at + _whole(len(self.npy_header) + self.moments_bytes)

    @property
    def embedding_at(self) -> int:
        """Of a caption's embedding, where there is one."""
        return self._npy_end + _BLOCK

    @property
    def caption_at(self) -> int:
        """Of a caption, where there is one."""
        return self.embedding_at + _whole(self.text.file_bytes if self.text else 0) + _BLOCK

    @property
    def header_at(self) -> tuple[int, ...]:
        """Of the tar headers."""
        more = () if self.text is None else (self.embedding_at - _BLOCK, self.caption_at - _BLOCK)
        return 0, 2 * _BLOCK, *more

    @property
    def stride(self) -> int:
        """Bytes of a sample in its shard."""
        return self._npy_end if self.text is None else self.caption_at + _whole(self.text.caption_bytes)


def _whole(content: int) -> int:
    """Bytes that a content takes in a tar."""
    return -(-content // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, size, sha256 and the labels of its samples in order, `(samples,)` int64."""

    name: str
    bytes: int
    sha256: str
    labels: np.ndarray

    @property
    def samples(self) -> int:
        return len(self.labels)

    def as_dict(self) -> dict[str, Any]:
        labels = self.labels.tolist()
        return {
            "name": self.name, "samples": self.samples, "bytes": self.bytes, "sha256": self.sha256, "labels": labels,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Shard:
        labels = np.asarray(found["labels"], dtype=np.int64)
        if not _NAME.fullmatch(found["name"]):
            raise LatentIndexError(f"shard name {found['name']!r} is no plain file name")
        if len(labels) != found["samples"] or labels.ndim != 1:
            raise LatentIndexError(f"{found['name']} has {found['samples']} samples, but {len(labels)} labels")
        return cls(found["name"], int(found["bytes"]), found["sha256"], labels)


@dataclass
class LatentIndex:
    """All shards of a folder, and what they were made with.

    Args:
        state_shape: `(C, H, W)` of a latent.
        num_classes: labels are below it.
        scale: the VAE's factor of latents (0.18215 for SD's).
        shards: in the order of their names.
        made_with: image size, VAE and so on.
        broken: keys of the input that were left out, for they could not be read.
        shift: the VAE's shift of latents (0 for SD's): a state is (z - shift) scale.
        captions: form of captions and their embeddings, where there are any.
        flow: that they are for, where a flow was given: its name, revision, and `TextToImageFlow.parts`.
    """

    state_shape: tuple[int, ...]
    num_classes: int
    scale: float
    shards: Sequence[Shard]
    made_with: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    shift: float = 0.0
    captions: TextForm | None = None
    flow: dict[str, Any] | None = None

    @property
    def layout(self) -> Layout:
        return Layout(self.state_shape, self.captions)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def text(self) -> str:
        """As JSON, one line a shard."""
        more = {} if self.flow is None else {"flow": self.flow}
        more |= {} if self.captions is None else {"captions": self.captions.as_dict()}
        more |= {"shift": self.shift} if self.shift else {}
        version = WITH_MORE if self.captions or self.shift else VERSION
        head = {
            "format": "mfm-latents", "version": version, "state_shape": list(self.state_shape),
            "num_classes": self.num_classes, "samples": self.samples, "scale": self.scale,
            "made_with": self.made_with, "broken": self.broken, **more,
        }  # fmt: skip
        shards = ",\n".join(json.dumps(shard.as_dict(), separators=(",", ":")) for shard in self.shards)
        return f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{shards}\n]}}\n'

    @classmethod
    def load(cls, folder: str | Path, allow_pipe: bool = False) -> LatentIndex:
        """The index of a folder, local or a URL.

        Raises:
            FileNotFoundError: if there is none.
            LatentIndexError: if it cannot be read, has no shards, labels outside its classes, or a scale that is no
                number above 0.
        """
        url = join(str(folder), INDEX)
        path = local_path(url)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"no {INDEX} in {folder}: prepare the shards with mfm prepare-latents")
        check_url(url, allow_pipe)
        try:
            with open_url(url, allow_pipe) as stream:
                found = json.loads(stream.read())
            if found["format"] != "mfm-latents" or found["version"] not in (VERSION, WITH_MORE):
                raise LatentIndexError(
                    f"format {found['format']} {found['version']}, not mfm-latents {VERSION} or {WITH_MORE}"
                )
            _check_head(found)
            shards = [Shard.from_dict(shard) for shard in found["shards"]]
            if len({shard.name for shard in shards}) < len(shards):
                raise LatentIndexError("a shard is listed twice")
            if (
                shards
                and (stated := found.get("samples")) is not None
                and stated != sum(shard.samples for shard in shards)
            ):
                raise LatentIndexError(f"samples {stated}, and its shards have {sum(s.samples for s in shards)}")
            index = cls(
                tuple(found["state_shape"]), found["num_classes"], found["scale"], shards, found["made_with"],
                found["broken"], float(found.get("shift", 0.0)),
                TextForm.from_dict(found["captions"]) if "captions" in found else None, found.get("flow"),
            )  # fmt: skip
        except OSError as error:
            raise FileNotFoundError(f"{url} cannot be read: {error}") from error
        except LatentIndexError as error:
            raise LatentIndexError(f"{url}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:  # also bad JSON
            raise LatentIndexError(f"{url} is no index of latent shards: {type(error).__name__}: {error}") from error
        if not index.samples:
            raise LatentIndexError(f"{url} lists no shards with samples: prepare them with mfm prepare-latents")
        index.check_labels(index.num_classes)
        return index

    def check_labels(self, num_classes: int) -> None:
        """Raise LatentIndexError, naming a shard, unless all labels are in 0..num_classes-1."""
        for shard in self.shards:
            if shard.samples and (shard.labels.min() < 0 or shard.labels.max() >= num_classes):
                raise LatentIndexError(
                    f"labels {shard.labels.min()}..{shard.labels.max()} in {shard.name}, outside "
                    f"0..{num_classes - 1} of {num_classes} classes"
                )


def read_null(folder: str | Path, allow_pipe: bool = False) -> Embedding:
    """The empty prompt's embedding, of a folder with captions, as rows of one.

    Raises:
        FileNotFoundError: if it is not there.
        LatentIndexError: if it is something else.
    """
    url = join(str(folder), NULL)
    path = local_path(url)
    if path is not None and not path.is_file():
        raise FileNotFoundError(
            f"no {NULL} in {folder}: run its mfm prepare-latents again, which makes what is missing"
        )
    try:
        with open_url(url, allow_pipe) as stream:
            return as_rows(stream.read())
    except Exception as error:  # safetensors has an error of its own
        raise LatentIndexError(f"{url} is no file of the empty prompt's embedding: {error}") from error


def read_classes(folder: str | Path, allow_pipe: bool = False) -> dict[str, int] | None:
    """Labels by class name, of a folder's classes.json; None where there is none, or names are only numbers.

    Raises:
        LatentIndexError: if it is something else.
    """
    url = join(str(folder), CLASSES)
    path = local_path(url)
    if path is not None and not path.is_file():
        return None
    try:
        with open_url(url, allow_pipe) as stream:
            found = json.loads(stream.read().decode("utf-8-sig"))
        labels = {str(name): int(label) for name, label in found.items()}
    except OSError as error:
        if path is not None:
            raise
        log.info("%s cannot be read (%s): names of classes are not compared", url, error)
        return None
    except (AttributeError, TypeError, ValueError) as error:
        raise LatentIndexError(f"{url} is no JSON of labels by class name: {error}") from error
    return None if all(name == str(label) for name, label in labels.items()) else labels


def _check_head(found: dict[str, Any]) -> None:
    """Raise LatentIndexError for a scale, a shape or a number of classes that cannot be."""
    scale, shape, classes = found["scale"], found["state_shape"], found["num_classes"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (0 < scale < float("inf")):
        raise LatentIndexError(f"scale {scale}, expected the VAE's factor, a number above 0")
    if not isinstance(shape, list) or len(shape) != 3 or not all(_is_count(n) for n in shape):
        raise LatentIndexError(f"state_shape {shape}, expected [C, H, W]")
    if not _is_count(classes):
        raise LatentIndexError(f"num_classes {classes}, expected a number from 1 on")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
