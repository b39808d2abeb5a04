"""`mfm sample`: many samples of a model, over any number of processes, as files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from mfm_lightning.checkpoints import fingerprint, load_model, read_metadata
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.decoders import Decoder, PixelDecoder, VAEDecoder
from mfm_lightning.samplers import METHODS
from mfm_lightning.sampling import OUTPUTS, ModelSampler, Output, SamplePlan
from mfm_lightning.sampling.model_sampler import BY_MODEL, KINDS
from mfm_lightning.utils.console import track
from mfm_lightning.utils.devices import find_device
from mfm_lightning.utils.distributed import Process
from mfm_lightning.utils.images import to_uint8
from mfm_rewards.execution import Precision

log = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Entry point of the subcommand.

    Raises:
        FileNotFoundError: if the model or the decoder is not there.
        ValueError: if settings do not fit the model, or the folder has samples of other settings.
    """
    options = _parser().parse_args(args)
    process = Process.from_environment()
    device = find_device(options.device, process.local_rank)
    kind = read_metadata(options.model).get("kind", "meta_flow_map")
    sampler_kind, steps = BY_MODEL.get(kind, BY_MODEL["meta_flow_map"])
    if options.sampler not in (None, sampler_kind):
        sampler_kind, steps = options.sampler, {"ode": 250}.get(options.sampler, 4)
    steps = options.steps if options.steps is not None else steps
    sampler = ModelSampler(sampler_kind, steps, options.method, options.guidance, options.precision)
    model = load_model(options.model).eval().requires_grad_(False)
    labels = _labels(options.labels, model)
    sampler.check(model, labels)
    decoder = _decoder(options.decoder, options.scale, options.allow_download, model)
    plan = SamplePlan(options.num_samples, labels, options.seed, options.batch_size)
    output = OUTPUTS[options.format](options.output, plan)
    settings = {
        "model": fingerprint(options.model),
        "sampler": repr(sampler),
        "decoder": repr(decoder),
        "format": options.format,
        "num_samples": plan.num_samples,
        "labels": labels,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
    }
    output.claim(settings)
    sample_files(model.to(device), sampler, decoder.to(device), output, process)


def sample_files(
    model: MetaFlowMap, sampler: ModelSampler, decoder: Decoder, output: Output, process: Process | None = None
) -> bool:
    """Draw this process's share of what is missing, and put the output together if it was the last.

    Returns:
        Whether all samples are there.
    """
    process, plan = process or Process(), output.plan
    missing = set(output.missing())
    mine = [batch for batch in plan.share(process) if batch in missing]
    jobs = track(mine, describe=lambda batch: f"samples from {batch.start}") if process.rank == 0 else mine
    for batch in jobs:
        # the last batch is drawn in full, so that a sample does not depend on how many there are
        indices = range(batch.start, batch.start + plan.batch_size)
        states = sampler(model, plan.label(indices), plan.generators(indices))
        with torch.no_grad():
            images = decoder(states[: len(batch)])
        output.write(batch, to_uint8(images).cpu())
    left = sum(len(batch) for batch in output.missing())
    if left:
        log.info("process %d of %d is done; %d samples are with others", process.rank, process.world_size, left)
        return False
    for path in output.finish():
        log.info("%d samples: %s", plan.num_samples, path)
    output.clear()
    return True


def _labels(text: str | None, model: MetaFlowMap) -> tuple[int, ...]:
    if text is None:
        return tuple(range(model.num_classes)) or (0,)  # 0 is the null label of a model without classes
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--labels {text}: expected whole numbers with commas, e.g. 281,282") from error


def _decoder(name: str | None, scale: float | None, allow_download: bool, model: MetaFlowMap) -> Decoder:
    if name in (None, "pixel"):
        if len(model.state_shape) != 3 or model.state_shape[0] not in (1, 3):
            raise ValueError(
                f"states of shape {model.state_shape} are no pixels: give --decoder a VAE's folder or Hugging Face id"
            )
        return PixelDecoder()
    decoder = VAEDecoder(name, scale, allow_download=allow_download)
    if missing := decoder.missing():
        raise FileNotFoundError(missing[0])
    return decoder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mfm sample",
        description="Write samples of a model. Under torchrun or srun the processes share them; the same command goes "
        "on with what a killed one has left.",
    )
    parser.add_argument("model", type=Path, help="a model.safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--format", choices=sorted(OUTPUTS), default="png", help="png if left out")
    parser.add_argument("--num-samples", type=int, default=50_000, help="50,000 if left out, as for FID in the paper")
    parser.add_argument("--labels", help="classes with commas, in turn; all classes if left out")
    parser.add_argument("--sampler", choices=KINDS, help="by the kind of model if left out")
    parser.add_argument("--steps", type=int, help="K refinements or flow-map steps (4), or ODE steps (250)")
    parser.add_argument("--method", choices=METHODS, default="euler", help="of the ODE")
    parser.add_argument("--guidance", type=float, help="class-guidance scale that the network knows")
    parser.add_argument("--decoder", help="'pixel' (states in [-1, 1]), or a VAE's folder or Hugging Face id")
    parser.add_argument("--scale", type=float, help="factor of a VAE's latents; its own if left out")
    parser.add_argument("--allow-download", action="store_true", help="fetch the VAE where it is not on this machine")
    parser.add_argument("--seed", type=int, default=0, help="with the index, of a sample's noise")
    parser.add_argument("--batch-size", type=int, default=64, help="samples drawn at once by each process")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="of the network; fp32 if left out"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser
