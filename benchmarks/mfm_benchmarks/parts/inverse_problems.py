"""Inverse problems: samples given a measurement of a test image, scored against the image itself.

The measured image is one sample of the posterior that the samples should have. A strictly proper score (Gneiting and
Raftery, 2007) of m samples against it is least, on average, for the posterior itself: samples that miss one of several
fitting digits lose, and so do samples that do not fit. Both scores are without bias in m.

How well a method fits the data depends on how hard it is pushed. In tomography all steering methods are run at several
strengths, and compared by the error of their images where they fit the data equally well.
"""

from __future__ import annotations

import itertools
import math
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
from mfm_lightning.alignment import (
    AlignmentMethod,
    DiamondGradient,
    FeynmanKac,
    FlowMapGradient,
    Steering,
    TimeGrid,
)
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient, DrawGradient, DrawGradientFree, GradientEstimator
from mfm_lightning.metrics.measured import Measured, mean_of
from mfm_rewards.linear_gaussian import ImageMeasurement, Inpainting, RaySums, SuperResolution

SHOWN_IMAGES, SHOWN_SAMPLES = 3, 10
SCORES = {"energy score": "energy", "class score": "classes", "misfit": "misfit"}
ERRORS = {"energy score": "energy", "image error": "error"}
TOMOGRAPHY = "tomography"


@dataclass(frozen=True, eq=False)
class Problem:
    """likelihoods: of each image's measurement; shown: the measurements as pictures, `(B, C, H, W)`; file: name of the
    figure; strengths: of the steering, by which methods are compared at equal misfit; settings: what the measurement
    depends on besides the image."""

    likelihoods: list[ImageMeasurement]
    shown: Tensor
    file: str
    strengths: tuple[float, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class InverseProblems:
    """Inpainting of the left half, super-resolution, and tomography by few rays of limited angles, of test images.

    Args:
        num_images: measured images, on which the intervals are.
        num_samples: samples of each image's posterior, m.
        draws: N of MFM-G.
        free_draws: N of MFM-GF.
        diamond_draws: N of Diamond-G.
        particles: of FK-SDE.
        steps: of all methods.
        clip: largest steering, in norms of the drift.
        noise_std: of the measurement, in images of [0, 1].
        factor: of the super-resolution.
        sources: of the tomography's rays, over the left edge.
        receivers: of them, over the right edge.
        ray_noise_std: of a ray's line integral, in heights of the image.
        strengths: of the steering in tomography, besides 1; none for no comparison at equal misfit.
    """

    num_images: int = 16
    num_samples: int = 16
    draws: list[int] = field(default_factory=lambda: [1, 4])
    free_draws: int = 16
    diamond_draws: int = 4
    particles: int = 8
    steps: int = 50
    clip: float | None = 2.0
    noise_std: float = 0.1
    factor: int = 4
    sources: int = 6
    receivers: int = 6
    ray_noise_std: float = 0.02
    strengths: list[float] = field(default_factory=lambda: [0.3, 3.0])

    def __post_init__(self) -> None:
        if self.num_images < 2 or self.num_samples < 2 or not self.draws:
            raise ValueError("inverse: a comparison needs two images, two samples of each, and draws")
        if self.sources < 1 or self.receivers < 1 or not self.ray_noise_std > 0:
            raise ValueError(
                f"inverse: rays need sources ({self.sources}) and receivers ({self.receivers}) of at least 1, and "
                f"ray_noise_std ({self.ray_noise_std}) above 0"
            )
        if any(not strength > 0 for strength in self.strengths):
            raise ValueError(f"inverse.strengths {self.strengths}: expected numbers above 0")

    def shrink(self) -> None:
        self.num_images, self.num_samples, self.steps = min(3, self.num_images), min(6, self.num_samples), 20
        self.draws, self.free_draws, self.particles = self.draws[:1], min(4, self.free_draws), min(4, self.particles)
        self.diamond_draws, self.strengths = min(2, self.diamond_draws), []

    def _methods(self, problem: Problem) -> dict[tuple[str, float], AlignmentMethod]:
        """By name and strength."""
        grid = TimeGrid(self.steps)
        steered: dict[str, GradientEstimator] = {
            **{f"MFM-G, N = {n}": DrawGradient(n) for n in self.draws},
            f"MFM-GF, N = {self.free_draws}": DrawGradientFree(self.free_draws),
            "DPS": DPSGradient(),
            "Flow map's end": FlowMapGradient(),
            f"Diamond-G, N = {self.diamond_draws}": DiamondGradient(self.diamond_draws),
        }
        found: dict[tuple[str, float], AlignmentMethod] = {
            (name, strength): Steering(estimator, grid, strength=strength, clip=self.clip)
            for name, estimator in steered.items()
            for strength in sorted({1.0, *problem.strengths})
        }
        particles = FeynmanKac(num_particles=self.particles, grid=grid)
        return {**found, (f"FK-SDE, {self.particles} particles", 1.0): particles}

    def _measured(self, images: Tensor) -> dict[str, Problem]:
        """The problems by name."""
        mask = torch.ones(images.shape[-2:])
        mask[:, : images.shape[-1] // 2] = 0
        generator = torch.Generator().manual_seed(11)
        seen = images + self.noise_std * torch.randn(images.shape, generator=generator)
        small = torch.nn.functional.avg_pool2d(images, self.factor)
        small = small + self.noise_std * torch.randn(small.shape, generator=generator)
        factor, rays = self.factor, (self.sources, self.receivers)
        operator = RaySums(torch.zeros(images.shape[1], *rays))
        sums = operator.measure(images)
        sums = sums + self.ray_noise_std * torch.randn(sums.shape, generator=generator)
        return {
            "left half missing": Problem(
                [Inpainting(y, mask, self.noise_std) for y in seen], torch.where(mask.bool(), seen, 0.5), "inpainting",
            ),
            f"{factor}x super-resolution": Problem(
                [SuperResolution(y, factor, self.noise_std) for y in small],
                small.repeat_interleave(factor, -2).repeat_interleave(factor, -1), "super_resolution",
            ),
            TOMOGRAPHY: Problem(
                [RaySums(y, self.ray_noise_std) for y in sums], _projected_back(operator, sums, images), TOMOGRAPHY,
                tuple(self.strengths), {"noise_std": self.ray_noise_std, "rays": list(rays)},
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
        self._cells: dict[tuple[str, str, float], Cell] = {}
        settings = {
            **identity, "images": states_digest(self._images), "samples": self.num_samples, "steps": self.steps,
            "clip": self.clip, "noise_std": self.noise_std,
        }  # fmt: skip
        for problem, of in self._problems.items():
            for (name, strength), method in self._methods(of).items():

                def compute(method: AlignmentMethod = method, of: Problem = of) -> Outcome:
                    return self._run(method, target, of.likelihoods, classify, device)

                what = name if strength == 1 else f"{name}, strength {strength:g}"
                self._cells[problem, name, strength] = Cell(
                    f"inverse, {problem}, {what}", settings | of.settings, compute
                )
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
            "error": _image_error(made, self._images),
            "found": torch.tensor([len(c.unique()) for c in found]),
        })  # fmt: skip

    def blocks(self, results: Results) -> list[Block]:
        rows, scores = [], {}
        for (problem, name, strength), cell in self._cells.items():
            if cell not in results:
                continue
            tensors = results[cell].tensors
            found = {title: mean_of(tensors[key]) for title, key in (SCORES | ERRORS).items()}
            if strength == 1:
                scores[problem, name] = found
            row = {"problem": problem, "method": name, "strength": strength, "NFE": round(results[cell].numbers["nfe"])}
            rows.append({**row, **found, "different digits": mean_of(tensors["found"].double())})
        if not rows:
            return []
        caption = (
            f"{len(self._images)} test images with {self.num_samples} samples each; noise {self.noise_std:g} "
            f"({self.ray_noise_std:g} for the {self.sources} x {self.receivers} ray sums of tomography). Energy and "
            "class score: proper scores against the measured image, smallest for the exact posterior. Misfit: of the "
            "measurement, in standard deviations of its noise (1 is ideal). Image error: root-mean-square error per "
            "pixel. Different digits: number of classes among an image's samples, by the classifier. Strength: of the "
            "steering; 1 is what the theory asks for."
        )
        problems = list(dict.fromkeys(problem for problem, _ in scores))
        return [
            *(self._picture(problem, results) for problem in problems),
            Claims("Scores of inverse problems", [x for problem in problems for x in self._claims(problem, scores)]),
            *self._equal_misfit(results),
            Table(
                "inverse_problems",
                "Inverse problems",
                rows,
                caption,
                folded=True,
                keys=["problem", "method", "strength"],
            ),
        ]

    def _equal_misfit(self, results: Results) -> list[Block]:
        """Methods at the least misfit that all of them reach, each between two of its strengths."""
        if not self.strengths:
            return []
        runs: dict[str, dict[float, dict[str, Tensor]]] = {}
        for (problem, name, strength), cell in self._cells.items():
            if problem == TOMOGRAPHY and cell in results:
                runs.setdefault(name, {})[strength] = results[cell].tensors
        curves = {name: curve for name, curve in runs.items() if len(curve) > 1}
        if not curves:
            return []
        misfit = max(min(float(run["misfit"].mean()) for run in curve.values()) for curve in curves.values())
        rows, others = [], []
        for name, curve in curves.items():
            found = at_misfit(curve, misfit)
            reached = [float(run["misfit"].mean()) for run in curve.values()]
            row: dict[str, Any] = {"method": name, "misfits": f"{min(reached):.2f} to {max(reached):.2f}"}
            if found is None:  # its misfits are all below
                found = max(curve.values(), key=lambda run: float(run["misfit"].mean()))
                others.append(name)
            rows.append({**row, **{title: mean_of(found[key]) for title, key in ERRORS.items()}})
        caption = (
            f"Tomography at an equal data misfit of {misfit:.3g} standard deviations of the noise, the smallest that "
            "all "
            f"methods reach. Each method is interpolated between its strengths ({', '.join(map(str, sorted({1.0, *self.strengths})))}), "  # noqa: E501
            "linearly in the logarithm of the mean misfit. The column misfits has the range of its runs."
            + (f" {', '.join(others)}: at the largest of its misfits, which is smaller." if others else "")
        )
        ours = [row for row in rows if row["method"].startswith("MFM-G,")]
        rest = [row for row in rows if not row["method"].startswith("MFM-G,")]
        lines = [
            f"Tomography at misfit {misfit:.3g}: the {title} of {row['method']}, {row[title].text()}, is "
            f"{verdict(row[title], {other['method']: other[title] for other in rest})}."
            for row, title in itertools.product(ours if rest else [], ERRORS)
        ]
        title = "Tomography at equal data misfit"
        return [Claims(f"{title}: differences", lines), Table("equal_misfit", title, rows, caption, keys=["method"])]

    def _picture(self, problem: str, results: Results) -> Picture:
        rows = []
        for k in range(min(SHOWN_IMAGES, len(self._images))):
            given = torch.stack([self._images[k], self._problems[problem].shown[k]])
            for (of, name, strength), cell in self._cells.items():
                if of == problem and strength == 1 and cell in results:
                    rows.append((name, torch.cat([given, results[cell].tensors["images"][k]])))
        title = problem[0].upper() + problem[1:]
        caption = (
            "In each row: the test image, the measurement, then samples. Three test images, each with a row for each "
            "method."
        )
        strong = [name for name, _ in rows if name.startswith("MFM-")]
        return Picture(f"inverse_{self._problems[problem].file}", title, plots.gallery(rows, ours=strong), caption)

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


def at_misfit(curve: dict[float, dict[str, Tensor]], misfit: float) -> dict[str, Tensor] | None:
    """Errors of each image `(B,)` at a mean data misfit, from runs that have others: linear in the logarithm of the
    mean misfit between the two runs that are next to it. None where the runs' misfits do not hold it.

    Args:
        curve: by strength, "misfit" and the errors of `ERRORS`, each `(B,)`.
    """
    runs = sorted(curve.values(), key=lambda run: float(run["misfit"].mean()))
    logs = [math.log(float(run["misfit"].mean())) for run in runs]
    wanted = math.log(misfit)
    for (low, below), (high, above) in itertools.pairwise(zip(logs, runs, strict=True)):
        if low - 1e-9 <= wanted <= high + 1e-9:
            share = min(max((wanted - low) / (high - low), 0.0), 1.0) if high > low else 0.0
            return {key: (1 - share) * below[key] + share * above[key] for key in ERRORS.values()}
    return None


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


def _image_error(samples: Tensor, truth: Tensor) -> Tensor:
    """Root mean square of a pixel's error, `(B,)`, of samples `(B, m, C, H, W)` against images `(B, C, H, W)`."""
    return (samples.double() - truth.double()[:, None]).square().flatten(1).mean(dim=1).sqrt()


def _projected_back(operator: RaySums, sums: Tensor, images: Tensor) -> Tensor:
    """Ray sums as a picture: each pixel's mean over the rays through it, by their lengths in it, over their own."""
    back = torch.func.vjp(operator.measure, images)[1]
    lengths = operator.measure(torch.ones_like(images))
    return (back(sums / lengths)[0] / back(torch.ones_like(sums))[0].clamp_min(1e-6)).clamp(0, 1)
