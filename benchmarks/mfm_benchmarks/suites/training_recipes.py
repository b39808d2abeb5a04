"""Training recipes by the time until draws are good: distance to reference draws against wall time and samples seen."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import LineChart
from mfm_benchmarks.claims import TIMES, counted
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.parts.recipe_samples import RecipeSamples
from mfm_benchmarks.parts.reference_draws import ReferenceDraws
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, no_result
from mfm_lightning.checkpoints import is_there, load_model
from mfm_lightning.metrics.measured import Measured, of_runs, ratio_of_runs, rounded

NO_DIFFERENCE, MISSED = "No significant difference", "Does not reach the distance"

Found = dict[tuple[str, int], dict[int, float]]  # distances by recipe, steps and seed
WARM_UP, TIMED_STEPS = 20, 120  # steps of a run that times steps


@dataclass
class Recipe:
    """A way to train, as changes of the suite's config.

    Args:
        options: dotted keys of the config and their values.
        quick: whether --quick has it.
        about: a word on it for the table.
    """

    options: Spec = field(default_factory=lambda: Spec({}))
    quick: bool = False
    about: str = ""


class TrainingRecipesSuite(Suite):
    """Each recipe is trained anew for each number of steps and seed, so that its schedule ends there, and judged by the
    sliced W2 of one-step posterior draws to reference draws. Steps are timed apart, in turns, in one process.

    Args:
        fit_config: of `mfm fit`; the recipes change it.
        recipes: by the names of the report; the first is the reference.
        draws: what draws are compared with.
        steps: numbers of optimiser steps of the reference; other recipes take as many.
        seeds: of the trainings.
        fits: jobs that make what the config needs, by the file that each writes.
        rounds: how often the steps of each recipe are timed, all in turns.
        samples: images of which the Fréchet distance is told besides; None where there are none.
        precision: `trainer.precision` of all recipes but those that have one of their own; the config's where None.
    """

    name = "training-recipes"
    title = "Training recipes: time until draws are good"
    about = (
        "Recipes for training a Meta Flow Map: the distance of one-step posterior draws to reference draws, against "
        "wall time and the number of training samples; all timed in turns on one machine."
    )
    intervals = (
        "Intervals are 95 % intervals by Student's t over trainings (seeds); ratios are paired by the seed. Times are "
        "of steps that were measured in turns. With one seed there is no interval, and nothing is called faster."
    )

    def __init__(
        self,
        fit_config: str,
        recipes: dict[str, Recipe],
        draws: ReferenceDraws,
        steps: Sequence[int] = (1500, 3000, 6000),
        seeds: Sequence[int] = (0, 1, 2),
        fits: dict[str, str] | None = None,
        rounds: int = 3,
        samples: RecipeSamples | None = None,
        precision: str | None = None,
    ) -> None:
        self.fit_config, self.recipes, self.draws = fit_config, dict(recipes), draws
        self.steps, self.seeds, self.files, self.rounds = sorted(steps), list(seeds), dict(fits or {}), rounds
        self.samples, self.precision = samples, precision
        if not self.recipes or not self.seeds or not self.steps or min(self.steps) <= WARM_UP or rounds < 1:
            raise ValueError(f"a comparison needs a recipe, a seed, a round, and more than {WARM_UP} steps")
        self._skipped: dict[str, str] = {}

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def shrink(self) -> None:
        self.steps, self.seeds, self.rounds = (
            [max(WARM_UP + 1, step // 8) for step in self.steps[:2]],
            self.seeds[:1],
            1,
        )
        self.draws.shrink()
        if self.samples is not None:
            self.samples.shrink()
        first = next(iter(self.recipes))
        for name in [name for name, recipe in self.recipes.items() if not recipe.quick and name != first]:
            self._skipped[name] = "not in --quick, to save time"
            del self.recipes[name]

    def missing(self) -> list[str]:
        quality = self.samples.quality.missing() if self.samples is not None else []
        return [*self.draws.missing(made=list(self.files)), *quality]

    def fits(self) -> list[Fit]:
        return [Fit(config, file) for file, config in self.files.items() if not is_there(file)]

    def prepare(self) -> None:
        self.draws.prepare(self.device)
        if self.samples is not None:
            self.samples.prepare(self.device)

    def cells(self) -> Sequence[Cell]:
        references = tuple(self.draws.cells())
        self._timing = Cell("seconds a step", self._of_all(), self._time, alone=True)
        self._trained: dict[tuple[str, int, int], Cell] = {}
        for seed, steps, name in itertools.product(self.seeds, self.steps, self.recipes):
            job = self._job(name, steps, seed)
            identity = {**self.draws.identity, "fit": job.identity()}
            if self.samples is not None:
                identity["samples"] = self.samples.identity
            compute = partial(self._judge, job.file)
            self._trained[name, steps, seed] = Cell(
                f"{name}, {steps} steps, seed {seed}", identity, compute, references, job
            )
        return [*references, self._timing, *self._trained.values()]

    def _of_all(self) -> dict[str, Any]:
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        jobs = [self._job(name, TIMED_STEPS, 0).identity() for name in self.recipes]
        return {"recipes": json.loads(json.dumps(jobs)), "rounds": self.rounds, "threads": threads}

    def _job(self, name: str, steps: int, seed: int, kind: str = "models") -> Fit:
        folder = self.output / kind / f"{name.replace(' ', '_').replace('/', '_')}_{steps}_{seed}"
        options = {
            "trainer.default_root_dir": str(folder), "trainer.logger": False, "seed_everything": seed,
            "trainer.max_steps": steps, "trainer.val_check_interval": steps, "trainer.limit_val_batches": 0,
            **({} if self.precision is None else {"trainer.precision": self.precision}),
            **self.recipes[name].options.value,
        }  # fmt: skip
        return Fit(self.fit_config, str(folder / "model.safetensors"), options, list(self.files), remember=True)

    def _judge(self, file: str, *references: Outcome) -> Outcome:
        model = load_model(file).requires_grad_(False).to(self.device).eval()
        outcome = self.draws.judge(model, references)
        if self.samples is not None:
            outcome.numbers["frechet"] = self.samples.judge(model)
        return outcome

    def _time(self) -> Outcome:
        """Seconds a step and samples of a step, by recipe and round."""
        seconds: dict[str, list[float]] = {name: [] for name in self.recipes}
        samples = {}
        for _ in range(self.rounds):
            for name in self.recipes:
                job = self._job(name, TIMED_STEPS, 0, "timing")
                file = Path(job.file).with_name("step.json")
                timer = {
                    "class_path": "mfm_benchmarks.parts.step_timer.StepTimer",
                    "init_args": {"file": str(file), "first": WARM_UP},
                }
                job.options |= {"trainer.callbacks": [timer], "checkpoint.every_n_steps": TIMED_STEPS}
                job.run(self.device)
                found = json.loads(file.read_text())
                seconds[name].append(found["seconds"])
                samples[name] = found["samples"]
        return Outcome({"seconds": seconds, "samples": samples})

    # what is made of it

    def report(self, results: Results) -> Sequence[Block]:
        first = next(iter(self.recipes))
        found: Found = {}
        frechet: dict[str, dict[int, float]] = {}
        for (name, steps, seed), cell in self._trained.items():
            if cell in results:
                numbers = results[cell].numbers
                found.setdefault((name, steps), {})[seed] = numbers["distance"]
                if "frechet" in numbers and steps == self.steps[-1]:
                    frechet.setdefault(name, {})[seed] = numbers["frechet"]
        if not found:
            return [no_result(results)]
        why = "the time of a step was not measured" if self._timing not in results else ""
        if not any(name == first for name, _ in found):
            why = f"there is no training of {first}, which the others are compared with"
        if why:
            return [self._distances(found, frechet, why)]
        seconds, samples = (results[self._timing].numbers[key] for key in ("seconds", "samples"))
        a_step = {name: of_runs(values).value for name, values in seconds.items()}
        rows, gains = [], {}
        for name in self.recipes:
            gains[name] = self._time_ratio(name, first, found, a_step)
            row: dict[str, Any] = {"recipe": name, "what": self.recipes[name].about}
            row["time of a step"] = ratio_of_runs(seconds[name], seconds[first])
            row |= self._distances_of(name, found)
            row["time to the same distance"] = gains[name]
            rows.append(row | self._frechet_of(name, frechet))
        caption = (
            f"{self.draws.words}; {counted(len(self.seeds), 'training')} of each recipe. Lower is better. Time of a "
            f"step: ratio to that of {first}, of {counted(self.rounds, 'round')} in turns. Time to the same distance: "
            f"time until a recipe has the distance that {first} has after {self.steps[-1]} steps, as a ratio to the "
            f"time of {first}; interpolated between a recipe's own trainings on logarithmic scales, or extrapolated to "
            "at most twice the longest. Where the shortest training has it already, it counts whole: an upper bound."
        )
        times = self._plot(found, lambda name, steps: steps * a_step[name], "seconds of training steps")
        seen = self._plot(found, lambda name, steps: steps * samples[name], "samples seen")
        return [
            self._summary(gains, first),
            self._headline(gains, first),
            Picture("time", "Distance by wall time", times, caption),
            Picture("samples", "Distance by samples seen", seen, caption),
            self._claims(gains, first),
            Table("recipes", "All recipes", rows, caption, keys=["recipe"]),
        ]

    def _distances_of(self, name: str, found: Found) -> dict[str, Any]:
        return {
            f"distance, {steps} steps": of_runs(list(found[name, steps].values()))
            for steps in self.steps
            if (name, steps) in found
        }

    def _frechet_of(self, name: str, frechet: dict[str, dict[int, float]]) -> dict[str, Any]:
        """After the most steps; nothing where samples are not judged."""
        if self.samples is None or name not in frechet:
            return {}
        return {self.samples.column: of_runs(list(frechet[name].values()))}

    def _distances(self, found: Found, frechet: dict[str, dict[int, float]], why: str) -> Table:
        """What there is where times cannot be compared; and the ratio to the first recipe's distance after as many
        steps, paired by the seed."""
        first, rows = next(iter(self.recipes)), []
        for name in self.recipes:
            if not any(name == each for each, _ in found):
                continue
            row = {"recipe": name, "what": self.recipes[name].about, **self._distances_of(name, found)}
            for steps in self.steps:
                mine, theirs = found.get((name, steps), {}), found.get((first, steps), {})
                if name != first and (seeds := sorted(mine.keys() & theirs.keys())):
                    ratio = ratio_of_runs([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
                    row[f"to {first}'s, {steps} steps"] = ratio
            rows.append(row | self._frechet_of(name, frechet))
        return Table("recipes", "Distances alone", rows, f"{self.draws.words}; no times, for {why}.", keys=["recipe"])

    def _summary(self, gains: dict[str, Measured | None], first: str) -> Summary:
        """The fastest recipe; how many are faster, slower or neither; what was compared."""
        there = {n: g for n, g in gains.items() if n != first and g is not None and g.value < math.inf}
        said = [f"No other recipe reaches the distance of {first}."]
        if there:
            best = min(there, key=lambda name: there[name].value)
            time = there[best].text(2) if not math.isnan(there[best].low) else rounded(there[best].value, 2)
            said = [f"{best} takes {time} times the time of {first} to the same distance, the least of all recipes."]
            sides = [gain.side(1.0) for gain in there.values()]
            said.append(
                f"Of {len(there)} recipes that reach it, {sides.count(-1)} are significantly faster than {first} and "
                f"{sides.count(1)} significantly slower."
            )
        said.append(f"Each recipe was trained {counted(len(self.seeds), 'time')}, with up to {self.steps[-1]:,} steps.")
        return Summary(said)

    def _headline(self, gains: dict[str, Measured | None], first: str) -> Headline:
        there = {name: gain for name, gain in gains.items() if gain is not None and gain.value < math.inf}
        if not there:
            return Headline([("none", f"of the recipes reaches the distance of {first}")])
        name = min(there, key=lambda name: there[name].value)
        return Headline([(f"{there[name].value:.2f} {TIMES}", f"the time of {first} to the same distance: {name}")])

    def _time_ratio(self, name: str, first: str, found: Found, a_step: dict[str, float]) -> Measured | None:
        """Time to the reference's last distance over the time that it took, by the seeds whose trainings are all there;
        None where that is none, infinite where a recipe does not come to it."""
        trainings = [found.get((name, steps), {}) for steps in self.steps]
        goals, ratios = found.get((first, self.steps[-1]), {}), []
        for seed, goal in goals.items():
            if all(seed in training for training in trainings):
                steps = steps_to(goal, self.steps, [training[seed] for training in trainings])
                ratios.append(steps * a_step[name] / (self.steps[-1] * a_step[first]))
        if not ratios:
            return None
        if math.inf in ratios:
            return Measured(math.inf, torch.empty(0))
        return ratio_of_runs(ratios, [1.0] * len(ratios))

    def _claims(self, gains: dict[str, Measured | None], first: str) -> Claims:
        words: dict[str, list[str]] = {"Faster": [], "Slower": [], NO_DIFFERENCE: [], MISSED: []}
        for name, gain in gains.items():
            if name == first or gain is None:
                continue
            if gain.value == math.inf:
                words[MISSED].append(name)
            else:
                kind = {-1: "Faster", 1: "Slower", 0: NO_DIFFERENCE}[gain.side(1.0)]
                words[kind].append(f"{name} ({gain.text()})")
        said = [f"{kind}: {', '.join(names)}." for kind, names in words.items() if names]
        return Claims(f"Time to the distance of {first}, as a ratio to its own time", said)

    def _plot(self, found: Found, place: Callable[[str, int], float], label: str) -> LineChart:
        lines = {
            name: [
                (place(name, steps), of_runs(list(found[name, steps].values())))
                for steps in self.steps
                if (name, steps) in found
            ]
            for name in self.recipes
        }
        ylabel = self.draws.words.partition(",")[0]
        return plots.lines({"": lines}, label, ylabel, yscale="log", mark=False, baselines=[next(iter(self.recipes))])


def steps_to(goal: float, steps: Sequence[int], distances: Sequence[float]) -> float:
    """Steps after which a recipe has the distance `goal`, between its trainings by a line on logarithmic scales; those
    of the shortest one where that has it already, so that they are at most so many; beyond the longest one by the line
    of the last two, at most to twice of it; infinite where it is not reached. Without the last rule one training of
    many that ends just above the goal would make the mean infinite."""
    pairs = [(math.log(s), math.log(d)) for s, d in zip(steps, distances, strict=True)]
    aim = math.log(goal)

    def crossing(k: int) -> float:
        """Steps at which the line through trainings k and k + 1 is at the goal."""
        (s0, d0), (s1, d1) = pairs[k], pairs[k + 1]
        return math.exp(s0 + (s1 - s0) * (aim - d0) / (d1 - d0))

    falls = [after < before for (_, before), (_, after) in itertools.pairwise(pairs)]
    if pairs[0][1] <= aim:  # how much sooner was not measured
        return float(steps[0])
    for k, (_, distance) in enumerate(pairs[1:]):
        if distance <= aim:
            return crossing(k)
    beyond = crossing(-2) if falls and falls[-1] else math.inf
    return beyond if beyond <= 2 * steps[-1] else math.inf
