"""Variants of MFM-G at equal evaluations: noise kept between steps, antithetic draws, draws that grow with time, and an
amortised value beside a draw; reward, realism, and shares of classes, from the same noise:

    python -m mfm_benchmarks.steering_variants [--value outputs/mnist/value/value.safetensors] [--budget 90]

By the MNIST model of the package. A step with N draws takes 4 N + 1 evaluations: N draws and rewards forward and
backward, and the drift; an amortised value takes 2. Each variant has as many steps as the budget has room for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mfm_benchmarks.mnist_steering import REWARDS, Judged, MnistSteering
from mfm_lightning.alignment.method import TimeGrid
from mfm_lightning.alignment.steering import Steering
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DrawGradient, Estimate, GradientEstimator, NetworkGradient
from mfm_lightning.interpolant import Generators, Times
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
        assert drawn.gradient is not None  # of both
        assert amortised.gradient is not None
        gradient = (1 - self.share) * drawn.gradient + self.share * amortised.gradient
        return Estimate(gradient, drawn.value, drawn.ess)


def growing(budget: int) -> list[int]:
    """Numbers of draws by step: half of the evaluations with one, a quarter each with two and with four."""
    return [n for n, part in ((1, 2), (2, 4), (4, 4)) for _ in range(max(1, round(budget / part / (4 * n + 1))))]


def variants(budget: int, value: str | None) -> dict[str, tuple[Callable[[], GradientEstimator], int]]:
    """By name: what makes the estimator, and the steps."""
    numbers = growing(budget)
    found: dict[str, tuple[Callable[[], GradientEstimator], int]] = {
        FIRST: (DrawGradient, budget // 5),
        "the same noise at each step": (KeptNoise, budget // 5),
        "two draws": (lambda: DrawGradient(2), budget // 9),
        "two draws, antithetic": (lambda: DrawGradient(2, antithetic=True), budget // 9),
        "two draws, the same noise": (lambda: KeptNoise(2), budget // 9),
        "draws grow with time, 1 to 4": (lambda: Growing(numbers), len(numbers)),
        "draws fall with time, 4 to 1": (lambda: Growing(numbers[::-1]), len(numbers)),
    }
    if value is not None:
        network = NetworkGradient(value)
        found |= {
            "amortised value": (lambda: network, budget // 3),
            "half a draw, half amortised": (lambda: Between(network, 0.5), budget // 7),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--value", help="a value network of the class mixture: mfm fit --config mnist/value")
    parser.add_argument("--budget", type=int, default=90, help="evaluations a sample")
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
    jobs = [(reward, name) for reward in given.rewards for name in every if name in plain or reward == MIXTURE]
    rows: list[dict[str, object]] = []
    first: dict[str, Judged] = {}
    for reward, name in track(jobs, describe=lambda job: f"{job[0]}: {job[1]}"):
        target = setup.target(reward)
        make, steps = every[name]
        method = Steering(make(), TimeGrid(steps), clip=2.0, base_step="flow_map")
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
        rows.append({"reward": reward, "variant": name, "steps": steps, "NFE": nfe, **said})
    title = f"MFM-G at {given.budget} evaluations ({given.samples} samples, {given.precision}, {device})"
    write_table(rows, title, Path("outputs/steering_variants"), "steering_variants")


if __name__ == "__main__":
    main()
