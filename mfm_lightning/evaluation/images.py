"""Samples and posterior draws of an image model: Fréchet distances and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_lightning.alignment.target import Flow
from mfm_lightning.conditions import INDEX, Conditions
from mfm_lightning.evaluation.base import ArrayData, Evaluation, ModelModule, data_of
from mfm_lightning.evaluation.draws import noisy_states
from mfm_lightning.evaluation.features import check_features, features_of
from mfm_lightning.interpolant import as_times, interpolate, randn, sample_generators
from mfm_lightning.metrics.classifier import accuracy
from mfm_lightning.metrics.frechet import frechet_of_features
from mfm_lightning.metrics.measured import Measured, resampled
from mfm_lightning.samplers import sample_ode, sample_posterior_glass, sample_refinement
from mfm_lightning.utils.console import track, write_table
from mfm_lightning.utils.figures import image_grid


class ImageEvaluation(Evaluation[ModelModule]):
    """Fréchet distance to the training images, in the features of a small classifier trained on them, of

    - samples by K-step refinement, and by the base flow's ODE (the teacher's, where there is one);
    - posterior draws from noised training images, one-step, and by the GLASS ODE of the same base flow.

    Each distance has an interval, and that of the Meta Flow Map its ratio to the flow's, paired by the noise that both
    began from. A model with classes gets the labels of the images; the share of samples that are classified as labelled
    is told.

    Args:
        num_samples: images for each figure.
        refinement_steps: K of the refinement samplers; none for a base flow.
        ode_steps: Euler steps of the base flow.
        times: outer times of the posterior draws; none for a base flow.
        glass_steps: Euler steps of the GLASS ODE.
        picture_times: outer times in the posterior pictures.
        seed: of all noise.
        classifier: whose features they are, in place of one trained on the training images: a file that `mfm fit` wrote
            for `Classification`, or a name, such as mnist/features.
    """

    needs_data = ("splits", "decode", "num_classes")

    def __init__(
        self,
        num_samples: int = 2000,
        refinement_steps: Sequence[int] = (1, 2, 4),
        ode_steps: int = 100,
        times: Sequence[float] = (0.2, 0.4),
        glass_steps: int = 64,
        picture_times: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
        seed: int = 0,
        classifier: str | None = None,
    ) -> None:
        self.num_samples, self.refinement_steps, self.ode_steps = num_samples, tuple(refinement_steps), ode_steps
        self.times, self.glass_steps, self.picture_times = tuple(times), glass_steps, tuple(picture_times)
        self.seed, self.classifier = seed, classifier

    def check(self, module: ModelModule) -> None:
        super().check(module)
        check_features(module, self.classifier)

    @torch.no_grad()
    def measure(self, module: ModelModule, folder: Path) -> None:
        data: ArrayData = data_of(module)
        model, base = module.model, _base_flow(module).drift
        real_x, real_y = data.splits["train"]
        classifier, fitted = features_of(data, self.classifier, folder / "features.safetensors")
        test_accuracy = accuracy(classifier, data.decode(data.splits["test"][0]), data.splits["test"][1])
        module.log("test/classifier_accuracy", test_accuracy, rank_zero_only=True)

        def frechet(images: Tensor) -> Measured:
            return resampled(frechet_of_features, classifier.features(images), fitted)

        def agreement(x: Tensor, label: Tensor) -> float:
            return accuracy(classifier, data.decode(x.cpu()), label.cpu())

        # labels as frequent as in the training data, else the mix of classes would count as a distance
        pick = torch.randint(len(real_x), (self.num_samples,), generator=self._generator())
        x1, label = real_x[pick].to(module.device), real_y[pick].to(module.device)
        noise = torch.randn(x1.shape, generator=self._generator(1)).to(x1)
        reference = data.decode(torch.cat([data.splits[s][0] for s in ("val", "test")]))
        labelled = bool(model.num_classes)
        held_out = f"held-out {getattr(data, 'name', None) or type(data).__name__}"
        distance = Measured(float(frechet_of_features(classifier.features(reference), fitted)), torch.empty(0))
        rows = [_row(held_out, "", "", distance, None, test_accuracy if labelled else None)]
        given = Conditions(label=label) if labelled else Conditions()

        def ode() -> Tensor:
            return sample_ode(lambda t, x: base(t, x, given), noise, self.ode_steps)

        def refinement(steps: int) -> Tensor:
            return sample_refinement(model, noise, steps, given, generator=self._generator(2))

        def posterior(t: float, steps: int | None) -> Tensor:
            """One-step draws, or by so many steps of the GLASS ODE; both from the same noise."""
            x_t = noisy_states(x1, t, self._generator(1))  # of the same noise as the samples
            eps = torch.randn(x1[:, None].shape, generator=self._generator(3)).to(x1)
            if steps is None:
                return model.sample_posterior(x_t, t, noise=eps, conditions=given)[:, 0]
            return sample_posterior_glass(lambda t, x: base(t, x, given), x_t, t, steps=steps, noise=eps)[:, 0]

        flows: dict[float | str, Measured] = {}
        jobs: list[tuple[str, float | str, int, Callable[[], Tensor]]]
        jobs = [(f"base flow, ODE {self.ode_steps}", "", self.ode_steps, ode)]
        jobs += [(f"MFM, refinement {k}", "", k, partial(refinement, k)) for k in self.refinement_steps]
        for t in self.times:
            glass = partial(posterior, t, self.glass_steps)
            jobs.append((f"posterior, GLASS {self.glass_steps}", t, self.glass_steps, glass))
            jobs.append(("posterior, MFM 1", t, 1, partial(posterior, t, None)))
        for name, t, evaluations, draw in track(jobs, describe=lambda job: f"{job[0]} {job[1] and f't = {job[1]}'}"):
            x = draw()
            agrees, distance = agreement(x, label) if labelled else None, frechet(data.decode(x.cpu()))
            rows.append(_row(name, t, evaluations, distance, flows.get(t), agrees))
            flows.setdefault(t, distance)  # of each t the flow comes first
        for row in rows:
            module.log(f"test/frechet/{row['samples']}{row['t'] and ' t=' + str(row['t'])}", row["Fréchet"])
        title = f"Fréchet distance to the training images ({self.num_samples} samples; classifier {test_accuracy:.1%})"
        write_table(rows, title, folder, "frechet")

    @torch.no_grad()
    def draw(self, module: ModelModule, folder: Path) -> None:
        data: ArrayData = data_of(module)
        model, base = module.model, _base_flow(module).drift
        columns = 10
        rows = model.num_classes or 10
        num, given, each = rows * columns, Conditions(), ""
        if model.num_classes:
            given, each = Conditions(label=torch.arange(rows)).expand(num, module.device), ", one class a row"
        noise = torch.randn(num, *model.state_shape, generator=self._generator()).to(module.device)
        if self.refinement_steps:
            k = max(self.refinement_steps)
            samples = sample_refinement(model, noise, k, given, generator=self._generator(1))
            title = f"{k}-step refinement{each}"
        else:
            samples = sample_ode(lambda t, x: base(t, x, given), noise, self.ode_steps)
            title = f"base flow, {self.ode_steps}-step ODE{each}"
        images = data.decode(samples.cpu())
        image_grid(images.reshape(rows, columns, *images.shape[1:]), folder / "samples.png", title)
        for t in self.picture_times if self.refinement_steps else ():
            self._posterior_picture(module, data, t, folder / f"posterior_t{t:g}.png")

    def _posterior_picture(self, module: ModelModule, data: ArrayData, t: float, path: Path) -> None:
        x, y = data.splits["test"]
        first = torch.stack([x[y == c][0] for c in y.unique()]).to(module.device)  # data may leave classes out
        x_t = noisy_states(first, t, self._generator(5))
        draws = module.model.sample_posterior(x_t, t, 8, generator=self._generator(6))
        rows = torch.cat([first[:, None], x_t[:, None], draws], dim=1).cpu()
        rows = data.decode(rows.flatten(0, 1)).reshape(rows.shape)
        image_grid(rows, path, f"one-step posterior draws, t = {t:g} (no label given)", ["x1", "x_t", "draws"])

    @torch.no_grad()
    def predict(self, module: ModelModule, batch: Any) -> dict[str, Tensor]:
        x1, given = batch[0], Conditions.of_batch(batch[1])  # no labels for a model without classes
        index = batch[1][INDEX]
        generators = sample_generators((self.seed, 2), index.tolist())
        noise = randn(x1.shape, x1, generators)
        base = _base_flow(module).drift
        result = {"x1": x1.cpu()} | ({} if given.label is None else {"label": given.label.cpu()})
        result["samples/ode"] = sample_ode(lambda t, x: base(t, x, given), noise, self.ode_steps).cpu()
        for k in self.refinement_steps:
            result[f"samples/refinement_{k}"] = sample_refinement(
                module.model, noise, k, given, generator=generators
            ).cpu()
        for t in self.times:
            x_t = interpolate(as_times(t, x1), noise, x1)  # of the same noise as the samples
            result[f"x_t/t={t}"] = x_t.cpu()
            result[f"draws/t={t}"] = module.model.sample_posterior(
                x_t, t, 8, conditions=given, generator=generators
            ).cpu()
        return result

    def _generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + offset)


def _base_flow(module: ModelModule) -> Flow:
    return module.model if module.teacher is None else module.teacher


def _row(
    samples: str,
    t: float | str,
    evaluations: int | str,
    frechet: Measured,
    of_flow: Measured | None,
    agreement: float | None,
) -> dict[str, Any]:
    ends = ("", "") if math.isnan(frechet.low) else (frechet.low, frechet.high)
    ratio = "" if of_flow is None else frechet.over(of_flow).text()
    row = {"samples": samples, "t": t, "evaluations": evaluations, "Fréchet": frechet.value}
    row |= {"low": ends[0], "high": ends[1], "over the flow's": ratio}
    return row if agreement is None else {**row, "as labelled": agreement}
