"""Images to shards of VAE moments, by any number of processes that share a folder and nothing else.

Which image goes into which shard follows from the input alone, and each shard is there whole or not at all. So a
preparation that was killed is run again: it makes what is missing, and all is as if it had not been stopped.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mfm_lightning.data.latents.image_sources import ImageSource, InputError, RawImage, find_source
from mfm_lightning.data.latents.index import CLASSES, INDEX, LatentIndex, Shard
from mfm_lightning.data.latents.moments import MomentEncoder
from mfm_lightning.data.latents.shard_writer import PARTS, finished, write_json, write_shard, write_text
from mfm_lightning.utils.atomic import check_is_folder, clear_partials
from mfm_lightning.utils.console import track
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.devices import find_device
from mfm_rewards.execution import Precision

log = logging.getLogger(__name__)
PREPARATION = "preparation.json"
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Preparation:
    """What is to be made.

    Args:
        inputs: a folder of class folders, a folder of tars, or URLs of WebDataset shards.
        output: folder of the shards.
        vae: a folder that `AutoencoderKL.from_pretrained` reads, or a Hugging Face id.
        image_size: images are cropped to it.
        shard_size: samples of a shard.
        batch_size: images encoded at once.
        threads: that decode images, in each process.
        precision: "fp32", "bf16" or "fp16".
        device: "auto", "cpu", "cuda", or "cuda:1"; "auto" and "cuda" share GPUs out to the processes of a machine.
        seed: of the order in which a folder's images are dealt to shards.
        class_index: file of labels by class name (folder); numbers of the order of names where None.
        skip_broken: leave out images that cannot be decoded, and list them in the index.
        allow_pipe: run the commands of `pipe:` URLs.
        allow_download: fetch the VAE where it is not there.
    """

    inputs: tuple[str, ...]
    output: str
    vae: str = "stabilityai/sd-vae-ft-mse"
    image_size: int = 256
    shard_size: int = 1000
    batch_size: int = 32
    threads: int = 4
    precision: Precision = "fp32"
    device: str = "auto"
    seed: int = 0
    class_index: str | None = None
    skip_broken: bool = False
    allow_pipe: bool = False
    allow_download: bool = False

    def source(self) -> ImageSource:
        """The input; errors as `find_source`."""
        if min(self.shard_size, self.batch_size, self.threads) < 1:
            raise ValueError(
                f"shard size {self.shard_size}, batch size {self.batch_size} and threads {self.threads} must be at "
                "least 1"
            )
        names = None if self.class_index is None else Path(self.class_index)
        return find_source(self.inputs, self.shard_size, self.seed, names, self.allow_pipe)

    def encoder(self, local_rank: int = 0) -> MomentEncoder:
        """The VAE on this process's device."""
        device = find_device(self.device, local_rank)
        return MomentEncoder(self.vae, device, self.precision, self.allow_download)


def check(job: Preparation, source: ImageSource, encoder: MomentEncoder) -> dict[str, Any]:
    """Write down what is being made, or compare with what was begun here.

    Returns:
        the settings that decide what the shards hold.

    Raises:
        NotADirectoryError: if the output is a file.
        ValueError: if the folder has shards of another preparation, the input was replaced since, or the image size
            does not fit the VAE.
    """
    check_is_folder(job.output)
    state_shape = encoder.state_shape(job.image_size)
    settings = {
        "input": source.identity, "vae": encoder.identity, "image_size": job.image_size,
        "state_shape": list(state_shape), "shard_size": job.shard_size, "batch_size": job.batch_size,
        "precision": job.precision, "skip_broken": job.skip_broken,
    }  # fmt: skip
    path = Path(job.output) / PREPARATION
    if path.is_file():
        begun, now = _flat(json.loads(path.read_text())), _flat(settings)
        other = [key for key in {**begun, **now} if begun.get(key) != now.get(key)]
        if other == ["contents"] and "contents" not in begun:
            log.warning("%s was begun by an older version, which did not note sizes and times of its input", job.output)
        elif other == ["contents"]:
            raise ValueError(
                f"{job.output} was begun with other files of the same names (sizes or times of change in "
                f"{', '.join(job.inputs)} are others): give another folder"
            )
        elif other:
            was = "; ".join(f"{key} was {begun.get(key)}, is {now.get(key)}" for key in other)
            raise ValueError(f"{job.output} has a preparation with other settings ({was}): give another folder")
    elif list(Path(job.output).glob("*.tar")):
        raise ValueError(f"{job.output} has tars, but no {PREPARATION}: give an empty folder")
    else:
        write_json(path, settings)
    return settings


def report(job: Preparation, source: ImageSource) -> None:
    """Say what was found, and what is left out, before work begins."""
    log.info("%s: %s", ", ".join(job.inputs), source.found)
    source.left_out.report(", ".join(job.inputs))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The input's beside the others."""
    return {**settings["input"], **{key: value for key, value in settings.items() if key != "input"}}


def prepare(
    job: Preparation,
    rank: int = 0,
    world_size: int = 1,
    local_rank: int = 0,
    show: bool = True,
    parent: int | None = None,
) -> bool:
    """Make this process's shards, and the index if it is the last to finish.

    Args:
        show: a progress bar.
        parent: end when this process, which started this one, is gone.

    Returns:
        whether the index is there.

    Raises:
        FileNotFoundError, ValueError: before any image is encoded, for what cannot be used; ImageError for an image
            that cannot be decoded, unless those are skipped.
        OSError: where the input cannot be read, or the output not be written.
    """
    source, encoder = job.source(), job.encoder(local_rank)
    if show and rank == 0:
        report(job, source)
    passed = sum(source.left_out.counts.values())
    check(job, source, encoder)
    folder = Path(job.output)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    mine = [unit for unit in range(source.units) if unit % world_size == rank]
    missing = [unit for unit in mine if _shards_of(folder, unit) is None]
    threads = ThreadPoolExecutor(job.threads)
    try:
        for unit in track(missing, describe=lambda unit: f"encoding {unit} of {source.units}") if show else missing:
            _make_unit(job, source, encoder, unit, threads, lambda: _stop_with(parent, rank))
    finally:
        threads.shutdown(cancel_futures=True)  # what is decoded ahead would make a stop wait
    if sum(source.left_out.counts.values()) > passed:  # files in tars, which only reading finds
        source.left_out.report(", ".join(job.inputs))
    return write_index(job, source, encoder)


def write_index(job: Preparation, source: ImageSource, encoder: MomentEncoder) -> bool:
    """The index and the classes, if all shards are there; whichever process is last writes them, others the same again.

    Raises:
        InputError: if no sample is left.
    """
    folder = Path(job.output)
    units = [_shards_of(folder, unit) for unit in range(source.units)]
    whole = [parts for parts in units if parts is not None]
    if open_ := len(units) - len(whole):
        log.info("%d of %d pieces of %s are still to be made, by other processes or runs", open_, len(units), folder)
        return False
    found = [part for parts in whole for part in parts]
    shards = [Shard.from_dict(part) for part in found if part["samples"]]
    broken = [key for part in found for key in part["broken"]]
    if not shards:
        raise InputError(f"no image of {', '.join(job.inputs)} could be used")
    classes = source.class_to_idx
    if classes is None:
        classes = {str(label): label for label in range(max(int(s.labels.max()) for s in shards) + 1)}
    made_with = {
        **{k: v for k, v in asdict(job).items() if k in ("vae", "image_size", "precision", "shard_size", "seed")},
        "vae_sha256": encoder.identity,
    }
    state_shape = encoder.state_shape(job.image_size)
    index = LatentIndex(state_shape, len(classes), encoder.scale, shards, made_with, broken)
    write_text(folder / CLASSES, json.dumps(classes, indent=1))
    write_text(folder / INDEX, index.text())
    clear_partials(folder, "latents-*")  # not of the index, which another process may be writing, too
    clear_partials(folder / PARTS)
    if broken:
        log.warning("%d images could not be decoded and are left out: %s", len(broken), ", ".join(broken[:5]))
    return True


def _unit_path(folder: Path, unit: int) -> Path:
    """Says which shards a finished unit has."""
    return folder / PARTS / f"unit-{unit:06d}.json"


def _shards_of(folder: Path, unit: int) -> list[dict[str, Any]] | None:
    """What is known of a unit's shards; None unless all of them are there."""
    path = _unit_path(folder, unit)
    if not path.is_file():
        return None
    found = [finished(folder, name) for name in json.loads(path.read_text())]
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(found) else None


def _make_unit(
    job: Preparation,
    source: ImageSource,
    encoder: MomentEncoder,
    unit: int,
    threads: ThreadPoolExecutor,
    between: Callable[[], None],
) -> None:
    folder, names, images = Path(job.output), [], source.read(unit)
    while (first := next(images, None)) is not None:
        name = f"latents-{unit:06d}.tar" if source.whole_units else f"latents-{unit:06d}-{len(names):03d}.tar"
        chunk = islice(chain([first], images), job.shard_size)
        if finished(folder, name) is None:
            broken: list[str] = []
            try:
                write_shard(folder, name, _encoded(job, encoder, chunk, threads, broken, between), broken)
            except FileNotFoundError:  # a run beside this one was quicker, and has cleared what it took for left over
                if finished(folder, name) is None:
                    raise
                deque(chunk, maxlen=0)
        else:
            deque(chunk, maxlen=0)  # past what is there
        names.append(name)
    write_json(_unit_path(folder, unit), names)


def _encoded(
    job: Preparation,
    encoder: MomentEncoder,
    images: Iterable[RawImage],
    threads: ThreadPoolExecutor,
    broken: list[str],
    between: Callable[[], None],
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Key, label and moments of each image, decoded ahead by the threads and encoded in batches."""

    def decode(raw: RawImage) -> tuple[RawImage, np.ndarray | None]:
        try:
            return raw, raw.open(job.image_size)
        except ImageError as error:
            if not job.skip_broken:
                raise ImageError(f"{error}; --skip-broken leaves such images out") from error
            return raw, None

    decoded = _map_ahead(threads, decode, images, ahead=4 * job.batch_size)
    while batch := list(islice(decoded, job.batch_size)):
        between()
        broken += [raw.key for raw, pixels in batch if pixels is None]
        whole = [(raw, pixels) for raw, pixels in batch if pixels is not None]
        if whole:
            moments = encoder(np.stack([pixels for _, pixels in whole]))
            yield from ((raw.key, raw.label, m) for (raw, _), m in zip(whole, moments, strict=True))


def _map_ahead(threads: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """`map` in order, with at most `ahead` items under way: the executor's own would take all of them at once."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(threads.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _stop_with(parent: int | None, rank: int) -> None:
    """End a process whose parent was killed, so that it does not go on beside the next run."""
    if parent is not None and os.getppid() != parent:
        raise SystemExit(f"process {rank}: the one that started it is gone")
