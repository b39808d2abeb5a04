"""Steering the paper's mixture to its linear-Gaussian reward (section 7.1.1):  python -m benchmarks.gmm_steering

Sliced W2 and MMD of steered samples to the exact tilted distribution against the number of draws N, for MFM-G and
MFM-GF with base drift and draws of the trained Meta Flow Map, beside DPS; and particle methods with the
exact drift.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mfm_lightning.alignment import AlignmentResult, Steering, TimeGrid, TwistedSMC, feynman_kac, time_grid
from mfm_lightning.alignment.methods import with_particles
from mfm_lightning.checkpoints import load_model
from mfm_lightning.data import GaussianMixtureDataModule
from mfm_lightning.evaluation.base import track, write_table
from mfm_lightning.metrics.distances import mmd, sliced_wasserstein
from mfm_lightning.posteriors import OraclePosterior
from mfm_lightning.target import Target
from mfm_lightning.values import DenoisedValue, DPSGradient, DrawGradient, DrawGradientFree, ExactGradient
from rewards.linear_gaussian import LinearGaussianLikelihood

Job = tuple[str, int, Callable[[Tensor, torch.Generator], AlignmentResult]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="outputs/gmm/mfm/model.safetensors")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16, 64], help="N of MFM-G and MFM-GF")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--particles", type=int, default=4096, help="of the sequential Monte Carlo methods")
    parser.add_argument("--steps", type=int, default=200, help="steps of the steered ODE and SDE")
    parser.add_argument("--max-diffusion", type=float, default=25.0, help="clamp of sigma^2/2 near t = 0")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gmm_steering"))
    options = parser.parse_args()

    oracle = GaussianMixtureDataModule().oracle
    reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.2)
    exact = oracle.tilted(reward)
    model = load_model(options.model).requires_grad_(False)
    grid, clamp = TimeGrid(options.steps), options.max_diffusion
    target, exact_target = Target(model, reward), Target(oracle, reward)

    def steering(estimator, dynamics: str = "ode", on: Target = target):
        return lambda x0, generator: Steering(estimator, grid, dynamics, max_diffusion=clamp)(on, x0, generator)

    def particles(method: str):
        M = options.particles
        if method == "tds":
            smc = TwistedSMC(ExactGradient(oracle), M, grid, keep="all", max_diffusion=clamp)
            return lambda x0, generator: smc(exact_target, x0[:1], generator)
        posterior = OraclePosterior(oracle)
        return lambda x0, generator: feynman_kac(
            exact_target, with_particles(x0[:1], M, generator), DenoisedValue(), M, time_grid(20, 0.0), "glass",
            posterior, keep="all", generator=generator,
        )  # fmt: skip

    jobs: list[Job] = []
    for n in options.draws:
        jobs.append(("MFM-G", n, steering(DrawGradient(n, max_rows=8192))))
        if n > 1:
            jobs.append(("MFM-GF", n, steering(DrawGradientFree(n, max_rows=8192))))
    for dynamics in ("ode", "sde"):
        jobs.append((f"DPS, {dynamics}", 1, steering(DPSGradient(), dynamics)))
        jobs.append(
            (f"exact gradient and drift, {dynamics}", 1, steering(ExactGradient(oracle), dynamics, exact_target))
        )
    jobs.append((f"TDS, {options.particles} particles, exact drift and value", 1, particles("tds")))
    jobs.append((f"FK-GLASS, {options.particles} particles, exact drift and draws", 1, particles("fk")))

    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    shown: dict[str, Tensor] = {"exact": exact.sample(options.samples, torch.Generator().manual_seed(99))}
    num, sizes = max(options.samples, options.particles), sorted({options.samples, options.particles})

    def account(key: tuple[str, int], x: Tensor, reference: Tensor, nfe: float) -> None:
        row = found.setdefault(key, {"W2": [], "MMD": [], "NFE": []})
        reference = reference[: len(x)]
        row["W2"].append(float(sliced_wasserstein(x, reference, 256, torch.Generator().manual_seed(0))))
        row["MMD"].append(mmd(x, reference))
        row["NFE"].append(nfe)
        shown[f"{key[0]}, N = {key[1]}" if key[1] > 1 else key[0]] = x

    runs = [(seed, job) for seed in range(options.seeds) for job in jobs]
    for seed, (name, n, job) in track(runs, describe=lambda run: f"seed {run[0]}: {run[1][0]}, N = {run[1][1]}"):
        generator = torch.Generator().manual_seed(seed)
        reference, again = (exact.sample(num, generator) for _ in range(2))
        x0 = torch.randn(options.samples, 2, generator=generator)
        if name == jobs[0][0] and n == jobs[0][1]:
            for size in sizes:
                account((f"exact, {size} samples (floor)", 0), again[:size], reference, 0.0)
        result = job(x0, torch.Generator().manual_seed(1000 + seed))
        account((name, n), result.states, reference, result.nfe_per_sample)
    rows = []
    for (name, n), values in found.items():
        row = {"method": name, "N": n or ""}
        for key in ("W2", "MMD"):
            numbers = torch.tensor(values[key])
            row |= {key: numbers.mean().item(), f"{key} std": numbers.std().item() if len(numbers) > 1 else 0.0}
        rows.append({**row, "NFE a sample": f"{values['NFE'][0]:.0f}"})
    title = f"Distance to the exact tilted mixture ({options.samples} samples, mean and std of {options.seeds} seeds)"
    write_table(rows, title, options.output, "distances")
    _picture(shown, options.output / "samples.png")
    (options.output / "settings.json").write_text(json.dumps(vars(options), default=str, indent=1))


def _picture(samples: dict[str, Tensor], path: Path, columns: int = 5) -> None:
    lines = -(-len(samples) // columns)
    figure = Figure(figsize=(3 * columns, 3.1 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, (name, x) in zip(axes, samples.items(), strict=False):
        axis.scatter(*x[:2000].T, s=2, linewidths=0)
        axis.set_title(name.replace(" particles,", "\nparticles,"), fontsize=9)
        axis.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
    for axis in axes[len(samples) :]:
        axis.axis("off")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
