"""`mfm sample FLOW --prompts FILE`: images of a pretrained text-to-image flow, on its scheduler's times."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mfm_lightning.utils.stopping import stoppable

if TYPE_CHECKING:
    from mfm_lightning.backbones import TextToImageFlow
    from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
    from mfm_lightning.utils.distributed import Process

log = logging.getLogger(__name__)


def sample_prompts(
    model: str,
    prompts: str,
    output: Path,
    images_per_prompt: int,
    layout: str,
    image_size: int | None,
    torch_dtype: str,
    steps: int,
    guidance: float | None,
    negative: str | None,
    seed: int,
    batch_size: int,
    allow_download: bool,
    device: str,
) -> None:
    """Write images of prompts; the arguments are those of `mfm sample`.

    Raises:
        FileNotFoundError, CheckpointError, ImportError, ValueError: as `load_flow`, `read_prompts`, `PromptFolder`.
    """
    from mfm_lightning.backbones import load_flow
    from mfm_lightning.sampling.prompt_folder import PromptFolder
    from mfm_lightning.sampling.prompts import read_prompts
    from mfm_lightning.utils.devices import find_device
    from mfm_lightning.utils.distributed import Process

    process = Process.from_environment()
    where = find_device(device, process.local_rank)
    folder = PromptFolder(output, read_prompts(prompts), images_per_prompt, layout, process.rank)
    cache = output / "embeddings"  # removed when all images are there
    flow = load_flow(model, image_size, torch_dtype, batch_size, cache=cache, allow_download=allow_download)
    flow.time_grid(steps)  # refuses wrong settings before anything is written
    folder.claim({**flow.identity, "steps": steps, "guidance": guidance, "negative": negative, "seed": seed})
    mine = [image for image in folder.missing() if image.index % process.world_size == process.rank]
    flow.keep_embeddings(list(dict.fromkeys(image.prompt.text for image in mine)), negative, guidance)
    with stoppable("the same command goes on with what is missing"):
        _draw(flow.to(where), folder, mine, steps, guidance, negative, seed, batch_size, process)
    if not (left := len(folder.missing())):
        shutil.rmtree(cache, ignore_errors=True)
    log.info("%d images: %s%s", len(folder.images) - left, output, f"; {left} are with other processes" if left else "")


def _draw(
    flow: TextToImageFlow,
    folder: PromptFolder,
    images: list[PromptImage],
    steps: int,
    guidance: float | None,
    negative: str | None,
    seed: int,
    batch_size: int,
    process: Process,
) -> None:
    import torch

    from mfm_lightning.data.prompts import PromptNoise
    from mfm_lightning.samplers import integrate
    from mfm_lightning.utils.console import track
    from mfm_lightning.utils.devices import finished

    noise = PromptNoise(images, flow.state_shape, seed)
    where, times = next(flow.transformer.parameters()).device, flow.time_grid(steps)
    parts = [range(k, min(k + batch_size, len(images))) for k in range(0, len(images), batch_size)]
    for part in track(parts, describe=lambda part: f"image {images[part.start].index}") if process.rank == 0 else parts:
        x0 = torch.stack([noise[i][0] for i in part]).to(where)
        given = flow.encode([images[i].prompt.text for i in part], negative, guidance).to(where)
        began = finished(where)
        with torch.no_grad():
            states = integrate(lambda t, x, c=given: flow.drift(t, x, c), x0, times)
            decoded = flow.decoder(states)
        seconds = round((finished(where) - began) / len(part), 4)
        nfe = {"network": (len(times) - 1) * flow.passes(given)}
        for i, image in zip(part, decoded, strict=True):
            measured = {"seed": images[i].noise_key(seed)[0], "nfe": nfe, "seconds": seconds}
            folder.write(images[i].index, image, measured)
