"""`mfm prepare-latents`: images to shards of VAE moments; or verify such shards."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import fields

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from mfm_lightning.data.latents.preparation import Preparation, check, prepare, write_index
from mfm_lightning.data.latents.verify import verify
from mfm_lightning.utils.distributed import Process

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Entry point of the subcommand.

    Raises:
        FileNotFoundError, ValueError: for input, VAE or settings that cannot be used; a failed verification.
    """
    options = _parser().parse_args(args)
    if not options.input and not options.verify:
        raise ValueError("give --input (a folder of class folders, or WebDataset shards), or --verify")
    process = Process.from_environment()
    done = True
    if options.input:
        known = {field.name for field in fields(Preparation)} - {"inputs"}
        job = Preparation(tuple(options.input), **{k: v for k, v in vars(options).items() if k in known})
        done = _run(job, options.num_workers, process)
        if done:
            log.info("%s is complete", job.output)
    if options.verify and process.rank == 0:
        if done:
            verify(options.output, options.allow_pipe)
        else:
            log.warning("not verified, for other processes are not done: run --verify --output %s", options.output)


def _run(job: Preparation, workers: int, process: Process) -> bool:
    if workers < 1:
        raise ValueError(f"--num-workers {workers} must be at least 1")
    if workers == 1:
        return prepare(job, process.rank, process.world_size, process.local_rank)
    source, encoder = job.source(), job.encoder(process.local_rank * workers)
    check(job, source, encoder)  # errors here, before processes start
    try:
        spawn(_worker, (job, workers, process), nprocs=workers)
    except ProcessRaisedException as error:
        raise ValueError(f"process {error.error_index} failed: {error.msg.strip().splitlines()[-1]}") from error
    except ProcessExitedException as error:
        raise ValueError(f"{error}; run the command again to go on") from error
    return write_index(job, source, encoder)  # again, to know whether it is there


def _worker(i: int, job: Preparation, workers: int, parent: Process) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    rank, world_size, local_rank = (
        parent.rank * workers + i,
        parent.world_size * workers,
        parent.local_rank * workers + i,
    )
    prepare(job, rank, world_size, local_rank, i == 0, os.getppid())


def _parser() -> argparse.ArgumentParser:
    default = Preparation((), "")
    parser = argparse.ArgumentParser(
        prog="mfm prepare-latents",
        description="Encode images by a VAE into WebDataset shards of moments, for LatentShards. Run again after a "
        "stop, it goes on. Under torchrun or srun each process makes its share.",
    )
    parser.add_argument(
        "--input", nargs="+", metavar="PATH_OR_URL", default=[],
        help="a folder of class folders; or WebDataset shards: a folder of tars, paths, https:, s3:, gs:, with {a..b}",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="folder of the shards; with --verify alone also a URL")
    parser.add_argument("--verify", action="store_true", help="re-read all shards and compare with the index")
    parser.add_argument("--vae", default=default.vae, help="AutoencoderKL of diffusers: folder or Hugging Face id")
    parser.add_argument("--image-size", type=int, default=default.image_size, help="crop; default %(default)s")
    parser.add_argument("--shard-size", type=int, default=default.shard_size, help="samples; default %(default)s")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="of the VAE; default %(default)s")
    parser.add_argument("--num-workers", type=int, default=1, help="processes here, on its GPUs in turn")
    parser.add_argument("--threads", type=int, default=default.threads, help="that decode images, a process")
    parser.add_argument("--precision", default=default.precision, help="of the VAE: fp32, bf16 or fp16")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the order of a folder's images")
    parser.add_argument("--class-index", help="JSON of labels by class name, for WebDataset input")
    parser.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be decoded")
    parser.add_argument("--allow-pipe", action="store_true", help="run the shell commands of pipe: URLs")
    parser.add_argument("--allow-download", action="store_true", help="fetch the VAE from the Hugging Face hub")
    return parser
