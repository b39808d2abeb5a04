"""A fine-tuned policy beside its base flow: rewards, what they cost in likeness and diversity, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.method import AlignmentMethod
from mfm_lightning.alignment.target import Target, require_gradient
from mfm_lightning.alignment.values import exact_likelihood
from mfm_lightning.conditions import Conditions
from mfm_lightning.evaluation.base import ArrayData, Evaluation, PolicyModule, data_of, datamodule_of
from mfm_lightning.evaluation.draws import noisy_states
from mfm_lightning.evaluation.features import check_features, features_of
from mfm_lightning.metrics.classifier import SmallClassifier
from mfm_lightning.metrics.distances import pairwise_distance, sliced_wasserstein
from mfm_lightning.metrics.frechet import Gaussian, frechet_of_features
from mfm_lightning.networks import ImageClassifier
from mfm_lightning.oracles import GaussianMixture, LinearGaussian
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.figures import before_after, scatter
from mfm_rewards import build, evaluate


class PolicyEvaluation(Evaluation[PolicyModule]):
    """The same fixed-seed noise through the ODE of the base flow and of the policy: mean reward and held-out rewards,
    Fréchet distance to the training images and diversity (mean distance between samples of a class), both in the
    features of a small classifier trained on them.

    Args:
        samples_per_class: M, of every class; in all of a model without classes.
        num_samples: in place of that, so many in all, of classes drawn without repetition as long as there are more.
        likeness: measure Fréchet distance and diversity; for data that fit into memory.
        ode_steps: Euler steps of both flows.
        held_out: other rewards by name, each as in `target.reward`; what rises without being asked for, or falls.
        steering: a method at inference time to compare with, run by `test` only, from the same noise.
        pictures: samples in the picture.
        seed: of the noise.
        classifier: whose features the likeness is in, in place of one trained on the training images: a file that
            `mfm fit` wrote for `Classification`, or a name, such as mnist/features.
    """

    def __init__(
        self,
        samples_per_class: int = 50,
        num_samples: int | None = None,
        likeness: bool = True,
        ode_steps: int = 50,
        held_out: dict[str, Any] | None = None,
        steering: AlignmentMethod | None = None,
        pictures: int = 20,
        seed: int = 0,
        classifier: str | None = None,
    ) -> None:
        if samples_per_class < 2:
            raise ValueError(f"samples_per_class {samples_per_class} must be at least 2, for the diversity")
        if num_samples is not None and (num_samples < 1 or likeness):
            raise ValueError(f"num_samples {num_samples}: expected at least 1, and likeness: false")
        self.samples_per_class, self.num_samples, self.likeness = samples_per_class, num_samples, likeness
        self.ode_steps, self.steering = ode_steps, steering
        self.held_out = {name: build(reward) for name, reward in (held_out or {}).items()}
        self.pictures, self.seed, self.classifier = pictures, seed, classifier
        self._fitted: tuple[SmallClassifier | ImageClassifier, Gaussian] | None = None  # to the training images
        self._base_row: dict[str, float] | None = None

    def check(self, module: PolicyModule) -> None:
        super().check(module)
        if self.likeness:
            data_of(module, "splits", "decode", "num_classes", by="PolicyEvaluation with likeness")
            check_features(module, self.classifier)
        if len(module.state_shape) != 3:
            raise ValueError("PolicyEvaluation is for images: for a mixture use TiltedMixtureEvaluation")
        if self.steering is not None and self.steering.needs_reward_gradient:
            require_gradient(module.target.reward, f"the evaluation's {type(self.steering).__name__}")
        for name, reward in self.held_out.items():
            if "prompts" in reward.needs and module.target.settings.prompts is None:
                raise ValueError(f"held-out reward {name!r} needs prompts: set target.prompts")
            if "groups" in reward.needs:
                raise ValueError(f"held-out reward {name!r} needs groups, and these samples come in none: leave it out")

    @torch.no_grad()
    def measure(self, module: PolicyModule, folder: Path) -> None:
        testing = module.trainer.testing
        noise, given = self._noise(module)
        target = module.target(given)

        def row(states: Tensor) -> dict[str, float]:
            return self._row(module, target, states)

        def base() -> dict[str, float]:
            if self._base_row is None:  # the base flow and its noise stay as they are
                self._base_row = row(module.sample_base(noise, given, self.ode_steps))
            return self._base_row

        jobs: dict[str, Callable[[], dict[str, float]]] = {"base flow": base}
        jobs["policy"] = lambda: row(module.sample_policy(noise, given, self.ode_steps))
        if (steering := self.steering) is not None and testing:
            generator = torch.Generator().manual_seed(self.seed)
            jobs["steering"] = lambda: row(steering(target, noise, generator).states)
        rows = []
        for name in track(list(jobs), describe=str):
            found = jobs[name]()
            rows.append({"samples": name, **found})
            for key, value in found.items():
                module.log(f"{'test' if testing else 'val'}/{name}/{key}", value, rank_zero_only=True)
        title = f"{len(noise)} ODE samples of {self.ode_steps} steps, the same noise for all"
        write_table(rows, title, folder, "policy", show=testing)

    def _row(self, module: PolicyModule, target: Target, states: Tensor) -> dict[str, float]:
        """What a table says of samples."""
        images, reward = target.decoder(states), target.plain_rewards(states)
        given = target.conditions.expand(len(states), images.device)
        row = {"reward": reward.mean().item(), "standard error": _standard_error(reward)}
        for name, held_out in self.held_out.items():
            row[name] = evaluate(held_out.to(images.device), images, given.prompts, given.label).mean().item()
        return row | (self._likeness(module, images.cpu(), given.to("cpu").label) if self.likeness else {})

    def _likeness(self, module: PolicyModule, images: Tensor, label: Tensor | None) -> dict[str, float]:
        if self._fitted is None:
            data: ArrayData = data_of(module)
            self._fitted = features_of(data, self.classifier, module.folder / "test" / "features.safetensors")
        classifier, fitted = self._fitted
        features = classifier.features(images)
        return {
            "Fréchet": float(frechet_of_features(features, fitted)),
            "diversity": float(pairwise_distance(features, label)),
        }

    @torch.no_grad()
    def draw(self, module: PolicyModule, folder: Path) -> None:
        noise, given = self._noise(module)
        pick = torch.arange(len(noise))
        if self.num_samples is None:  # they come class by class: one of each class before a second
            pick = pick.reshape(-1, self.samples_per_class).T.flatten()
        pick = pick[: self.pictures]
        noise, given = noise[pick], given.take(pick)
        target = module.target(given)
        before, after = (sample(noise, given, self.ode_steps) for sample in (module.sample_base, module.sample_policy))
        title = "base flow (upper of each pair) and policy from the same noise (lower), with rewards"
        columns = min(10, module.num_classes or 10)
        before_after(
            target.decoder(before).cpu(),
            target.decoder(after).cpu(),
            (target.plain_rewards(before).cpu(), target.plain_rewards(after).cpu()),
            folder / "before_after.png",
            title,
            columns,
        )

    def _noise(self, module: PolicyModule) -> tuple[Tensor, Conditions]:
        """Class by class, `samples_per_class` each; or `num_samples` of shuffled classes."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.num_samples is None:
            label = torch.arange(max(1, module.num_classes)).repeat_interleave(self.samples_per_class)
        else:
            label = torch.randperm(max(1, module.num_classes), generator=generator)
            label = label.repeat(-(-self.num_samples // len(label)))[: self.num_samples]
        noise = torch.randn(len(label), *module.state_shape, generator=generator)
        return noise.to(module.device), Conditions(label=label).to(module.device)


class TiltedMixtureEvaluation(Evaluation[PolicyModule]):
    """A policy on a Gaussian mixture with a linear-Gaussian reward, where all is exact: sliced W2 of ODE samples to the
    tilted mixture, and the error of the learned drift against the oracle's b + (sigma^2/2) grad V by time.

    Args:
        num_samples: for the distance, and states for the drift (noised samples of the tilted mixture).
        ode_steps: Euler steps.
        times: of the drift's table.
        repeats: of the distance, each with other noise and other exact samples.
        seed: of all noise.
    """

    def __init__(
        self,
        num_samples: int = 4096,
        ode_steps: int = 500,
        times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        repeats: int = 5,
        seed: int = 0,
    ) -> None:
        self.num_samples, self.ode_steps, self.times = num_samples, ode_steps, tuple(times)
        self.repeats, self.seed = repeats, seed

    def check(self, module: PolicyModule) -> None:
        if not isinstance(getattr(datamodule_of(module.trainer), "oracle", None), GaussianMixture):
            raise ValueError("TiltedMixtureEvaluation needs a DataModule of a Gaussian mixture")
        _likelihood(module)

    @torch.no_grad()
    def measure(self, module: PolicyModule, folder: Path) -> None:
        oracle, reward = _mixture(module), _likelihood(module)
        exact, testing = oracle.tilted(reward), module.trainer.testing
        distances: dict[str, list[float]] = {"exact (floor)": [], "base flow": [], "policy": []}
        for repeat in track(range(self.repeats if testing else 1), describe=lambda i: f"samples {i + 1}"):
            generator = torch.Generator().manual_seed(self.seed + repeat)
            reference, again = (exact.sample(self.num_samples, generator) for _ in range(2))
            noise = torch.randn(again.shape, generator=generator).to(module.device)
            samples = {
                "exact (floor)": again,
                "base flow": module.sample_base(noise, None, self.ode_steps),
                "policy": module.sample_policy(noise, None, self.ode_steps),
            }
            for name, x in samples.items():
                directions = torch.Generator().manual_seed(0)
                distances[name].append(float(sliced_wasserstein(x.cpu(), reference, 256, directions)))
        floor = sum(distances["exact (floor)"]) / len(distances["exact (floor)"])
        rows = []
        for name, found in distances.items():
            numbers = torch.tensor(found)
            mean, spread = numbers.mean().item(), numbers.std().item() if len(found) > 1 else 0.0
            rows.append({"samples": name, "sliced W2": mean, "std": spread, "times the floor": mean / floor})
            module.log(f"{'test' if testing else 'val'}/sliced_w2/{name}", mean, rank_zero_only=True)
        title = f"Distance of {self.num_samples} ODE samples to the tilted mixture"
        write_table(rows, title, folder, "tilted_distance", show=testing)
        errors, title = (
            self._drift_errors(module, oracle, exact, reward),
            "Drift at noised samples of the tilted mixture",
        )
        write_table(errors, title, folder, "drift_errors", show=testing)

    def _drift_errors(
        self, module: PolicyModule, oracle: GaussianMixture, exact: GaussianMixture, reward: LinearGaussian
    ) -> list[dict[str, Any]]:
        rows = []
        for t in self.times:
            generator = torch.Generator().manual_seed(self.seed)
            x1 = exact.sample(self.num_samples, generator)
            x = noisy_states(x1, t, generator)
            base = oracle.drift(t, x)
            optimal = base + oracle.steering(x, t, reward)
            on_device = x.to(module.device)
            row = {"t": t}
            for name, flow in (("base flow", module.base), ("policy", module.policy)):
                error = flow.drift(t, on_device).cpu() - optimal
                row[f"{name}, relative error"] = (error.square().sum() / optimal.square().sum()).sqrt().item()
            rows.append(row)
        return rows

    @torch.no_grad()
    def draw(self, module: PolicyModule, folder: Path) -> None:
        oracle, reward = _mixture(module), _likelihood(module)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(2000, *module.state_shape, generator=generator).to(module.device)
        samples = {
            "base flow": module.sample_base(noise, None, self.ode_steps),
            "policy": module.sample_policy(noise, None, self.ode_steps),
            "exact": oracle.tilted(reward).sample(2000, generator),
        }
        scatter(samples, folder / "samples.png", "ODE samples before and after fine-tuning, and the tilted mixture")


def _mixture(module: PolicyModule) -> GaussianMixture:
    return data_of(module).oracle


def _likelihood(module: PolicyModule) -> LinearGaussian:
    """The reward, times its scale."""
    settings = module.target.settings
    return exact_likelihood(module.target.reward, settings.decoder, settings.reward_scale)


def _standard_error(x: Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0
