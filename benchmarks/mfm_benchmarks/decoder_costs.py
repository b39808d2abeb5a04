"""Images of a VAE with their gradient, through itself or a small decoder: operations, memory, time; random weights:

    python -m mfm_benchmarks.decoder_costs [--size 1024] [--measured 128] [--device cuda]

The VAE has the published sizes of SD3's and FLUX.1's, the small decoder those of TAESD. Operations are counted at one
size, on tensors without content; times are measured at another, in turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mfm_benchmarks.timing import Step, interleaved, peak_bytes
from mfm_lightning.backbones.published import PUBLISHED
from mfm_lightning.metrics.measured import of_runs, ratio_of_runs
from mfm_lightning.utils.console import write_table
from mfm_lightning.utils.devices import find_device

FACTOR, CHANNELS = 8, 16  # pixels a latent along a side; of a latent
LARGE, SMALL = "through the VAE", "through a small decoder"


def networks() -> dict[str, Any]:
    """Both, with random weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    config = PUBLISHED["stabilityai/stable-diffusion-3.5-medium"][1]["vae"][2]
    made: dict[str, Any] = {
        LARGE: AutoencoderKL.from_config(config),
        SMALL: AutoencoderTiny.from_config({"latent_channels": CHANNELS}),
    }
    return {name: network.eval().requires_grad_(False) for name, network in made.items()}


def decode(networks: Mapping[str, Any], through: str, latents: Tensor) -> None:
    """The VAE's images, and the gradient of their mean."""
    if through != LARGE:
        with torch.no_grad():
            networks[LARGE].decode(latents)
    networks[through].decode(latents.detach().requires_grad_()).sample.mean().backward()


def operations(size: int) -> dict[str, int]:
    """Of one image of so many pixels a side, with its gradient."""
    found = {}
    with FakeTensorMode():
        made = networks()
        for through in made:
            with FlopCounterMode(display=False) as counter:
                decode(made, through, torch.randn(1, CHANNELS, size // FACTOR, size // FACTOR))
            found[through] = counter.get_total_flops()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="pixels a side, for operations")
    parser.add_argument("--measured", type=int, default=128, help="pixels a side, for memory and time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    given = parser.parse_args()
    for name in ("size", "measured"):
        if getattr(given, name) % FACTOR:
            parser.error(f"--{name} {getattr(given, name)} must be a multiple of {FACTOR}")
    device, flops = find_device(given.device), operations(given.size)
    latents = torch.randn(1, CHANNELS, given.measured // FACTOR, given.measured // FACTOR, device=device)
    made = {name: network.to(device) for name, network in networks().items()}
    steps: dict[str, Step] = {name: partial(decode, made, name, latents) for name in made}
    seconds, failures = interleaved(steps, given.rounds, device)
    if failures:
        raise RuntimeError("; ".join(f"{name}: {said}" for name, said in failures.items()))
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    rows = [
        {
            "gradient": name,
            f"TFLOP, {given.size} pixels": round(flops[name] / 1e12, 3),
            "of the VAE's": round(flops[name] / flops[LARGE], 4),
            f"GB, {given.measured} pixels": round(memory[name] / 1e9, 3),
            "memory, ratio": round(memory[name] / memory[LARGE], 4),
            f"seconds, {given.measured} pixels": of_runs(seconds[name]).text(3),
            "time, ratio": ratio_of_runs(seconds[name], seconds[LARGE]).text(3),
        }
        for name in steps
    ]
    write_table(rows, f"One image of the VAE and its gradient ({device})", Path("outputs/decoder_costs"), "costs")


if __name__ == "__main__":
    main()
