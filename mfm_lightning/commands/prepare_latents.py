"""`mfm prepare-latents`: images to shards of VAE moments; or verify such shards."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING, Literal

from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.utils.stopping import in_main_thread, stoppable

if TYPE_CHECKING:
    from mfm_lightning.data.latents.preparation import Preparation
    from mfm_lightning.utils.distributed import Process

log = logging.getLogger(__name__)


def prepare_latents(
    *,
    output: str,
    input: list[str] | None = None,
    verify: bool = False,
    vae: str | None = None,
    flow: str | None = None,
    captions: str | None = None,
    image_size: int | None = None,
    shard_size: int = 1000,
    batch_size: int = 32,
    num_workers: int = 1,
    threads: int = 4,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    embeddings: Literal["fp32", "bf16", "fp16"] = "bf16",
    max_sequence_length: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    seed: int = 0,
    class_index: str | None = None,
    skip_broken: bool = False,
    allow_pipe: bool = False,
    allow_download: bool = False,
) -> None:
    """Encode images by a VAE into WebDataset shards of moments, for LatentShards.

    With a text-to-image flow the VAE is the flow's own, and captions are kept with their embeddings. Run again after a
    stop, it goes on. Under torchrun or srun each process makes its share.

    Args:
        output: folder of the shards; with --verify alone also a URL.
        input: a folder of class folders, or WebDataset shards, a folder of tars, paths, https:, s3:, gs:, with {a..b};
            with captions also a folder of images, or of parquet files, or dataset:ID of Hugging Face.
        verify: re-read all shards and compare with the index.
        vae: AutoencoderKL of diffusers, a folder or Hugging Face id; stabilityai/sd-vae-ft-mse if left out. With a
            flow, another VAE for it.
        flow: text-to-image flow that the latents are for, a folder of diffusers or Hugging Face id.
        captions: keep captions and their embeddings by the flow: auto, or where they are: txt, json:KEY, a column, a
            list of files and texts; of class folders a text such as "a photo of a {class}".
        image_size: images are cropped to it; 256 if left out, with a flow its own.
        shard_size: samples of a shard.
        batch_size: images that the VAE encodes at once.
        num_workers: processes here, on its GPUs in turn.
        threads: that decode images, in each process.
        precision: of the VAE and the text encoders.
        embeddings: floating type in which embeddings are kept.
        max_sequence_length: tokens of a caption; the pipeline's own number if left out.
        revision: branch, tag or commit of the flow's repository.
        device: auto, cpu, cuda, cuda:1, ...
        seed: of the order of a folder's images.
        class_index: file of classes by label (JSON, or a name a line); else class folders are in order of names.
        skip_broken: leave out images that cannot be decoded.
        allow_pipe: run the shell commands of pipe URLs.
        allow_download: fetch VAE and text encoders from the Hugging Face hub.

    Raises:
        CommandLineError, FileNotFoundError, ValueError: for input, VAE or settings that cannot be used; a failed
            verification.
    """
    if not input and not verify:
        raise CommandLineError("give --input (a folder of class folders, or WebDataset shards), or --verify")
    from mfm_lightning.data.latents.preparation import Preparation
    from mfm_lightning.data.latents.urls import local_path
    from mfm_lightning.data.latents.verify import verify as verify_shards
    from mfm_lightning.utils.atomic import check_is_folder
    from mfm_lightning.utils.distributed import Process

    if local_path(output) is not None:
        check_is_folder(output)
    process = Process.from_environment()
    done = True
    if input:
        job = Preparation(
            tuple(input), output, vae, image_size, shard_size, batch_size, threads, precision, device, seed,
            class_index, skip_broken, allow_pipe, allow_download, flow, captions, embeddings, max_sequence_length,
            revision,
        )  # fmt: skip
        with stoppable("the same command goes on with what is missing"):
            done = _run(job, num_workers, process)
        if done:
            log.info("%s is complete", job.output)
    if verify and process.rank == 0:
        if done:
            with stoppable("the same command begins anew"):
                verify_shards(output, allow_pipe)
        else:
            log.warning("not verified, for other processes are not done: run --verify --output %s", output)


def _run(job: Preparation, workers: int, process: Process) -> bool:
    from mfm_lightning.data.latents.preparation import check, prepare, report, write_index

    if workers < 1:
        raise ValueError(f"--num_workers {workers} must be at least 1")
    if workers == 1:
        return prepare(job, process.rank, process.world_size, process.local_rank)
    source, tools = job.source(), job.tools(process.local_rank * workers)
    check(job, source, tools)  # errors here, before processes start
    if process.rank == 0:
        report(job, source)
    _spawn(job, workers, process)
    if process.rank == 0 and tools.texts is not None:
        log.info("%s", tools.texts.line(tools.layout.stride))
    return write_index(job, source, tools)  # again, to know whether it is there


def _spawn(job: Preparation, workers: int, process: Process) -> None:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

    # Ctrl-C goes to all processes of a terminal: those do not hear it, and are ended by this one
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread() else None
    try:
        context = spawn(_worker, (job, workers, process), nprocs=workers, join=False)
    finally:
        if heard is not None:
            signal.signal(signal.SIGINT, heard)
    assert context is not None  # as it is with join=False
    try:
        while not context.join():
            pass
    except ProcessRaisedException as error:
        raise ValueError(f"process {error.error_index} failed: {error.msg.strip().splitlines()[-1]}") from error
    except ProcessExitedException as error:
        raise ValueError(f"{error}; run the command again to go on") from error
    finally:
        for child in filter(None, context.processes):
            child.kill()  # no effect on one that has ended; what it was writing is no shard yet


def _worker(i: int, job: Preparation, workers: int, parent: Process) -> None:
    from mfm_lightning.data.latents.preparation import prepare

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rank, world_size, local_rank = (
        parent.rank * workers + i,
        parent.world_size * workers,
        parent.local_rank * workers + i,
    )
    prepare(job, rank, world_size, local_rank, i == 0, os.getppid())
