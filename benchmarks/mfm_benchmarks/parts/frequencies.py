"""Class frequencies of aligned samples against those that a class-mixture reward asks for (paper, 7.1.2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Summary, Table
from mfm_benchmarks.claims import change, verdict
from mfm_benchmarks.measure import measure, noise
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment import AlignmentMethod, FeynmanKac, Steering, TimeGrid, TwistedSMC
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient, DrawGradient, DrawGradientFree
from mfm_lightning.metrics.distances import frequency_distance
from mfm_lightning.metrics.measured import Measured, mean, mean_of, resampled, rounded


@dataclass(frozen=True)
class Setting:
    """A method of the comparison.

    population: all particles of a run are samples; steps: of its grid, where it is only there to be compared with
    another number of steps.
    """

    method: AlignmentMethod
    population: bool = False
    steps: int | None = None


@dataclass
class FrequencyComparison:
    """L2 between class frequencies, as a classifier sees them, and weights, against the number of draws N.

    Args:
        draws: N of MFM-G and MFM-GF.
        particles: of the particle methods, one of which is a sample.
        population: particles of a run of the particle methods whose particles are all samples; 0 for no such runs.
        runs: of such populations, with seeds of their own.
        num_samples: samples of a run and seed, of the other methods.
        seeds: of the noise.
        steps: of the ODE and SDE.
        other_steps: further numbers of steps at which the first of our lines is run with the fewest draws, to see
            whether `steps` are enough.
        dynamics: of MFM-G and MFM-GF, "ode", "sde" or both.
        clip: largest steering, in norms of the drift.
    """

    draws: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    particles: list[int] = field(default_factory=lambda: [2, 8])
    population: int = 0
    runs: int = 12
    num_samples: int = 256
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = 50
    other_steps: list[int] = field(default_factory=list)
    dynamics: list[str] = field(default_factory=lambda: ["ode"])
    clip: float | None = 2.0

    def __post_init__(self) -> None:
        if not self.draws or not self.seeds or not self.dynamics:
            raise ValueError("frequencies: draws, seeds and dynamics need at least one each")
        if self.population and self.runs < 10:
            raise ValueError(f"frequencies.runs {self.runs}: the interval of populations needs 10 or more")

    def shrink(self) -> None:
        self.draws, self.particles = [n for n in self.draws if n <= 4] or self.draws[:1], self.particles[:1]
        self.dynamics, self.population, self.other_steps = self.dynamics[:1], 0, []
        self.num_samples, self.seeds, self.steps = min(64, self.num_samples), self.seeds[:1], min(20, self.steps)

    def _ours(self) -> list[str]:
        """The lines by number of draws."""
        kinds = self.dynamics if len(self.dynamics) > 1 else [""]
        return [f"{name} {kind.upper()}".strip() for name in ("MFM-G", "MFM-GF") for kind in kinds]

    def _settings(self) -> dict[tuple[str, int], Setting]:
        """By name, and draws or particles (0 for neither)."""
        grid = TimeGrid(self.steps)
        found = {("base flow", 0): Setting(Steering(grid=grid, strength=0.0))}
        gradients = {"MFM-G": DrawGradient, "MFM-GF": DrawGradientFree}
        names = itertools.product(gradients.items(), self.dynamics)
        for ((kind, gradient), dynamics), name in zip(names, self._ours(), strict=True):
            for n in (n for n in self.draws if n > 1 or kind == "MFM-G"):  # one draw has no gradient-free form
                found[name, n] = Setting(Steering(gradient(n, max_rows=4096), grid, dynamics, clip=self.clip))
        first, fewest = self._ours()[0], self.draws[0]
        for k in self.other_steps:
            method = Steering(DrawGradient(fewest, max_rows=4096), TimeGrid(k), self.dynamics[0], clip=self.clip)
            found[f"{first}, {k} steps", fewest] = Setting(method, steps=k)
        found["DPS", 0] = Setting(Steering(DPSGradient(), grid, clip=self.clip))
        for m in self.particles:
            found |= {(name, m): Setting(method) for name, method in self._particle_methods(m, "sample").items()}
        if m := self.population:
            of_all = self._particle_methods(m, "all").items()
            found |= {(f"{name}, all particles", m): Setting(method, population=True) for name, method in of_all}
        return found

    def _particle_methods(self, num: int, keep: str) -> dict[str, AlignmentMethod]:
        grid, few = TimeGrid(self.steps), TimeGrid(max(2, self.steps // 5))
        return {
            "SMC-TDS": TwistedSMC(num_particles=num, keep=keep, grid=grid, clip=1.0),
            "FK-SDE": FeynmanKac(num_particles=num, keep=keep, grid=grid),
            "FK-GLASS": FeynmanKac(num_particles=num, keep=keep, grid=few, transition="glass"),
        }

    def cells(
        self, target: Target, classify: Callable[[Tensor], Tensor], device: torch.device, identity: dict[str, Any]
    ) -> list[Cell]:
        """`classify`: images to classes `(B,)`."""
        self._cells: dict[tuple[str, int], list[Cell]] = {}
        self._made = self._settings()
        for (name, n), setting in self._made.items():
            num, each, seeds = (
                (self.runs, n, self.seeds[:1]) if setting.population else (self.num_samples, 1, self.seeds)
            )
            settings = {**identity, "samples": num, "steps": setting.steps or self.steps, "clip": self.clip}
            if isinstance(setting.method, Steering) and setting.method.dynamics != "ode":
                settings["dynamics"] = setting.method.dynamics
            for seed in seeds:

                def compute(
                    method: AlignmentMethod = setting.method, seed: int = seed, num: int = num, each: int = each
                ) -> Outcome:
                    outcome = measure(method, target, noise(num, target.state_shape, seed, device), seed, each=each)
                    with torch.no_grad():
                        classes = classify(target.decoder(outcome.tensors["states"].to(device)))
                    outcome.tensors["classes"] = classes.cpu()
                    return outcome

                words = f", {n}" if n else ""
                cell = Cell(f"frequencies, {name}{words}, seed {seed}", {**settings, "seed": seed}, compute)
                self._cells.setdefault((name, n), []).append(cell)
        return [cell for cells in self._cells.values() for cell in cells]

    def blocks(self, results: Results, weights: Sequence[float]) -> list[Block]:
        wanted = torch.tensor(weights, dtype=torch.float64)
        wanted, found, rows, gallery = wanted / wanted.sum(), {}, [], []
        for (name, n), cells in self._cells.items():
            if (parts := results.all(cells)) is None:
                continue
            setting = self._made[name, n]
            if setting.population:
                found[name, n], reward = self._of_populations(parts[0], wanted)
            else:
                found[name, n] = mean([resampled(frequency_distance, p.tensors["classes"], wanted) for p in parts])
                reward = mean([mean_of(p.tensors["rewards"]) for p in parts])
            shares = torch.cat([p.tensors["classes"] for p in parts]).bincount(minlength=len(wanted)).double()
            rows.append({
                "method": name, "draws or particles": n or None, "NFE": round(parts[0].numbers["nfe"]),
                "L2 to the weights": found[name, n], "mean reward": reward,
                "class shares in %": " ".join(f"{100 * s:.0f}" for s in (shares / shares.sum()).tolist()),
            })  # fmt: skip
            if n in (self.draws[-1], 0, *self.particles[-1:], self.population) and not setting.steps:
                gallery.append(
                    (f"{name}{f', {n}' if n else ''}\n{found[name, n].value:.2f}", parts[0].tensors["images"])
                )
        if not rows:
            return []
        floor = float(((wanted * (1 - wanted)).sum() / self.num_samples).sqrt())
        caption = (
            f"L2 between the class frequencies of {self.num_samples} samples and the requested weights "
            f"({', '.join(f'{w:.2g}' for w in wanted.tolist())}). Lower is better; exact samples have about "
            f"{floor:.3f}."
        )
        if self.population:
            caption += (
                f" Of populations, all {self.population} particles of {self.runs} runs are samples; their intervals "
                "resample whole runs."
            )
        lines: dict[str, Any] = {
            name: [(n, found[name, n]) for n in self.draws if (name, n) in found] for name in self._ours()
        }
        for key in found:
            if key[0] not in lines and not self._made[key].steps:
                lines[f"{key[0]}, {key[1]} particles" if key[1] else key[0]] = found[key]
        ours = self._ours()
        plot = plots.lines({"": lines}, "posterior draws N", "L2 to the weights", ours=ours)
        strong = [name for name, _ in (row[0].split("\n") for row in gallery) if name.partition(", ")[0] in ours]
        shown = "Each column starts from the same noise. Beside each row: the method, its N or particles, and its L2."
        keys, only = ["method", "draws or particles"], [_cells_of(row) for row in rows]
        return [
            *self._summary(found),
            Picture("class_frequencies", "Class frequencies against posterior draws", plot, caption),
            Picture("class_samples", "Samples of the class mixture", plots.gallery(gallery, ours=strong), shown),
            self._claims(found),
            Table("class_frequencies", "Class frequencies", rows, caption, folded=True, keys=keys, only=only),
        ]  # fmt: skip

    def _summary(self, found: dict[tuple[str, int], Measured]) -> list[Block]:
        """Our method with the most draws against the nearest of the others."""
        mine = {n: value for (name, n), value in found.items() if name == self._ours()[0]}
        others = {
            _named(*key): v for key, v in found.items() if key[0] not in self._ours() and not self._made[key].steps
        }
        if not mine or not others:
            return []
        best = min(others, key=lambda name: others[name].value)
        words = "further from the requested shares than", "closer to the requested shares than"
        said = verdict(mine[max(mine)], {best: others[best]}, *words)
        name = f"{self._ours()[0]} with N = {max(mine)}"
        return [
            Summary([
                f"Class shares: {name} has an L2 of {rounded(mine[max(mine)].value)} and is {said} "
                f"({rounded(others[best].value)}), the closest other method."
            ])
        ]  # fmt: skip

    def _of_populations(self, outcome: Outcome, wanted: Tensor) -> tuple[Measured, Measured]:
        """L2 of all runs together, and the mean reward; a run's particles depend on each other: runs are resampled."""
        one_hot = torch.nn.functional.one_hot(outcome.tensors["classes"], len(wanted)).double()
        distance = resampled(_mean_distance, one_hot.reshape(self.runs, -1, len(wanted)).mean(dim=1), wanted)
        return distance, mean_of(outcome.tensors["rewards"].reshape(self.runs, -1).mean(dim=1))

    def _claims(self, found: dict[tuple[str, int], Measured]) -> Claims:
        said, ours = [], self._ours()
        others = {
            f"{name} with {n} particles" if n else name: value
            for (name, n), value in found.items()
            if name not in ours and not self._made[name, n].steps
        }
        for name in ours:
            mine = {n: value for (other, n), value in found.items() if other == name}
            if len(mine) < 2:
                continue
            said.append(change(name, "L2", mine))
            words = verdict(mine[max(mine)], others, "further from the weights than", "closer to the weights than")
            said.append(f"{name} with N = {max(mine)} is {words}.")
        fewest = self.draws[0]
        more = {f"{k} steps": value for key, value in found.items() if (k := self._made[key].steps)}
        if more and (here := found.get((ours[0], fewest))) is not None:
            words = verdict(here, more, "further from the weights than with", "closer to the weights than with")
            said.append(f"{ours[0]} with N = {fewest} and {self.steps} steps is {words}.")
        return Claims("Class frequencies", said)


def _named(name: str, n: int) -> str:
    return f"{name} with {n} particles" if n else name


def _cells_of(row: dict[str, Any]) -> str:
    """The beginning of the names of the results that a row is of."""
    n = row["draws or particles"]
    return f"frequencies, {row['method']}{f', {n}' if n else ''}, seed"


def _mean_distance(frequencies: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """L2 `(S,)` between the mean of the runs' frequencies `(R, C)`, with weights `(S, R)`, and the wanted ones."""
    return (weights @ frequencies / len(frequencies) - wanted).norm(dim=1)
