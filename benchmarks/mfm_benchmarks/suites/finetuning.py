"""Fine-tuning methods in one run: reward against evaluations of training, at equal drift from the base flow."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block
from mfm_benchmarks.finetuning import Checkpoint, FineTuning, Problem, Training, train
from mfm_benchmarks.finetuning.evaluation import worth
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.measure import noise
from mfm_benchmarks.models import ModelSettings
from mfm_benchmarks.parts.drift_curves import Curve, Run
from mfm_benchmarks.parts.finetuning_report import FinetuningReport
from mfm_benchmarks.parts.tuned_models import FlowSettings, Rewarded, TunedFlow, TunedMap, TunedModel
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.spec import Spec, build, plain
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, no_result
from mfm_lightning.alignment.target import Target
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Conditions
from mfm_lightning.data.base import StepDataModule
from mfm_rewards import RewardError
from mfm_rewards import build as build_reward

SCALE = "scale"  # the knob that is the reward's multiplier


@dataclass
class TunedReward:
    """A reward that policies are trained on.

    Args:
        reward: a registered name, `{name: ..., options}` or `{class_path: ..., init_args: ...}`.
        scale: its multiplier, times a method's own.
        held_out: rewards that are measured and not trained on, by the names of the report.
    """

    reward: Spec | str
    scale: float = 1.0
    held_out: dict[str, Spec | str] = field(default_factory=dict)


@dataclass
class TunedMethod:
    """A method with a knob of its own that says how far it goes from the base flow.

    Args:
        method: `{class_path: ..., init_args: {...}}` of a `FineTuning`.
        knob: `scale`, the multiplier of the scaled reward, or a key of init_args; None where the end of training alone
            holds it.
        values: of the knob, a training each.
        quick: whether --quick has it.
    """

    method: Spec
    knob: str | None = None
    values: list[float] = field(default_factory=list)
    quick: bool = True


@dataclass(frozen=True)
class Setting:
    """One value of a method's knob: `settings` of the method as JSON, and the `scale` of the reward beside its own."""

    method: str
    label: str
    settings: str
    scale: float

    def build(self) -> FineTuning:
        return build(FineTuning, json.loads(self.settings), f"method {self.method!r}")


def settings_of(name: str, given: TunedMethod) -> list[Setting]:
    """The trainings of a method.

    Raises:
        ValueError: for a knob without values, values without a knob, or what is no method.
    """
    if (given.knob is None) != (not given.values):
        raise ValueError(f"method {name!r}: give a knob and its values, or neither; got {given.knob!r}, {given.values}")
    found = []
    for value in given.values or [None]:
        method = json.loads(json.dumps(given.method.value))
        if value is not None and given.knob != SCALE:
            method.setdefault("init_args", {})[given.knob] = value
        label = "" if value is None else f"{given.knob} {value:g}"
        scale = value if given.knob == SCALE and value is not None else 1.0
        found.append(Setting(name, label, json.dumps(method, sort_keys=True), scale))
        found[-1].build()
    return found


class FinetuningSuite(Suite):
    """Policies of several methods from one base flow, with the same reward, learning rates to choose from, evaluations
    to spend, noise and measures.

    Args:
        rewards: by the names of the report.
        methods: by the names of the report; the first is compared with the others.
        model: the Meta Flow Map, and the base flow that it contains, whose network is trained; or else `flow`.
        flow: a pretrained text-to-image flow, of which a LoRA is trained.
        data: a DataModule, `{class_path: ..., init_args: ...}`, for methods that take clean states of the data.
        training: how all of them are trained.
        learning_rates: for each setting the one is taken with the largest scale x reward - drift of a checkpoint, in a
            run of `tuning_seed`. There are no such runs where there is one rate, and one setting of the method.
        tuning_seed: of that run, of its noise and samples.
        seeds: of the runs that are reported.
        drifts: at which methods are compared, in nats.
        num_samples: samples of a measurement.
        ode_steps: steps of samples that are measured.
        quality: features for the Fréchet distance; without, there is none.
        quick_evaluations: evaluations of a training with --quick.
        quick_samples: samples of a measurement with --quick.

    Raises:
        ValueError: unless there is one of model and flow; for numbers out of range, or methods that cannot be built.
    """

    name = "finetuning"
    title = "Fine-tuning methods at equal drift"
    about = (
        "Fine-tuning to a reward: the mean reward that each method reaches, by the evaluations of networks and "
        "rewards in its training (NFE), and at equal drift from the base flow."
    )
    intervals = (
        "Values have a 95 % interval, beside the number or shaded. With three seeds or more it is over trainings "
        "(Student's t); with fewer it is over the samples of those trainings, and says nothing about other trainings. "
        "The page says “higher” or “lower” only if the interval of the paired difference excludes zero. Each interval "
        "is of one comparison. Seconds are of one run on a machine with other work; evaluations are exact."
    )

    def __init__(
        self,
        rewards: dict[str, TunedReward],
        methods: dict[str, TunedMethod],
        model: ModelSettings | None = None,
        flow: FlowSettings | None = None,
        data: Spec | None = None,
        training: Training | None = None,
        learning_rates: Sequence[float] = (3e-5, 1e-4, 3e-4),
        tuning_seed: int = 0,
        seeds: Sequence[int] = (1, 2, 3),
        drifts: Sequence[float] = (3.0, 10.0, 30.0),
        num_samples: int = 128,
        ode_steps: int = 20,
        quality: Quality | None = None,
        quick_evaluations: int = 12_000,
        quick_samples: int = 64,
    ) -> None:
        self.model, self.flow, self.data = model, flow, data
        self.rewards, self.methods = dict(rewards), dict(methods)
        self.training, self.learning_rates = training or Training(), list(learning_rates)
        self.tuning_seed, self.seeds, self.drifts = tuning_seed, list(seeds), sorted(drifts)
        self.num_samples, self.ode_steps, self.quality = num_samples, ode_steps, quality
        self.quick_evaluations, self.quick_samples = quick_evaluations, quick_samples
        self._skipped: dict[str, str] = {}
        if (model is None) == (flow is None):
            raise ValueError(
                "policies begin as one base flow: give model, a Meta Flow Map, or flow, a text-to-image flow"
            )
        if not all((self.rewards, self.methods, self.learning_rates, self.seeds, self.drifts)):
            raise ValueError("a comparison needs a reward, a method, a learning rate, a seed and a drift at least")
        if tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {tuning_seed} is among the seeds {self.seeds}: what is chosen and what is")
        if min(num_samples, quick_samples, ode_steps) < 2 or min(self.drifts) <= 0 or min(self.learning_rates) <= 0:
            raise ValueError(
                f"num_samples {num_samples}, quick_samples {quick_samples} and ode_steps {ode_steps} must be at least "
                f"2, drifts {self.drifts} and learning_rates {self.learning_rates} above 0"
            )
        if any(reward.scale <= 0 for reward in self.rewards.values()):
            raise ValueError("scales must be above 0; the registered reward `negate` turns a reward round")
        self._settings = {name: settings_of(name, method) for name, method in self.methods.items()}

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def shrink(self) -> None:
        self.rewards = dict(itertools.islice(self.rewards.items(), 1))
        self.seeds, self.num_samples = self.seeds[:1], min(self.quick_samples, self.num_samples)
        self.learning_rates = [sorted(self.learning_rates)[len(self.learning_rates) // 2]]
        self.training.evaluations = min(self.training.evaluations, self.quick_evaluations)
        self.training.checkpoints = [0.3, 1.0]
        for name, method in self.methods.items():
            if method.quick:
                found = self._settings[name]
                self._settings[name] = [found[len(found) // 2]]
            else:
                self._skipped[name] = "not in --quick, to save time (quick: false)"
                del self._settings[name]

    @property
    def noise(self) -> str:
        return f"{self.num_samples} samples of seeds {self.seeds}"

    def missing(self) -> list[str]:
        found = [*(self.model.missing() if self.model else ()), *(self.quality.missing() if self.quality else ())]
        self._built = {}
        for name, settings in self.rewards.items():
            for key, reward in {"": settings.reward, **settings.held_out}.items():
                try:
                    self._built[name, key] = build_reward(plain(reward))
                except RewardError as error:
                    found.append(f"rewards, {name}{key and f', held_out, {key}'}: {error}")
        if self.flow is not None and not found:  # last, for it takes the longest
            try:
                self._subject: TunedModel = TunedFlow(self.flow, self.device)
            except (FileNotFoundError, ImportError, CheckpointError, ValueError) as error:
                found.append(f"flow: {error}")
        return found

    def fits(self) -> list[Fit]:
        return self.model.jobs() if self.model else []

    def prepare(self) -> None:
        if self.model is not None:
            self._subject = TunedMap(self.model, self.device)
        self._loaded: dict[tuple[str, str], Rewarded] = {}
        self._begins: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._rewards: dict[str, list[Any]] = {}  # what results depend on
        for name, settings in self.rewards.items():
            for key, reward in {"": settings.reward, **settings.held_out}.items():
                loaded = self._subject.load(plain(reward), self._built[name, key])
                self._loaded[name, key] = loaded
                self._rewards.setdefault(name, []).append([key, plain(reward), self._subject.probe(loaded)])
        self._data = None if self.data is None else build(StepDataModule, self.data.value, "data")
        if self._data is not None:
            self._data.setup("fit")
            if tuple(self._data.state_shape) != tuple(self._subject.state_shape):
                raise ValueError(
                    f"data of shape {tuple(self._data.state_shape)} for a model of {tuple(self._subject.state_shape)}"
                )
            self._subject.meet(self._data)
            self._subject.of_data(self._data.train_batch(0))  # which raises where its conditions are others
        if self.quality is not None:
            self.quality.prepare(self.device)
        self._identity = {
            **self._subject.identity, "samples": self.num_samples, "ode_steps": self.ode_steps,
            "quality": self.quality and self.quality.identity, "data": plain(self.data),
            "training": repr(self.training),
        }  # fmt: skip

    def cells(self) -> Sequence[Cell]:
        self._cells: dict[tuple[str, Setting], tuple[list[Cell], list[Cell]]] = {}
        found: list[Cell] = []
        for reward, settings in itertools.product(self.rewards, self._settings.values()):
            for setting in settings:
                try:
                    setting.build().check(self._loaded[reward, ""].reward, self._data is not None, self._subject.model)
                except (RewardError, CheckpointError) as error:
                    self._skipped[f"{setting.method}, {reward}"] = str(error)
                    continue
                tuning = [self._tuning_cell(reward, setting, rate) for rate in self.learning_rates]
                if len(settings) == len(tuning) == 1:  # there is nothing to choose
                    tuning = []
                final = [self._cell(reward, setting, seed, tuple(tuning)) for seed in self.seeds]
                self._cells[reward, setting] = tuning, final
                found += [*tuning, *final]
        return found

    def _of(self, reward: str, setting: Setting) -> dict[str, Any]:
        return {
            **self._identity, "method": setting.settings, "scale": [self.rewards[reward].scale, setting.scale],
            "reward": self._rewards[reward],
        }  # fmt: skip

    def _tuning_cell(self, reward: str, setting: Setting, rate: float) -> Cell:
        seed = self.tuning_seed
        identity = {**self._of(reward, setting), "learning_rate": rate, "seed": seed}

        def compute() -> Outcome:
            try:
                return self._run(reward, setting, rate, seed)
            except FloatingPointError as error:  # so this rate is not taken
                return Outcome({"diverged": str(error), "learning_rate": rate})

        return Cell(f"{_named(setting)}, {reward}, learning rate {rate:g}", identity, compute)

    def _cell(self, reward: str, setting: Setting, seed: int, tuning: tuple[Cell, ...]) -> Cell:
        rates = [self.tuning_seed, *self.learning_rates]
        identity = {**self._of(reward, setting), "learning_rates": rates, "seed": seed}

        def compute(*outcomes: Outcome) -> Outcome:
            best = (
                self._best(reward, setting, outcomes).numbers["learning_rate"] if outcomes else self.learning_rates[0]
            )
            return self._run(reward, setting, best, seed)

        return Cell(f"{_named(setting)}, {reward}, seed {seed}", identity, compute, tuning)

    def _best(self, reward: str, setting: Setting, outcomes: Sequence[Outcome]) -> Outcome:
        """Of the runs with different learning rates."""
        scale = self.rewards[reward].scale * setting.scale
        left = [outcome for outcome in outcomes if "diverged" not in outcome.numbers]
        if not left:
            raise FloatingPointError(outcomes[0].numbers["diverged"])
        return max(left, key=lambda outcome: _run_of(outcome).score(scale))

    def _run(self, reward: str, setting: Setting, rate: float, seed: int) -> Outcome:
        """One training with its measurements."""
        problem = self._problem(self._loaded[reward, ""], self.rewards[reward].scale * setting.scale)
        x0, rows = noise(self.num_samples, self._subject.state_shape, seed, self.device), []
        costs: dict[str, list[float]] = {"nfe": [], "network": [], "reward": [], "seconds": [], "step": []}

        def measure(now: Checkpoint) -> None:
            if now.step or (row := self._begins.get((reward, seed))) is None:
                base = self._target(reward, "")
                held = {key: self._target(reward, key) for key in self.rewards[reward].held_out}
                on_policy = base.with_drift(problem.policy.drift)
                row = worth(on_policy, base, x0, seed, held, self.quality, self.ode_steps)
            if not now.step:  # every policy begins as the base flow
                self._begins[reward, seed] = row
            rows.append(row)
            spent = {"nfe": now.meter.total, "network": now.meter.network, "reward": now.meter.reward}
            for name, cost in {**spent, "seconds": now.seconds, "step": now.step}.items():
                costs[name].append(cost)

        train(setting.build(), problem, self.training, rate, seed, measure)
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "images"}
        tensors["images"] = rows[-1]["images"]
        return Outcome({"learning_rate": rate, **costs}, tensors)

    def _target(self, reward: str, key: str) -> Target:
        """For the samples that are measured; of the trained reward, or of a held-out one."""
        x = noise(self.num_samples, self._subject.state_shape, 0, self.device)
        return self._subject.target(self._loaded[reward, key], self.num_samples).expand(x)

    def _problem(self, loaded: Rewarded, scale: float) -> Problem:
        def make_target(conditions: Conditions) -> Target:
            target = loaded(conditions)
            target.reward_scale = scale
            return target

        data = None if self._data is None else _Batches(self._data, self._subject)
        return Problem(*self._subject.policy(), make_target, self._subject.draw, data, self.device)

    def report(self, results: Results) -> Sequence[Block]:
        real = self.quality.gaussian if self.quality is not None else None
        curves: dict[str, list[Curve]] = {}
        for (reward, setting), (tuning, final) in self._cells.items():
            tuned, runs = results.all(tuning), results.all(final)
            if tuned is None or runs is None:
                continue
            best = self._best(reward, setting, tuned) if tuned else runs[0]
            curves.setdefault(reward, []).append(
                Curve(
                    setting.method,
                    setting.label,
                    best.numbers["learning_rate"],
                    [_run_of(outcome, real) for outcome in runs],
                    _run_of(best),
                    runs[0].tensors["images"],
                )
            )
        if not curves:
            return [no_result(results)]
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        seeds = f"for each of {len(self.seeds)} training seeds"
        if len(self.seeds) == 1:
            seeds = "of 1 training seed, so that intervals are over samples, not over trainings"
        samples = f"{self.num_samples} samples {seeds}; learning rates from {rates}, the same for all methods."
        return FinetuningReport(curves, self.drifts, next(iter(self._settings)), samples).blocks()


class _Batches:
    """Clean states of a DataModule's training batches with their conditions, so many at a time."""

    def __init__(self, data: StepDataModule, subject: TunedModel) -> None:
        self.data, self.subject, self.step = data, subject, 0

    def __call__(self, num: int) -> tuple[Tensor, Conditions]:
        states, given, found = [], Conditions(), 0
        while found < num:
            x1, more = self.subject.of_data(self.data.train_batch(self.step))
            given = given.cat(more) if states else more
            states, found, self.step = [*states, x1], found + len(x1), self.step + 1
        rows = slice(num)
        return torch.cat(states)[rows], given.take(rows)


def _named(setting: Setting) -> str:
    return f"{setting.method} ({setting.label})" if setting.label else setting.method


def _run_of(outcome: Outcome, real: Any = None) -> Run:
    costs = {name: list(outcome.numbers[name]) for name in ("nfe", "network", "reward", "seconds", "step")}
    return Run.of(costs, outcome.tensors, real)
