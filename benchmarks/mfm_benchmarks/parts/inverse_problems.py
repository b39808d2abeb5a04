"""Inverse problems: samples given a measurement of a test image, scored against the image itself.

The measured image is one sample of the posterior that the samples should have. A strictly proper score (Gneiting and
Raftery, 2007) of m samples against it is least, on average, for the posterior itself: samples that miss one of several
fitting digits lose, and so do samples that do not fit. Both scores are without bias in m.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Picture, Table
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.measure import measure, noise, states_digest
from mfm_benchmarks.suite import Cell, Outcome, Results
from mfm_lightning.alignment import AlignmentMethod, FeynmanKac, Steering, TimeGrid
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient, DrawGradient, DrawGradientFree
from mfm_lightning.metrics.measured import Measured, mean_of
from mfm_rewards.linear_gaussian import ImageMeasurement, Inpainting, SuperResolution

SHOWN_IMAGES, SHOWN_SAMPLES = 3, 10
SCORES = {"energy score": "energy", "class score": "classes", "misfit": "misfit"}


@dataclass(frozen=True, eq=False)
class Problem:
    """likelihoods: of each image's measurement; shown: the measurements as pictures, `(B, C, H, W)`; file: name of the
    figure."""

    likelihoods: list[ImageMeasurement]
    shown: Tensor
    file: str


@dataclass
class InverseProblems:
    """Inpainting of the left half, and super-resolution, of test images.

    Args:
        num_images: measured images, on which the intervals are.
        num_samples: samples of each image's posterior, m.
        draws: N of MFM-G.
        free_draws: N of MFM-GF.
        particles: of FK-SDE.
        steps: of all methods.
        clip: largest steering, in norms of the drift.
        noise_std: of the measurement, in images of [0, 1].
        factor: of the super-resolution.
    """

    num_images: int = 16
    num_samples: int = 16
    draws: list[int] = field(default_factory=lambda: [1, 4])
    free_draws: int = 16
    particles: int = 8
    steps: int = 50
    clip: float | None = 2.0
    noise_std: float = 0.1
    factor: int = 4

    def __post_init__(self) -> None:
        if self.num_images < 2 or self.num_samples < 2 or not self.draws:
            raise ValueError("inverse: a comparison needs two images, two samples of each, and draws")

    def shrink(self) -> None:
        self.num_images, self.num_samples, self.steps = min(3, self.num_images), min(6, self.num_samples), 20
        self.draws, self.free_draws, self.particles = self.draws[:1], min(4, self.free_draws), min(4, self.particles)

    def _methods(self) -> dict[str, AlignmentMethod]:
        grid = TimeGrid(self.steps)
        found: dict[str, AlignmentMethod] = {
            f"MFM-G, N = {n}": Steering(DrawGradient(n), grid, clip=self.clip) for n in self.draws
        }
        free = Steering(DrawGradientFree(self.free_draws), grid, clip=self.clip)
        return {
            **found,
            f"MFM-GF, N = {self.free_draws}": free,
            "DPS": Steering(DPSGradient(), grid, clip=self.clip),
            f"FK-SDE, {self.particles} particles": FeynmanKac(num_particles=self.particles, grid=grid),
        }

    def _measured(self, images: Tensor) -> dict[str, Problem]:
        """The problems by name."""
        mask = torch.ones(images.shape[-2:])
        mask[:, : images.shape[-1] // 2] = 0
        generator = torch.Generator().manual_seed(11)
        seen = images + self.noise_std * torch.randn(images.shape, generator=generator)
        small = torch.nn.functional.avg_pool2d(images, self.factor)
        small = small + self.noise_std * torch.randn(small.shape, generator=generator)
        factor = self.factor
        return {
            "left half missing": Problem(
                [Inpainting(y, mask, self.noise_std) for y in seen], torch.where(mask.bool(), seen, 0.5), "inpainting",
            ),
            f"{factor}x super-resolution": Problem(
                [SuperResolution(y, factor, self.noise_std) for y in small],
                small.repeat_interleave(factor, -2).repeat_interleave(factor, -1), "super_resolution",
            ),
        }  # fmt: skip

    def cells(
        self,
        target: Target,
        x1: Tensor,
        classify: Callable[[Tensor], Tensor],
        device: torch.device,
        identity: dict[str, Any],
    ) -> list[Cell]:
        """One cell a problem and method.

        Args:
            target: whose model and decoder are taken.
            x1: clean states, at least `num_images`.
            classify: images to classes `(B,)`.
        """
        with torch.no_grad():
            self._images = target.decoder(x1[: self.num_images]).cpu()
        self._problems = self._measured(self._images)
        self._cells: dict[tuple[str, str], Cell] = {}
        settings = {
            **identity, "images": states_digest(self._images), "samples": self.num_samples, "steps": self.steps,
            "clip": self.clip, "noise_std": self.noise_std,
        }  # fmt: skip
        for (problem, of), (name, method) in itertools.product(self._problems.items(), self._methods().items()):

            def compute(method: AlignmentMethod = method, of: Problem = of) -> Outcome:
                return self._run(method, target, of.likelihoods, classify, device)

            self._cells[problem, name] = Cell(f"inverse, {problem}, {name}", settings, compute)
        return list(self._cells.values())

    def _run(
        self,
        method: AlignmentMethod,
        target: Target,
        likelihoods: list[ImageMeasurement],
        classify: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> Outcome:
        """Samples of each image's posterior, from the same noise in all methods."""
        images, classes, evaluations = [], [], 0.0
        for k, likelihood in enumerate(likelihoods):
            of_image = Target(target.model, likelihood.to(device), target.decoder)
            x0 = noise(self.num_samples, target.state_shape, 400 + k, device)
            outcome = measure(method, of_image, x0, 400 + k)
            with torch.no_grad():
                images.append(target.decoder(outcome.tensors["states"].to(device)))
                classes.append(classify(images[-1]).cpu())
            evaluations += outcome.numbers["nfe"] / len(likelihoods)
        with torch.no_grad():
            misfit = [_misfit(likelihood, made) for likelihood, made in zip(likelihoods, images, strict=True)]
            truth = classify(self._images.to(device)).cpu()
        made, found = torch.stack(images).cpu(), torch.stack(classes)
        return Outcome({"nfe": evaluations}, {
            "images": made[:, :SHOWN_SAMPLES], "energy": energy_score(made, self._images),
            "classes": class_score(found, truth), "misfit": torch.stack(misfit).cpu(),
            "found": torch.tensor([len(c.unique()) for c in found]),
        })  # fmt: skip

    def blocks(self, results: Results) -> list[Block]:
        rows, scores = [], {}
        for (problem, name), cell in self._cells.items():
            if cell not in results:
                continue
            tensors = results[cell].tensors
            scores[problem, name] = {title: mean_of(tensors[key]) for title, key in SCORES.items()}
            row = {"problem": problem, "method": name, "NFE": round(results[cell].numbers["nfe"])}
            rows.append({**row, **scores[problem, name], "different digits": mean_of(tensors["found"].double())})
        if not rows:
            return []
        caption = (
            f"{len(self._images)} test images, {self.num_samples} samples each, noise {self.noise_std:g}. Energy and "
            "class score: proper scores against the measured image, least for the exact posterior. Misfit: of the "
            "measurement, in its noise's deviations (1 would be exact). Different digits among an image's samples, as "
            "the classifier sees them."
        )
        problems = list(dict.fromkeys(problem for problem, _ in scores))
        return [
            *(self._picture(problem, results) for problem in problems),
            Claims("Inverse problems", [line for problem in problems for line in self._claims(problem, scores)]),
            Table("inverse_problems", "Inverse problems", rows, caption, folded=True),
        ]

    def _picture(self, problem: str, results: Results) -> Picture:
        rows = []
        for k in range(min(SHOWN_IMAGES, len(self._images))):
            given = torch.stack([self._images[k], self._problems[problem].shown[k]])
            for (of, name), cell in self._cells.items():
                if of == problem and cell in results:
                    rows.append((name, torch.cat([given, results[cell].tensors["images"][k]])))
        title = problem[0].upper() + problem[1:]
        caption = "The test image, what is measured of it, and samples; three images, a row for each method."
        return Picture(f"inverse_{self._problems[problem].file}", title, plots.gallery(rows), caption)

    def _claims(self, problem: str, scores: dict[tuple[str, str], dict[str, Measured]]) -> list[str]:
        """MFM-G against the methods that are not, by the proper scores."""
        lines, ours = [], [f"MFM-G, N = {n}" for n in self.draws]
        of_problem = {name: found for (of, name), found in scores.items() if of == problem}
        for mine, title in itertools.product([name for name in ours if name in of_problem], list(SCORES)[:2]):
            score = of_problem[mine][title]
            others = {name: found[title] for name, found in of_problem.items() if name not in ours}
            if others:
                lines.append(f"{problem}: the {title} of {mine}, {score.text()}, is {verdict(score, others)}.")
        return lines


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """Mean |x - x*| - 1/2 mean |x - x'| over different samples, `(B,)`, of `(B, m, *shape)` against `(B, *shape)`;
    least, on average, for samples of the truth's distribution."""
    x, y = samples.double().flatten(2), truth.double().flatten(1)[:, None]
    m = x.shape[1]
    return torch.cdist(x, y).mean(dim=(1, 2)) - torch.cdist(x, x).sum(dim=(1, 2)) / (2 * m * (m - 1))


def class_score(classes: Tensor, truth: Tensor) -> Tensor:
    """Brier's score of the samples' classes `(B, m)` against the truth's `(B,)`, without bias in m: `(B,)`.

    sum_k (p_k - [k = y])^2 = 1 - 2 p_y + sum_k p_k^2; the last is the chance that two samples are of one class.
    """
    m = classes.shape[1]
    same = (classes[:, :, None] == classes[:, None]).double().sum(dim=(1, 2))
    return 1 - 2 * (classes == truth[:, None]).double().mean(dim=1) + (same - m) / (m * (m - 1))


def _misfit(likelihood: ImageMeasurement, images: Tensor) -> Tensor:
    """Root mean square of the residuals of images `(m, C, H, W)`, in deviations of the measurement's noise."""
    return (likelihood.residuals(images) / likelihood.noise_std).square().mean().sqrt()
