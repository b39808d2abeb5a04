"""Steering with draws, or all of it, in bfloat16, against float32: reward, realism and time, from the same noise:

    python -m mfm_benchmarks.draw_precision [--steps 10 25] [--samples 256] [--device cuda]

By the MNIST model of the package, MFM-G with one draw. Times are of turns, one after the other in one process.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mfm_benchmarks.measure import clock
from mfm_benchmarks.mnist_steering import REWARDS, MnistSteering
from mfm_lightning.alignment.method import TimeGrid
from mfm_lightning.alignment.steering import Steering
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawGradient, Estimate
from mfm_lightning.interpolant import Generators, Times
from mfm_lightning.metrics.measured import mean_of, of_runs, ratio_of_runs
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.devices import find_device
from mfm_rewards.execution import autocast

FLOAT, DRAWS, ALL = "float32", "draws in bfloat16", "all in bfloat16"


class BfloatDraws(DrawGradient):
    """MFM-G whose draws and their gradients are computed in bfloat16."""

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        with autocast(x.device, "bf16"):
            return super().__call__(target, t, x, generator)


def steered(target: Target, noise: Tensor, steps: int, precision: str) -> tuple[Tensor, float]:
    """States, and the seconds that they took."""
    estimator = BfloatDraws() if precision == DRAWS else DrawGradient()
    method = Steering(estimator=estimator, grid=TimeGrid(steps), clip=2.0, base_step="flow_map")
    generator = torch.Generator(noise.device).manual_seed(1)
    began = clock(noise.device)
    with autocast(noise.device, "bf16") if precision == ALL else nullcontext():
        states = method(target, noise, generator).states
    return states, clock(noise.device) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25], help="of the steering")
    parser.add_argument("--samples", type=int, default=256, help="of each setting")
    parser.add_argument("--rounds", type=int, default=3, help="of times")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    given = parser.parse_args()
    device = find_device(given.device)
    setup = MnistSteering.prepared(given.samples, device)
    settings, rows = [(name, steps) for name in REWARDS for steps in given.steps], []
    for name, steps in track(settings, describe=lambda setting: f"{setting[0]}, {setting[1]} steps"):
        target = setup.target(name)
        seconds: dict[str, list[float]] = {precision: [] for precision in (FLOAT, DRAWS, ALL)}
        states: dict[str, Tensor] = {}
        for _ in range(given.rounds):
            for precision, times in seconds.items():
                states[precision], taken = steered(target, setup.noise, steps, precision)
                times.append(taken)
        judged = {precision: setup.judge(target, x) for precision, x in states.items()}
        plain = judged[FLOAT]
        for precision, found in judged.items():
            numbers = {
                "value": mean_of(found.rewards),
                "less float32's": mean_of(found.rewards - plain.rewards),
                "Fréchet, ratio": found.distance.over(plain.distance),
                "time, ratio": ratio_of_runs(seconds[precision], seconds[FLOAT]),
                "seconds": of_runs(seconds[precision]),
            }
            said = {key: number.text(3) for key, number in numbers.items()}
            rows.append({"reward": name, "steps": steps, "precision": precision, **said})
    title = f"MFM-G of one draw in bfloat16 ({given.samples} samples, {device})"
    write_table(rows, title, Path("outputs/draw_precision"), "draw_precision")


if __name__ == "__main__":
    main()
