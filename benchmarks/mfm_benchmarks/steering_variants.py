"""Variants of MFM-G at equal evaluations: noise kept between steps, antithetic draws, draws that grow with time, draws
of earlier steps used again, steps placed by a pilot, and an amortised value beside a draw; reward, realism, and shares
of classes, from the same noise:

    python -m mfm_benchmarks.steering_variants [--value outputs/mnist/value/value.safetensors] [--budget 90]

By the MNIST model of the package. A step with N draws takes 4 N + 1 evaluations: N draws and rewards forward and
backward, and the drift; an amortised value takes 2. Each variant has as many steps as the budget has room for.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mfm_benchmarks.mnist_steering import REWARDS, Judged, MnistSteering
from mfm_lightning.alignment.method import TimeGrid
from mfm_lightning.alignment.steering import Steering, steer
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawGradient, Estimate, GradientEstimator, NetworkGradient
from mfm_lightning.interpolant import Generators, Times, as_times, diffusion
from mfm_lightning.metrics.distances import frequency_distance
from mfm_lightning.metrics.measured import mean_of, resampled
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.devices import find_device
from mfm_rewards.execution import autocast

FIRST, MIXTURE = "a draw a step, fresh noise", "odd classes"


class KeptNoise(DrawGradient):
    """MFM-G whose draws have the same noise at each step (common random numbers)."""

    kept: Tensor | None = None

    def noise(self, x: Tensor, generator: Generators) -> Tensor:
        if self.kept is None or len(self.kept) != len(x):
            self.kept = super().noise(x, generator)
        return self.kept


class Growing(GradientEstimator):
    """MFM-G whose number of draws is another at each step.

    Args:
        numbers: of draws, by the number of the step.
    """

    needs_reward_gradient = True

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers, self.step = list(numbers), 0

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        found = DrawGradient(self.numbers[self.step])(target, t, x, generator)
        self.step += 1
        # one form at all steps: the other one needs two draws
        return Estimate(found.gradient, found.value, found.ess)


class Between(GradientEstimator):
    """A share of the gradient of an amortised value, and the rest that of a draw.

    Args:
        network: of the value.
        share: of it, in [0, 1].
    """

    needs_reward_gradient = True

    def __init__(self, network: NetworkGradient, share: float) -> None:
        self.network, self.share = network, share

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        drawn, amortised = (part(target, t, x, generator) for part in (DrawGradient(), self.network))
        gradient = (1 - self.share) * gradient_of(drawn) + self.share * gradient_of(amortised)
        return Estimate(gradient, drawn.value, drawn.ess)


@dataclass
class Reused(GradientEstimator):
    """MFM-G whose steering is made of earlier draws, too: P = (sigma^2/2) grad V, which varies less with t than grad V.

    Args:
        keep: what is kept of the earlier steps' P; the rest is of a new draw.
        held: steps for which a draw's P is used; those without a draw evaluate the drift alone.
        corrected: the earlier P is first moved to the new state by the new draw, P(x_k) - P(x_{k-1}) with its noise: a
            control variate (STORM, Cutkosky & Orabona, arXiv 1905.10018), at twice the draws.
    """

    keep: float = 0.0
    held: int = 1
    corrected: bool = False
    needs_reward_gradient = True

    def __post_init__(self) -> None:
        self.step, self.last, self.before = 0, None, None

    def __call__(self, target: Target, t: Times, x: Tensor, generator: Generators = None) -> Estimate:
        half = float(diffusion(torch.as_tensor(t).reshape(-1)[0]))  # all samples have the same time
        if self.last is not None and self.step % self.held:
            found, value = self.last, x.new_zeros(len(x))
        else:
            draw = KeptNoise()  # of its own noise, also at the earlier state
            estimate = draw(target, t, x, generator)
            found, value = half * gradient_of(estimate), estimate.value
            if self.last is not None:
                earlier = self.last
                if self.corrected and self.before is not None:
                    then, state, weight = self.before
                    earlier = earlier + found - weight * gradient_of(draw(target, then, state))
                found = self.keep * earlier + (1 - self.keep) * found
        self.step, self.last, self.before = self.step + 1, found, (t, x.clone(), half)
        return Estimate(found / half, value, torch.ones_like(value))


def gradient_of(estimate: Estimate) -> Tensor:
    """The gradient, which is there."""
    assert estimate.gradient is not None
    return estimate.gradient


@dataclass
class PlacedTimes(TimeGrid):
    """Times that are given.

    Args:
        given: the times, increasing, the first and the last included.
    """

    given: tuple[float, ...] = ()

    @property
    def times(self) -> list[float]:
        return list(self.given)


def placed(steps: int, target: Target, noise: Tensor, strength: float = 1.0, pilot: int = 50) -> PlacedTimes:
    """Times placed by how fast steering changes in a run of `pilot` steps with kept noise: a step's error is that
    change times its length squared, so the density of steps is the root. The pilot's evaluations are not counted."""
    method = Steering(KeptNoise(), TimeGrid(pilot), strength=strength, clip=2.0, base_step="flow_map")
    states = [noise]
    steer(target, noise, method, torch.Generator(noise.device).manual_seed(2), lambda k, x: states.append(x))
    pairs, rates = method.grid.pairs(None), []
    with torch.no_grad():
        for (now, then), x, after in zip(pairs, states[:-1], states[1:], strict=True):
            base = target.expand(x).base_flow_map(as_times(now, x), then, x)
            rates.append((after - base).double() / (then - now))
    turns = [(b - a).flatten(1).norm(dim=1).mean().sqrt().item() for a, b in itertools.pairwise(rates)]
    density = np.asarray([turns[0], *turns])
    edges = np.asarray([now for now, _ in pairs] + [pairs[-1][1]])
    shares = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
    inner = np.interp(np.linspace(0, shares[-1], steps + 1)[1:-1], shares, edges)
    return PlacedTimes(steps, given=(edges[0], *inner.tolist(), edges[-1]))


def growing(budget: int) -> list[int]:
    """Numbers of draws by step: half of the evaluations with one, a quarter each with two and with four."""
    return [n for n, part in ((1, 2), (2, 4), (4, 4)) for _ in range(max(1, round(budget / part / (4 * n + 1))))]


@dataclass
class Variant:
    """A way to steer.

    Attributes:
        estimator: makes one, without what earlier runs have left in it.
        steps: for which the budget has room.
        power: of the time grid.
        pilot: steps are placed by one.
    """

    estimator: Callable[[], GradientEstimator]
    steps: int
    power: float = 1.0
    pilot: bool = False

    def grid(self, target: Target, noise: Tensor, strength: float = 1.0) -> TimeGrid:
        """Times of the steps; a pilot is of 16 samples."""
        if self.pilot:
            return placed(self.steps, target, noise[:16], strength)
        return TimeGrid(self.steps, power=self.power)


def variants(budget: int, value: str | None) -> dict[str, Variant]:
    """By name."""
    numbers, one = growing(budget), budget // 5
    found = {
        FIRST: Variant(DrawGradient, one),
        "the same noise at each step": Variant(KeptNoise, one),
        "two draws": Variant(lambda: DrawGradient(2), budget // 9),
        "two draws, antithetic": Variant(lambda: DrawGradient(2, antithetic=True), budget // 9),
        "two draws, the same noise": Variant(lambda: KeptNoise(2), budget // 9),
        "draws grow with time, 1 to 4": Variant(lambda: Growing(numbers), len(numbers)),
        "draws fall with time, 4 to 1": Variant(lambda: Growing(numbers[::-1]), len(numbers)),
        "half kept from earlier steps": Variant(lambda: Reused(keep=0.5), one),
        "half kept, moved to the new state": Variant(lambda: Reused(keep=0.5, corrected=True), budget // 9),
        "a draw for two steps": Variant(lambda: Reused(held=2), 2 * (budget // 6)),
        "long steps first": Variant(DrawGradient, one, power=0.6),
        "short steps first": Variant(DrawGradient, one, power=1.7),
        "steps placed by a pilot": Variant(DrawGradient, one, pilot=True),
    }
    if value is not None:
        network = NetworkGradient(value)
        found |= {
            "amortised value": Variant(lambda: network, budget // 3),
            "half a draw, half amortised": Variant(lambda: Between(network, 0.5), budget // 7),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--value", help="a value network of the class mixture: mfm fit --config mnist/value")
    parser.add_argument("--budget", type=int, default=90, help="evaluations a sample")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0], help="factors of the steering")
    parser.add_argument("--samples", type=int, default=128, help="of each variant")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--variants", nargs="+", help="names, or how they begin; the first variant is always run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    given = parser.parse_args()
    device = find_device(given.device)
    setup = MnistSteering.prepared(given.samples, device)
    every = variants(given.budget, given.value)
    if given.variants:
        unknown = [name for name in given.variants if not any(each.startswith(name) for each in every)]
        if unknown:
            parser.error(f"no variant begins with {unknown[0]!r}: there are {'; '.join(every)}")
        every = {name: each for name, each in every.items() if name.startswith((FIRST, *given.variants))}
    plain = variants(given.budget, None)
    # the value is that of the class mixture
    names = [(reward, name) for reward in given.rewards for name in every if name in plain or reward == MIXTURE]
    jobs = [(*job, strength) for job in names for strength in given.strengths]
    rows: list[dict[str, object]] = []
    first: dict[str, Judged] = {}
    for reward, name, strength in track(jobs, describe=lambda job: f"{job[0]}: {job[1]}"):
        target = setup.target(reward)
        variant = every[name]
        with autocast(device, given.precision):
            grid = variant.grid(target, setup.noise, strength)
        method = Steering(variant.estimator(), grid, strength=strength, clip=2.0, base_step="flow_map")
        with autocast(device, given.precision):
            result = method(target, setup.noise, torch.Generator(device).manual_seed(1))
        judged = setup.judge(target, result.states)
        reference = first.setdefault(reward, judged)  # the first variant comes first
        numbers = {
            "value": mean_of(judged.rewards),
            "less the first's": mean_of(judged.rewards - reference.rewards),
            "Fréchet, ratio": judged.distance.over(reference.distance),
        }
        said = {key: number.text(3) for key, number in numbers.items()}
        said["L2 to the shares"] = ""
        if reward == MIXTURE:
            weights = torch.tensor(REWARDS[reward][0]["weights"], dtype=torch.float64)
            found = resampled(frequency_distance, setup.quality.classes(judged.features), weights / weights.sum())
            said["L2 to the shares"] = found.text(3)
        nfe = round(result.nfe.total / given.samples)
        rows.append(
            {"reward": reward, "variant": name, "strength": strength, "steps": len(grid.times) - 1, "NFE": nfe, **said}
        )
    title = f"MFM-G at {given.budget} evaluations ({given.samples} samples, {given.precision}, {device})"
    write_table(rows, title, Path("outputs/steering_variants"), "steering_variants")


if __name__ == "__main__":
    main()
