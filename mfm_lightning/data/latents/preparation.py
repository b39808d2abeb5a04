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
from typing import Any, TypeVar, cast

import numpy as np
import torch

from mfm_lightning.backbones import TextToImageFlow, load_flow
from mfm_lightning.data.latents.captions import CaptionEncoder
from mfm_lightning.data.latents.image_sources import ImageSource, InputError, RawImage, find_source
from mfm_lightning.data.latents.index import LatentIndex, Layout, Shard
from mfm_lightning.data.latents.moments import MomentEncoder
from mfm_lightning.data.latents.shard_writer import (
    PARTS,
    LatentSample,
    finished,
    shards_of,
    unit_path,
    write_index_files,
    write_json,
    write_shard,
)
from mfm_lightning.networks.vae import VAE
from mfm_lightning.utils.atomic import check_is_folder
from mfm_lightning.utils.console import track
from mfm_lightning.utils.decoding import ImageError
from mfm_lightning.utils.devices import find_device
from mfm_rewards.execution import DTYPES, Precision, check_precision

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
        vae: a folder that `AutoencoderKL.from_pretrained` reads, or a Hugging Face id; SD's where None, with a flow its
            own.
        image_size: images are cropped to it; 256 where None, with a flow its own.
        shard_size: samples of a shard.
        batch_size: images encoded at once.
        threads: that decode images, in each process.
        precision: of VAE and text encoders, "fp32", "bf16" or "fp16".
        device: "auto", "cpu", "cuda", or "cuda:1"; "auto" and "cuda" share GPUs out to the processes of a machine.
        seed: of the order in which a folder's images are dealt to shards.
        class_index: file of labels by class name (folder); numbers of the order of names where None.
        skip_broken: leave out images that cannot be decoded, and list them in the index.
        allow_pipe: run the commands of `pipe:` URLs.
        allow_download: fetch VAE and text encoders where they are not there.
        flow: a text-to-image flow for which latents are, a folder of diffusers or a Hugging Face id.
        captions: as `find_source`; their embeddings by the flow are kept, too.
        embeddings: floating type in which these are kept.
        max_sequence_length: tokens of a caption, as `load_flow`.
        revision: of the flow's repository.
    """

    inputs: tuple[str, ...]
    output: str
    vae: str | None = None
    image_size: int | None = None
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
    flow: str | None = None
    captions: str | None = None
    embeddings: Precision = "bf16"
    max_sequence_length: int | None = None
    revision: str | None = None

    def source(self) -> ImageSource:
        """The input; errors as `find_source`."""
        if min(self.shard_size, self.batch_size, self.threads) < 1:
            raise ValueError(
                f"shard size {self.shard_size}, batch size {self.batch_size} and threads {self.threads} must be at "
                "least 1"
            )
        names = None if self.class_index is None else Path(self.class_index)
        return find_source(
            self.inputs, self.shard_size, self.seed, names, self.allow_pipe, self.captions, self.allow_download
        )

    def tools(self, local_rank: int = 0) -> Tools:
        """What images and captions are encoded by, on this process's device.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `load_flow` and `MomentEncoder`; for captions without a flow.
        """
        check_precision(self.precision)
        check_precision(self.embeddings)
        device = find_device(self.device, local_rank)
        if self.flow is None:
            if (self.captions, self.max_sequence_length, self.revision) != (None, None, None):
                raise ValueError("captions are embedded by a flow's text encoders: give --flow, a text-to-image flow")
            path = self.vae or "stabilityai/sd-vae-ft-mse"
            encoder = MomentEncoder(path, device, self.precision, self.allow_download)
            return Tools(encoder, self.image_size or 256)
        flow = load_flow(
            self.flow,
            self.image_size,
            torch.float32,
            encoder_dtype=DTYPES[self.precision],
            vae=self.vae,
            encoder_device=str(device),
            max_sequence_length=self.max_sequence_length,
            allow_download=self.allow_download,
            revision=self.revision,
            transformer=False,
        )
        height, width = flow.image_size
        if height != width:
            raise ValueError(f"{self.flow} has images of {height} x {width}: give --image-size, for square ones")
        encoder = MomentEncoder(cast(VAE, flow.decoder.vae), device, self.precision)
        texts = None
        if self.captions is not None:
            texts = CaptionEncoder(flow, self.embeddings, Path(self.output))
        return Tools(encoder, height, flow, texts)


@dataclass(frozen=True)
class Tools:
    """What a process encodes by.

    Args:
        encoder: of images.
        image_size: they are cropped to.
        flow: that they are for.
        texts: of captions.
    """

    encoder: MomentEncoder
    image_size: int
    flow: TextToImageFlow | None = None
    texts: CaptionEncoder | None = None

    @property
    def layout(self) -> Layout:
        """Of shards; it embeds the empty prompt where that is not there yet."""
        return Layout(self.encoder.state_shape(self.image_size), None if self.texts is None else self.texts.form)


def check(job: Preparation, source: ImageSource, tools: Tools) -> dict[str, Any]:
    """Write down what is being made, or compare with what was begun here.

    Returns:
        the settings that decide what the shards hold.

    Raises:
        NotADirectoryError: if the output is a file.
        ValueError: if the folder has shards of another preparation, the input was replaced since, or the image size
            does not fit the VAE.
    """
    state_shape = tools.encoder.state_shape(tools.image_size)
    settings = {
        "input": source.identity, "vae": tools.encoder.identity, "image_size": tools.image_size,
        "state_shape": list(state_shape), "shard_size": job.shard_size, "batch_size": job.batch_size,
        "precision": job.precision, "skip_broken": job.skip_broken,
    }  # fmt: skip
    if tools.flow is not None:
        settings |= {f"flow's {name}": value for name, value in tools.flow.parts.items()}
    if job.captions is not None:
        settings |= {"captions": job.captions, "embeddings": job.embeddings}
    begin(job.output, settings, ", ".join(job.inputs))
    return settings


def begin(output: str, settings: dict[str, Any], inputs: str) -> None:
    """Write down with which settings a folder is made, or compare with those that it was begun with.

    Args:
        settings: what its shards depend on, as JSON; "input" is a dictionary of them.
        inputs: where samples are from, for messages.

    Raises:
        NotADirectoryError: if the folder is a file.
        ValueError: if it has shards of another preparation, or the input was replaced since.
    """
    check_is_folder(output)
    path = Path(output) / PREPARATION
    if path.is_file():
        begun, now = _flat(json.loads(path.read_text())), _flat(settings)
        other = [key for key in {**begun, **now} if begun.get(key) != now.get(key)]
        if other == ["contents"] and "contents" not in begun:
            log.warning("%s was begun by an older version, which did not note sizes and times of its input", output)
        elif other == ["contents"]:
            raise ValueError(
                f"{output} was begun with other files of the same names (sizes or times of change in {inputs} are "
                "others): give another folder"
            )
        elif other:
            was = "; ".join(f"{key} was {begun.get(key)}, is {now.get(key)}" for key in other)
            raise ValueError(f"{output} has a preparation with other settings ({was}): give another folder")
    elif list(Path(output).glob("*.tar")):
        raise ValueError(f"{output} has tars, but no {PREPARATION}: give an empty folder")
    else:
        write_json(path, settings)


def report(job: Preparation, source: ImageSource) -> None:
    """Say what was found, and what is left out, before work begins."""
    log.info("%s: %s", ", ".join(job.inputs), source.found)
    source.left_out.report(", ".join(job.inputs))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The input's beside the others."""
    return {**settings.get("input", {}), **{key: value for key, value in settings.items() if key != "input"}}


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
    source, tools = job.source(), job.tools(local_rank)
    if show and rank == 0:
        report(job, source)
    passed = sum(source.left_out.counts.values())
    check(job, source, tools)
    layout = tools.layout
    if show and rank == 0 and tools.texts is not None:
        log.info("%s", tools.texts.line(layout.stride))
    folder = Path(job.output)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    mine = [unit for unit in range(source.units) if unit % world_size == rank]
    missing = [unit for unit in mine if shards_of(folder, unit) is None]
    threads = ThreadPoolExecutor(job.threads)
    try:
        for unit in track(missing, describe=lambda unit: f"encoding {unit} of {source.units}") if show else missing:
            _make_unit(job, source, tools, unit, threads, lambda: _stop_with(parent, rank))
    finally:
        threads.shutdown(cancel_futures=True)  # what is decoded ahead would make a stop wait
    if sum(source.left_out.counts.values()) > passed:  # files in tars, which only reading finds
        source.left_out.report(", ".join(job.inputs))
    return write_index(job, source, tools)


def write_index(job: Preparation, source: ImageSource, tools: Tools) -> bool:
    """The index and the classes, if all shards are there; whichever process is last writes them, others the same again.

    Raises:
        InputError: if no sample is left.
    """
    folder = Path(job.output)
    units = [shards_of(folder, unit) for unit in range(source.units)]
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
    encoder, flow = tools.encoder, None
    made_with = {
        "vae": job.vae or job.flow or "stabilityai/sd-vae-ft-mse", "image_size": tools.image_size,
        **{k: v for k, v in asdict(job).items() if k in ("precision", "shard_size", "seed")},
        "vae_sha256": encoder.identity,
    }  # fmt: skip
    if tools.flow is not None:
        flow = {"name": job.flow, "revision": job.revision, **tools.flow.parts}
    layout = tools.layout
    index = LatentIndex(
        layout.state_shape, len(classes), encoder.space.scale, shards, made_with, broken, encoder.space.shift,
        layout.text, flow,
    )  # fmt: skip
    write_index_files(folder, index, classes)
    if broken:
        log.warning("%d images could not be decoded and are left out: %s", len(broken), ", ".join(broken[:5]))
    if tools.flow is not None and (cut := sum(part.get("cut", 0) for part in found)):
        log.warning(
            "%d of %d captions have more than %d tokens: their ends are left out (--max-sequence-length)",
            cut, index.samples, tools.flow.max_sequence_length,
        )  # fmt: skip
    return True


def _make_unit(
    job: Preparation,
    source: ImageSource,
    tools: Tools,
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
            cut: list[str] = []
            samples = _encoded(job, tools, chunk, threads, broken, cut, between)
            try:
                write_shard(folder, name, samples, broken, tools.layout.text, cut)
            except FileNotFoundError:  # a run beside this one was quicker, and has cleared what it took for left over
                if finished(folder, name) is None:
                    raise
                deque(chunk, maxlen=0)
        else:
            deque(chunk, maxlen=0)  # past what is there
        names.append(name)
    write_json(unit_path(folder, unit), names)


def _encoded(
    job: Preparation,
    tools: Tools,
    images: Iterable[RawImage],
    threads: ThreadPoolExecutor,
    broken: list[str],
    cut: list[str],
    between: Callable[[], None],
) -> Iterator[LatentSample]:
    """Images decoded ahead by the threads and encoded in batches, with their captions."""

    def decode(raw: RawImage) -> tuple[RawImage, np.ndarray | None]:
        try:
            return raw, raw.open(tools.image_size)
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
            moments = tools.encoder(np.stack([pixels for _, pixels in whole]))
            for (raw, _), found in zip(whole, moments, strict=True):
                text, is_cut = (None, False) if tools.texts is None else tools.texts(raw.caption)
                cut += [raw.key] if is_cut else []
                yield LatentSample(raw.key, raw.label, found, text)


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
