"""Class frequencies of aligned samples against those that a class-mixture reward asks for (paper, 7.1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Table
from mfm_benchmarks.claims import change, verdict
from mfm_benchmarks.measure import measure, noise
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment import AlignmentMethod, FeynmanKac, Steering, TimeGrid, TwistedSMC
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient, DrawGradient, DrawGradientFree
from mfm_lightning.metrics.distances import frequency_distance
from mfm_lightning.metrics.measured import Measured, mean, mean_of, resampled


@dataclass
class FrequencyComparison:
    """L2 between class frequencies, as a classifier sees them, and weights, against the number of draws N.

    Args:
        draws: N of MFM-G and MFM-GF.
        particles: of the particle methods.
        num_samples: samples of a run and seed.
        seeds: of the noise.
        steps: of the ODE and SDE.
        clip: largest steering, in norms of the drift.
    """

    draws: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    particles: list[int] = field(default_factory=lambda: [2, 8])
    num_samples: int = 256
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 50
    clip: float | None = 2.0

    def __post_init__(self) -> None:
        if not self.draws or not self.particles or not self.seeds:
            raise ValueError("frequencies: draws, particles and seeds need at least one number each")

    def shrink(self) -> None:
        self.draws, self.particles = [n for n in self.draws if n <= 8] or self.draws[:1], self.particles[:1]
        self.num_samples, self.seeds, self.steps = min(64, self.num_samples), self.seeds[:1], min(20, self.steps)

    def _methods(self) -> dict[tuple[str, int], AlignmentMethod]:
        """By name, and draws or particles (0 for neither)."""
        grid = TimeGrid(self.steps)
        found: dict[tuple[str, int], AlignmentMethod] = {("base flow", 0): Steering(grid=grid, strength=0.0)}
        for n in self.draws:
            found["MFM-G", n] = Steering(DrawGradient(n, max_rows=4096), grid, clip=self.clip)
            if n > 1:
                found["MFM-GF", n] = Steering(DrawGradientFree(n, max_rows=4096), grid, clip=self.clip)
        found["DPS", 0] = Steering(DPSGradient(), grid, clip=self.clip)
        for m in self.particles:
            found["SMC-TDS", m] = TwistedSMC(num_particles=m, grid=grid, clip=1.0)
            found["FK-SDE", m] = FeynmanKac(num_particles=m, grid=grid)
            found["FK-GLASS", m] = FeynmanKac(
                num_particles=m, grid=TimeGrid(max(2, self.steps // 5)), transition="glass"
            )
        return found

    def cells(
        self, target: Target, classify: Callable[[Tensor], Tensor], device: torch.device, identity: dict[str, Any]
    ) -> list[Cell]:
        """`classify`: images to classes `(B,)`."""
        self._cells: dict[tuple[str, int], list[Cell]] = {}
        for (name, n), method in self._methods().items():
            for seed in self.seeds:
                settings = {
                    **identity,
                    "samples": self.num_samples,
                    "seed": seed,
                    "steps": self.steps,
                    "clip": self.clip,
                }

                def compute(method: AlignmentMethod = method, seed: int = seed) -> Outcome:
                    x0 = noise(self.num_samples, target.state_shape, seed, device)
                    outcome = measure(method, target, x0, seed)
                    with torch.no_grad():
                        classes = classify(target.decoder(outcome.tensors["states"].to(device)))
                    outcome.tensors["classes"] = classes.cpu()
                    return outcome

                words = f", {n}" if n else ""
                cell = Cell(f"frequencies, {name}{words}, seed {seed}", settings, compute)
                self._cells.setdefault((name, n), []).append(cell)
        return [cell for cells in self._cells.values() for cell in cells]

    def blocks(self, results: Results, weights: Sequence[float]) -> list[Block]:
        wanted = torch.tensor(weights, dtype=torch.float64)
        wanted, found, rows, gallery = wanted / wanted.sum(), {}, [], []
        for (name, n), cells in self._cells.items():
            if (parts := results.all(cells)) is None:
                continue
            found[name, n] = mean([resampled(frequency_distance, p.tensors["classes"], wanted) for p in parts])
            reward = mean([mean_of(p.tensors["rewards"]) for p in parts])
            shares = torch.cat([p.tensors["classes"] for p in parts]).bincount(minlength=len(wanted)).double()
            rows.append({
                "method": name, "draws or particles": n or None, "NFE": round(parts[0].numbers["nfe"]),
                "L2 to the weights": found[name, n], "mean reward": reward,
                "class shares in %": " ".join(f"{100 * s:.0f}" for s in (shares / shares.sum()).tolist()),
            })  # fmt: skip
            if name == "base flow" or n in (self.draws[-1], 0, self.particles[-1]):
                gallery.append(
                    (f"{name}{f', {n}' if n else ''}\n{found[name, n].value:.2f}", parts[0].tensors["images"])
                )
        if not rows:
            return []
        floor = float(((wanted * (1 - wanted)).sum() / self.num_samples).sqrt())
        caption = (
            f"L2 between the class frequencies of {self.num_samples} samples and the weights "
            f"({', '.join(f'{w:.2g}' for w in wanted.tolist())}); exact samples would be at about {floor:.3f}."
        )
        lines: dict[str, Any] = {
            name: [(n, found[key]) for key in found if key[0] == name for n in key[1:]] for name in ("MFM-G", "MFM-GF")
        }
        for key in found:
            if key[0] not in lines:
                lines[f"{key[0]}, {key[1]} particles" if key[1] else key[0]] = found[key]
        plot = plots.lines({"class mixture": lines}, "posterior draws N", "L2 to the weights", size=(7.6, 5.0))
        return [
            Picture("class_frequencies", "Class frequencies against posterior draws", plot, caption),
            Picture("class_samples", "Samples", plots.gallery(gallery), "The same noise in each column; L2 beside it."),
            self._claims(found),
            Table("class_frequencies", "Class frequencies", rows, caption, folded=True),
        ]  # fmt: skip

    def _claims(self, found: dict[tuple[str, int], Measured]) -> Claims:
        said, ours = [], ("MFM-G", "MFM-GF")
        others = {
            f"{name} with {n} particles" if n else name: value for (name, n), value in found.items() if name not in ours
        }
        for name in ours:
            mine = {n: value for (other, n), value in found.items() if other == name}
            if len(mine) < 2:
                continue
            said.append(change(name, "L2", mine))
            words = verdict(mine[max(mine)], others, "further from the weights than", "closer to the weights than")
            said.append(f"{name} with N = {max(mine)} is {words}.")
        return Claims("Class frequencies", said)
