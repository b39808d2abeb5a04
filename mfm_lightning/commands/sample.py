"""`mfm sample`: many samples of a model, over any number of processes, as files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mfm_lightning.utils.stopping import stoppable

if TYPE_CHECKING:
    from mfm_lightning.models import MetaFlowMap
    from mfm_lightning.networks.decoders import Decoder

log = logging.getLogger(__name__)


def sample(
    model: str,
    *,
    output: Path | None = None,
    format: Literal["npz", "png", "webdataset"] = "png",
    num_samples: int = 50_000,
    labels: list[str] | None = None,
    sampler: Literal["refinement", "ode", "flow_map"] | None = None,
    steps: int | None = None,
    method: Literal["euler", "heun"] = "euler",
    guidance: float | None = None,
    decoder: str | None = None,
    scale: list[float] | None = None,
    shift: list[float] | None = None,
    allow_download: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "auto",
    prompts: str | None = None,
    images_per_prompt: int = 1,
    layout: Literal["flat", "geneval", "compbench", "unigenbench"] = "flat",
    negative: str | None = None,
    image_size: int | None = None,
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
) -> None:
    """Write samples of a model.

    Under torchrun or srun the processes share them; the same command goes on with what a killed one has left.

    Args:
        model: a model.safetensors, a name such as mnist (which comes with the package), or a Hugging Face id; with
            prompts, a text-to-image flow: a folder of diffusers, or an id.
        output: folder to write to; outputs/samples/NAME, of the model, if left out.
        format: of the files.
        num_samples: in all; 50,000 is what the paper takes for FID.
        labels: classes, in turn, such as 281,282; all that had training images if left out.
        sampler: by the kind of model if left out.
        steps: K refinements or flow-map steps (4 if left out), or ODE steps (250); with prompts, on the scheduler's
            times (28).
        method: of the ODE.
        guidance: class-guidance scale that the network knows; with prompts, as the pipeline takes it (its own if left
            out).
        decoder: "pixel" (states in [-1, 1]), or a VAE's folder or Hugging Face id; what the model's file says, else
            pixel, if left out.
        scale: factor of a VAE's latents, or one for each channel; its own if left out.
        shift: what is subtracted from them before, or a number for each channel; nothing if left out.
        allow_download: fetch the model and the VAE where they are not on this machine.
        seed: with the index, of a sample's noise.
        batch_size: samples drawn at once by each process; 64 if left out, 8 with prompts.
        precision: of the network.
        device: auto, cpu, cuda, cuda:1, ...
        prompts: file of prompts (.txt, .json, .jsonl, .csv, .tsv, .parquet), or a set's name (mfm data --prompts list),
            for a text-to-image flow; a line for each image is written to lines_RANK.jsonl.
        images_per_prompt: with prompts.
        layout: with prompts, names of the files, as these evaluators read them.
        negative: with prompts, a negative prompt of all images; the pipeline's own if left out.
        image_size: with prompts, pixels of a side; the pipeline's own if left out.
        torch_dtype: with prompts, floating type of the flow.

    Raises:
        FileNotFoundError: if the model or the decoder is not there.
        ValueError: if settings do not fit the model, or the folder has samples of other settings.
    """
    of_labels = {
        "format": (format, "png"), "num-samples": (num_samples, 50_000), "labels": (labels, None),
        "sampler": (sampler, None), "method": (method, "euler"), "decoder": (decoder, None), "scale": (scale, None),
        "shift": (shift, None), "precision": (precision, "fp32"),
    }  # fmt: skip
    of_prompts = {
        "images-per-prompt": (images_per_prompt, 1), "layout": (layout, "flat"), "negative": (negative, None),
        "image-size": (image_size, None), "torch-dtype": (torch_dtype, "bfloat16"),
    }  # fmt: skip
    idle = [name for name, (given, usual) in (of_labels if prompts else of_prompts).items() if given != usual]
    if idle:
        raise ValueError(f"--{idle[0]} is {'not for' if prompts else 'for'} a text-to-image flow with --prompts")
    if output is None:
        output = Path("outputs/samples", _name_of(model))
        log.info("samples go to %s", output)
    if prompts:
        from mfm_lightning.commands.sample_prompts import sample_prompts

        sample_prompts(
            model, prompts, output, images_per_prompt, layout, image_size, torch_dtype, 28 if steps is None else steps,
            guidance, negative, seed, 8 if batch_size is None else batch_size, allow_download, device,
        )  # fmt: skip
        return
    from mfm_lightning.checkpoints import find_weights, fingerprint, load_model, read_metadata
    from mfm_lightning.networks.decoders import check_decoder
    from mfm_lightning.sampling import OUTPUTS, ModelSampler, SamplePlan, sample_files
    from mfm_lightning.sampling.model_sampler import BY_MODEL
    from mfm_lightning.utils.atomic import check_is_folder
    from mfm_lightning.utils.devices import find_device
    from mfm_lightning.utils.distributed import Process

    check_is_folder(output)
    process = Process.from_environment()
    where = find_device(device, process.local_rank)
    file = find_weights(model, allow_download=allow_download)
    header = read_metadata(file)
    kind, default_steps = BY_MODEL.get(header.get("kind", ""), BY_MODEL["meta_flow_map"])
    if sampler not in (None, kind):
        kind, default_steps = sampler, {"ode": 250}.get(sampler, 4)
    drawn = ModelSampler(kind, default_steps if steps is None else steps, method, guidance, precision)
    loaded = load_model(file).eval().requires_grad_(False)
    classes = _labels(labels, loaded)
    drawn.check(loaded, classes)
    decode = _decoder(decoder or header.get("decoder"), scale, shift, allow_download, loaded)
    check_decoder(decode, loaded.metadata, model)
    plan = SamplePlan(num_samples, classes, seed, 64 if batch_size is None else batch_size)
    files = OUTPUTS[format](output, plan)
    files.claim(
        {
            "model": fingerprint(file),
            "sampler": repr(drawn),
            "decoder": repr(decode),
            "format": format,
            "num_samples": plan.num_samples,
            "labels": classes,
            "seed": plan.seed,
            "batch_size": plan.batch_size,
        }
    )
    with stoppable("the same command goes on with what is missing"):
        sample_files(loaded.to(where), drawn, decode.to(where), files, process)


def _labels(given: Sequence[str] | None, model: MetaFlowMap) -> tuple[int, ...]:
    from mfm_lightning.data.class_folders import shortened

    def named(found: Sequence[int]) -> str:
        return ", ".join(shortened(list(map(str, found))))

    missing = model.untrained_labels
    if given is None:
        found = tuple(label for label in range(model.num_classes) if label not in missing)
        if missing:
            log.warning("labels %s had no training images and are left out (--labels)", named(missing))
        return found or (0,)  # 0 is the null label of a model without classes
    try:
        found = tuple(int(part) for text in given for part in text.split(",") if part)
    except ValueError as error:
        raise ValueError(f"--labels {' '.join(given)}: expected whole numbers, e.g. 281,282 or 281 282") from error
    if asked := [label for label in found if label in missing]:
        log.warning("labels %s had no training images: their samples mean little", named(asked))
    return found


def _decoder(
    name: str | None, scale: list[float] | None, shift: list[float] | None, allow_download: bool, model: MetaFlowMap
) -> Decoder:
    from mfm_lightning.networks.decoders import PixelDecoder, VAEDecoder

    if name in (None, "pixel"):
        if len(model.state_shape) != 3 or model.state_shape[0] not in (1, 3):
            raise ValueError(
                f"states of shape {model.state_shape} are no pixels: give --decoder a VAE's folder or Hugging Face id"
            )
        return PixelDecoder()
    numbers = [given[0] if given and len(given) == 1 else given or None for given in (scale, shift)]
    decoder = VAEDecoder(name, numbers[0], allow_download=allow_download, shift=numbers[1])
    if missing := decoder.missing():
        raise FileNotFoundError(missing[0])
    return decoder


def _name_of(model: str) -> str:
    """A folder's name for what a model is called: mnist, org/name, or runs/first/model.safetensors."""
    path = Path(model)
    return (path.parent.name or path.stem) if path.suffix == ".safetensors" else path.name or "model"
