"""The paper's mixture (7.1.1, F.1): how close steered samples come to the exact tilted distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import CloudChart, LineChart
from mfm_benchmarks.claims import change, listed, verdict
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.measure import noise
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, described, no_result
from mfm_lightning.alignment import (
    AlignmentMethod,
    FeynmanKac,
    NoiseOptimisation,
    Steering,
    TimeGrid,
    TrajectoryTilting,
    TwistedSMC,
)
from mfm_lightning.alignment.diamond import DiamondGradient, DiamondGradientFree
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.alignment.particles import Particles
from mfm_lightning.alignment.posteriors import GlassPosterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import (
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    ExactGradient,
    FlowMapGradient,
    GradientEstimator,
)
from mfm_lightning.checkpoints import fingerprint, load_model
from mfm_lightning.data import GaussianMixtureDataModule
from mfm_lightning.metrics.distances import mmd, sliced_wasserstein
from mfm_lightning.metrics.measured import Measured, mean, of_runs, resampled, rounded
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood

Key = tuple[str, int]  # name, and draws (0: none)
DEFAULT_MODEL = "outputs/gmm/mfm/model.safetensors"
DISTANCES = ("W2", "MMD")
EXACT, FLOOR = "exact gradient", "exact samples (floor)"
OURS = ("MFM-G, ODE", "MFM-G, SDE", "MFM-GF, ODE", "MFM-GF, SDE")
DIAMOND = ("Diamond-G, ODE", "Diamond-GF, ODE")  # weighted draws of the plain flow map
NOISE = "noise optimisation"
FRESH = "FK, GLASS, fresh noise"
PARTICLES = ("SMC-TDS", f"{EXACT}, SMC-TDS", "FK, SDE", "FK, GLASS", FRESH, "FMTT")


class MixtureSuite(Suite):
    """Sliced W2 and MMD to the exact tilted mixture, by posterior draws N.

    Base drift, draws and flow map are the trained Meta Flow Map's for all methods but the exact gradient, which shows
    what discretisation alone costs. The paper takes 4,096 samples, 1,000 steps and 20 seeds; these settings are for a
    CPU.

    Args:
        model: the Meta Flow Map; fitted by `fit_config` where it is the default and not there.
        fit_config: YAML of the training that makes the default model.
        draws: N of MFM-G and MFM-GF, and from 2 on of Weighted Diamond Maps.
        num_samples: samples of a run and seed that are judged.
        num_reference: exact samples that they are judged against, a multiple of `num_samples`.
        seeds: of all noise.
        steps: of the ODE and SDE.
        power: of their grid, t = u^power; above 1 it is finer near noise, where the SDE is stiff.
        particles: of the particle methods, of which `num_samples` are judged.
        glass_steps: Heun steps of a GLASS transition.
        transitions: number of GLASS transitions.
        ascent: iterations of noise optimisation.
        max_diffusion: clamp of sigma^2/2 near t=0.
        max_rows: draws in memory at once.
    """

    name = "gmm"
    title = "Gaussian mixture with a known answer"
    about = (
        "How close steered samples come to the exact tilted distribution, by the number N of posterior draws per "
        "step. The data are the paper's three Gaussians and the reward is linear-Gaussian, so the answer is known in "
        "closed form."
    )

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        fit_config: str = "configs/gmm/mfm.yaml",
        draws: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
        num_samples: int = 256,
        num_reference: int = 4096,
        seeds: Sequence[int] = (0, 1, 2),
        steps: int = 100,
        power: float = 1.5,
        particles: int = 4096,
        glass_steps: int = 8,
        transitions: int = 20,
        ascent: int = 50,
        max_diffusion: float = 25.0,
        max_rows: int = 2048,
    ) -> None:
        if num_reference % num_samples or num_reference < num_samples or particles < num_samples:
            raise ValueError(
                f"num_reference {num_reference} must be a multiple of num_samples {num_samples}, and particles "
                f"{particles} at least as many"
            )
        self.model, self.fit_config, self.draws, self.seeds = model, fit_config, sorted(draws), list(seeds)
        self.num_samples, self.num_reference, self.steps, self.particles = num_samples, num_reference, steps, particles
        self.glass_steps, self.transitions, self.power, self.ascent = glass_steps, transitions, power, ascent
        self.max_diffusion, self.max_rows = max_diffusion, max_rows
        self._fit = Fit(fit_config, model)
        if not self.draws or not self.seeds or self.draws[0] < 1:
            raise ValueError("draws and seeds need at least one number each, draws from 1")

    def shrink(self) -> None:
        self.draws, self.seeds = [n for n in self.draws if n <= 16] or self.draws[:1], self.seeds[:1]
        self.num_samples, self.steps = min(128, self.num_samples), min(50, self.steps)
        self.num_reference = self.num_samples * max(1, self.num_reference // self.num_samples)
        self.particles = min(512, self.particles)
        if not self._fit.is_done():  # a model of a few seconds, in a place of its own
            self.model = str(self.output / "models" / "model.safetensors")
            options = {"trainer.default_root_dir": str(self.output / "models"), "trainer.logger": False}
            steps = {"trainer.max_steps": 1500, "trainer.val_check_interval": 1500, "trainer.limit_val_batches": 0}
            self._fit = Fit(self.fit_config, self.model, options | steps)

    @property
    def noise(self) -> str:
        return f"{self.num_samples} samples and {self.num_reference} exact ones of seeds {self.seeds}"

    def missing(self) -> list[str]:
        if Path(self.model).is_file() or self.model == DEFAULT_MODEL or self.model.startswith(str(self.output)):
            return []
        return [f"model: no model at {self.model}; only {DEFAULT_MODEL} is fitted here"]

    def fits(self) -> list[Fit]:
        return [self._fit]

    def prepare(self) -> None:
        self._oracle = GaussianMixtureDataModule().oracle
        self._reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.2)
        self._exact = self._oracle.tilted(self._reward)
        model = load_model(self.model).requires_grad_(False).to(self.device)
        self._target, self._exact_target = Target(model, self._reward), Target(self._oracle, self._reward)

    def _methods(self) -> dict[Key, AlignmentMethod]:
        grid, found = TimeGrid(self.steps, power=self.power), {}
        for dynamics in ("ode", "sde"):

            def steering(estimator: GradientEstimator, dynamics: str = dynamics) -> Steering:
                return Steering(estimator, grid, dynamics, max_diffusion=self.max_diffusion)

            words = dynamics.upper()
            for n in self.draws:
                found[f"MFM-G, {words}", n] = steering(DrawGradient(n, max_rows=self.max_rows))
                if n > 1:
                    found[f"MFM-GF, {words}", n] = steering(DrawGradientFree(n, max_rows=self.max_rows))
            if dynamics == "ode":
                for n in self.draws[self.draws[0] < 2 :]:
                    found[DIAMOND[0], n] = steering(DiamondGradient(n, max_rows=max(n, self.max_rows)))
                    found[DIAMOND[1], n] = steering(DiamondGradientFree(n, max_rows=max(n, self.max_rows)))
            found[f"DPS, {words}", 0] = steering(DPSGradient())
            found[f"flow map's end, {words}", 0] = steering(FlowMapGradient())
            found[f"{EXACT}, {words}", 0] = steering(ExactGradient(self._oracle))
        smc = {"num_particles": self.particles, "keep": "all", "max_diffusion": self.max_diffusion}
        found["SMC-TDS", 0] = TwistedSMC(DPSGradient(self.max_rows), clip=3.0, grid=grid, **smc)
        found["FK, SDE", 0] = FeynmanKac(grid=grid, **smc)
        # with the exact drift, value and gradient: what particles alone cost
        found[f"{EXACT}, SMC-TDS", 0] = TwistedSMC(ExactGradient(self._oracle), grid=grid, **smc)
        glass = {"transition": "glass", "posterior": GlassPosterior(self.glass_steps, "heun")}
        found["FK, GLASS", 0] = FeynmanKac(grid=TimeGrid(self.transitions), **smc, **glass)
        found[FRESH, 0] = FeynmanKac(grid=TimeGrid(self.transitions), correlation=0.0, **smc, **glass)
        found["FMTT", 0] = TrajectoryTilting(grid=grid, max_rows=self.max_rows, **smc)
        found[NOISE, 0] = NoiseOptimisation(self.ascent)
        return found

    def cells(self) -> Sequence[Cell]:
        self._cells: dict[Key, list[Cell]] = {}
        shared = {
            "model": fingerprint(self.model), "samples": self.num_samples, "reference": self.num_reference,
            "steps": self.steps, "power": self.power, "clamp": self.max_diffusion,
        }  # fmt: skip
        smc = {"particles": self.particles, "transitions": self.transitions, "glass": f"{self.glass_steps} Heun"}
        methods: dict[Key, AlignmentMethod | None] = {(FLOOR, 0): None, **self._methods()}
        for (name, n), method in methods.items():
            for seed in self.seeds:
                identity = {**shared, "seed": seed, **(smc if name in PARTICLES else {})}
                if name == NOISE:
                    identity["iterations"] = self.ascent
                words = f", N = {n}" if n else ""
                cell = Cell(f"{name}{words}, seed {seed}", identity, self._work(name, method, seed))
                self._cells.setdefault((name, n), []).append(cell)
        # seed by seed, so that an interrupted run has whole comparisons
        return [cells[i] for i in range(len(self.seeds)) for cells in self._cells.values()]

    def _work(self, name: str, method: AlignmentMethod | None, seed: int) -> Callable[[], Outcome]:
        def compute() -> Outcome:
            generator = torch.Generator().manual_seed(seed)
            reference, again = (
                self._exact.sample(self.num_reference, generator),
                self._exact.sample(self.num_samples, generator),
            )
            numbers: dict[str, Any] = {"nfe": 0.0}
            states = again
            if method is not None:
                target = self._exact_target if name.startswith(EXACT) else self._target
                target.meter = Meter()
                x0 = noise(1 if isinstance(method, Particles) else self.num_samples, (2,), seed, self.device)
                drawn = method(target, x0, torch.Generator().manual_seed(1000 + seed)).states
                numbers = {"nfe": target.meter.total / len(drawn)}
                chosen = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))[: self.num_samples]
                states = drawn.cpu() if len(drawn) == self.num_samples else drawn[chosen].cpu()
            directions = torch.Generator().manual_seed(0)
            found = {
                "W2": resampled(sliced_wasserstein, states.double(), reference.double(), 128, directions),
                "MMD": resampled(mmd, states, reference),
            }
            numbers |= {what: distance.value for what, distance in found.items()}
            return Outcome(numbers, {"states": states, **{k: distance.replicates for k, distance in found.items()}})

        return compute

    def report(self, results: Results) -> Sequence[Block]:
        done = {key: parts for key, cells in self._cells.items() if (parts := results.all(cells)) is not None}
        if not done:
            return [no_result(results)]
        found = {key: {what: _over_seeds(key[0], what, parts) for what in DISTANCES} for key, parts in done.items()}
        caption = (
            f"{self.num_samples} samples of each method are compared with {self.num_reference} exact ones; "
            f"{_seeds(len(self.seeds))}, {self.steps} steps. Lower is better. The floor is the distance between two "
            "sets of exact samples: no method can be reliably below it."
        )
        below = " The estimate is unbiased, so it can be negative; the axis is linear below 0.001."
        clouds = (
            "Samples of one seed. Contours contain 50, 90 and 99 % of the exact tilted distribution; grey dots are the "
            "base mixture. Samples that cover the contours evenly are right."
        )
        return [
            *self._summary(found),
            *self._headline(found),
            Picture(
                "w2", "Sliced W2 to the exact tilted distribution", self._plot(found, "W2", "sliced W2", "log"), caption
            ),
            Picture(
                "mmd",
                "MMD to the exact tilted distribution",
                self._plot(found, "MMD", "MMD", "symlog"),
                caption + below,
            ),
            Picture("samples", "Samples against the exact density", self._clouds(done), clouds),
            self._claims(found),
            Table(
                "distances", "All results", self._rows(done, found), caption, keys=["method", "N"],
                only=[f"{name}, N = {n}, seed" if n else f"{name}, seed" for name, n in done],
            ),
        ]  # fmt: skip

    def described(self) -> dict[str, Any]:
        settings = {"samples": self.num_samples, "seeds": list(self.seeds)}
        methods = self._methods()
        last = {name: (n, method) for (name, n), method in methods.items()}
        return {
            name: {**settings, "N": [n for (other, n) in methods if other == name and n] or None, **described(method)}
            for name, (_, method) in last.items()
        }

    def _summary(self, found: dict[Key, dict[str, Measured]]) -> list[Block]:
        """Each of our methods with its largest N, a rule that no result chooses; the others; what draws do."""
        ours = {name: by_draws for name in OURS if (by_draws := _by_draws(found, name, "W2"))}
        if not ours:
            return []
        last = {_spoken(name, max(by_draws)): by_draws[max(by_draws)] for name, by_draws in ours.items()}
        values = [f"{rounded(value.value)} for {name}" for name, value in last.items()]
        said = f"The sliced W2 to the exact distribution, of each method with its largest N, is {listed(values)}"
        if (FLOOR, 0) in found:
            said += f"; two sets of exact samples have {rounded(found[FLOOR, 0]['W2'].value)}"
        sentences = [f"{said}."]
        others = {
            _spoken(name, n): by_draws[n]
            for name in dict.fromkeys(name for name, _ in found)
            if name not in OURS and not _is_reference(name)
            for by_draws in [_by_draws(found, name, "W2")]
            for n in [max(by_draws)]
        }
        if others:
            best = min(others, key=lambda name: others[name].value)
            words = verdict(others[best], last, "further away than", "closer than")
            sentences.append(f"Of the other methods, {best} has the smallest ({rounded(others[best].value)}): {words}.")
        for name, by_draws in ours.items():
            if len(by_draws) > 1:
                sentences.append(change(_spoken(name), "sliced W2", by_draws))
                break
        return [Summary(sentences)]

    def _rows(self, done: dict[Key, list[Outcome]], found: dict[Key, dict[str, Measured]]) -> list[dict[str, Any]]:
        rows = []
        for (name, n), parts in done.items():
            row: dict[str, Any] = {"method": name, "N": n or None}
            for what in DISTANCES:
                values = torch.tensor([o.numbers[what] for o in parts])
                row |= {
                    what: found[name, n][what],
                    f"{what} std of seeds": float(values.std()) if len(parts) > 1 else None,
                }
            rows.append({**row, "NFE per sample": round(parts[0].numbers["nfe"])})
        return rows

    def _headline(self, found: dict[Key, dict[str, Measured]]) -> list[Block]:
        items = []
        for name in OURS:
            mine = _by_draws(found, name, "W2")
            if mine:
                items.append(_large(mine[max(mine)], f"sliced W2 of {name} with N = {max(mine)}"))
        if (FLOOR, 0) in found:
            items.append(_large(found[FLOOR, 0]["W2"], "sliced W2 of exact samples: the floor"))
        return [Headline(items)]

    def _plot(self, found: dict[Key, dict[str, Measured]], what: str, words: str, yscale: str) -> LineChart:
        panels: dict[str, dict[str, Any]] = {}
        for dynamics in ("ODE", "SDE"):
            lines: dict[str, Any] = {}
            for method in ("MFM-G", "MFM-GF", "Diamond-G", "Diamond-GF"):
                if values := _by_draws(found, f"{method}, {dynamics}", what):
                    lines[method] = list(values.items())
            own = [f"{name}, {dynamics}" for name in ("DPS", "flow map's end", EXACT)]
            for name in (*own, *PARTICLES, NOISE, FLOOR):
                if (name, 0) in found:
                    shown = name if name in PARTICLES else name.removesuffix(f", {dynamics}")
                    lines[shown] = found[name, 0][what]
            panels[dynamics] = lines
        ours = [name.partition(",")[0] for name in OURS]
        return plots.lines(panels, "posterior draws N", words, yscale=yscale, ours=ours, baselines=[EXACT, FLOOR])

    def _clouds(self, done: dict[Key, list[Outcome]]) -> CloudChart:
        most = max(self.draws)
        some = (self.draws[0], self.draws[len(self.draws) // 2])
        wanted = [key for key in done if key[1] in (0, most) or (key[0] == "MFM-G, ODE" and key[1] in some)]
        panels = {_named(name, n): done[name, n][0].tensors["states"] for name, n in wanted}

        def density(points: Tensor) -> Tensor:
            return self._exact.log_prob(1.0, points)

        return plots.clouds(
            panels,
            density,
            self._exact.sample(20000, torch.Generator().manual_seed(5)),
            self._oracle.sample(1500, torch.Generator().manual_seed(6)),
            ours=[_named(name, n) for name, n in wanted if name in OURS],
        )

    def _claims(self, found: dict[Key, dict[str, Measured]]) -> Claims:
        lines = []
        for name in (*OURS, *DIAMOND):
            mine = _by_draws(found, name, "W2")
            if len(mine) < 2:
                continue
            lines.append(change(_spoken(name), "W2", mine))
            family = name.partition("-")[0]  # others of several N are there with the largest
            largest = {other: n for other, n in found if not other.startswith(family)}
            others = {_spoken(other, n): found[other, n]["W2"] for other, n in largest.items()}
            lines.append(f"{_spoken(name, max(mine))}: W2 is {verdict(mine[max(mine)], others)}.")
        return Claims("Differences that the intervals decide", lines)


def _named(name: str, n: int) -> str:
    return f"{name}, N = {n}" if n else name


def _spoken(name: str, n: int = 0) -> str:
    """A method's name in a sentence, where commas are between names: MFM-G (ODE, N = 16)."""
    head, *rest = name.removesuffix(" (floor)").split(", ")
    rest += [f"N = {n}"] if n else []
    return f"{head} ({', '.join(rest)})" if rest else head


def _is_reference(name: str) -> bool:
    return name == FLOOR or name.startswith(EXACT)


def _by_draws(found: dict[Key, dict[str, Measured]], name: str, what: str) -> dict[int, Measured]:
    """A method's numbers by N."""
    return {n: value[what] for (other, n), value in found.items() if other == name}


def _over_seeds(name: str, what: str, parts: list[Outcome]) -> Measured:
    """Samples of a run are independent, and resampled; particles of one population are not: there only runs count. The
    difference of the two kinds is Welch's."""
    if name in PARTICLES:
        return of_runs([o.numbers[what] for o in parts])
    return mean([Measured(o.numbers[what], o.tensors[what], samples=len(o.tensors["states"])) for o in parts])


def _seeds(number: int) -> str:
    """How many seeds, and what the intervals are over where it is one."""
    if number > 1:
        return f"{number} seeds"
    return "1 seed, so that intervals are over its samples only, and methods of one population of particles have none"


def _large(number: Measured, words: str) -> tuple[str, str]:
    return rounded(number.value), f"({rounded(number.low)} to {rounded(number.high)}) {words}"
