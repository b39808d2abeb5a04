"""A conformance kit: does a reward behave as steering, search and fine-tuning need it to?

    from mfm_rewards.testing import check_reward

    def test_my_reward():
        check_reward(my_reward).raise_for_failures()

`mfm rewards --check NAME` runs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mfm_rewards.protocol import Reward, RewardError, as_reward, device_of, evaluate, name_of

PROMPTS = ("a photograph of a tabby cat", "a red car at night", "two people in the snow", "an old lighthouse")
STEPS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)  # of finite differences, as norms of the change of an image


@dataclass(frozen=True)
class Check:
    """One check of a reward.

    Args:
        name: what was checked.
        outcome: "passed", "failed" or "skipped".
        found: what was found, in words.
    """

    name: str
    outcome: str
    found: str = ""


@dataclass
class Conformance:
    """The outcome of `check_reward`.

    Args:
        reward: its name.
        checks: all checks, in their order.
    """

    reward: str
    checks: list[Check] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "failed"]

    def raise_for_failures(self) -> None:
        """Raise RewardError that lists what failed, if anything did."""
        if self.failures:
            found = "; ".join(f"{check.name}: {check.found}" for check in self.failures)
            raise RewardError(
                f"reward {self.reward!r} fails {len(self.failures)} of {len(self.checks)} checks: {found}"
            )


def check_reward(
    reward: Callable[..., Tensor],
    images: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    labels: Tensor | None = None,
    tolerance: float = 1e-4,
    gradient_tolerance: float = 0.02,
    seed: int = 0,
) -> Conformance:
    """Run all checks on a reward.

    - shape, dtype: one finite floating-point number an image, on its device; at least 32 bits.
    - deterministic: the same twice, also after `train()`; the images and the global random states untouched.
    - batch independence: an image's reward does not depend on the others with it, nor on its place; where the reward
      needs groups, a group's rewards do not depend on other groups.
    - autocast: in bf16 autocast, 32 bits come out, within a fifth of the values' spread of those without.
    - no graph: under `no_grad`, and from a black box, values carry no graph.
    - gradient (differentiable rewards): finite, and along two directions that of finite differences; of each image's
      reward in its own pixels, or its group's, alone.
    - NaN: an image with NaN pixels gets NaN or an error, never a plain number; the others keep theirs.

    Args:
        reward: a reward, or a function that is one.
        images: `(B, C, H, W)` in [0, 1], B >= 3; where None, four random smooth ones of 3 x 48 x 48 on the reward's
            device.
        prompts: B strings, for rewards that need them; some of the kit's own where None.
        labels: `(B,)`, for rewards that need them; 0..B-1 where None.
            Groups, for rewards that need them, are of two images next to each other.
        tolerance: largest difference of values, relative to their spread and size.
        gradient_tolerance: largest relative error of directional derivatives.
        seed: of the random images and directions.

    Returns:
        the outcome of each check; a reward that fails raises nothing.

    Raises:
        ValueError: for fewer than 3 images.
    """
    reward = as_reward(reward)
    if images is None:
        images = smooth_images(4, seed=seed).to(device_of(reward))
    if len(images) < 3:
        raise ValueError(f"{len(images)} images: the checks need at least 3")
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(images))] if prompts is None else list(prompts)
    labels = torch.arange(len(images), device=images.device) if labels is None else labels
    kit = _Kit(reward, images, prompts, labels, tolerance, gradient_tolerance, seed)
    result = Conformance(name_of(reward))
    for name, check in kit.checks():
        try:
            outcome, found = check()
        except Exception as error:  # a check that raises has failed
            outcome, found = "failed", f"{type(error).__name__}: {error}"
        result.checks.append(Check(name, outcome, found))
    return result


def smooth_images(num: int, channels: int = 3, size: int = 48, seed: int = 0) -> Tensor:
    """Random images with some structure, `(num, channels, size, size)`, away from black and white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, channels, max(2, size // 6), max(2, size // 6), generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (0.1 + 0.8 * images + 0.05 * torch.rand(images.shape, generator=generator)).clamp(0.05, 0.95)


class _Kit:
    """The checks of one reward on some images."""

    def __init__(
        self,
        reward: Reward,
        images: Tensor,
        prompts: list[str],
        labels: Tensor,
        tolerance: float,
        gradient_tolerance: float,
        seed: int,
    ) -> None:
        self.reward, self.images, self.prompts, self.labels = reward, images, prompts, labels
        self.tolerance, self.gradient_tolerance, self.seed = tolerance, gradient_tolerance, seed
        self.groups = torch.arange(len(images), device=images.device) // 2
        # the rows that are scored together
        self.parts = torch.arange(len(images)).split(2 if "groups" in reward.needs else 1)

    def checks(self) -> list[tuple[str, Callable[[], tuple[str, str]]]]:
        return [
            ("shape and dtype", self.shape),
            ("deterministic", self.deterministic),
            ("batch independence", self.independence),
            ("autocast", self.autocast),
            ("no graph under no_grad", self.no_graph),
            ("gradient", self.gradient),
            ("gradient of its own image alone", self.own_gradient),
            ("NaN pixels", self.nan),
        ]

    def values(self, images: Tensor | None = None, rows: Sequence[int] | None = None) -> Tensor:
        images = self.images if images is None else images
        rows = range(len(images)) if rows is None else rows
        index = list(rows)
        return evaluate(self.reward, images, [self.prompts[i] for i in index], self.labels[index], self.groups[index])

    def by_part(self, values: Tensor) -> Tensor:
        """Sums over the rows that are scored together."""
        return torch.stack([values[rows].sum() for rows in self.parts])

    def plain(self, *arguments: Any) -> Tensor:
        with torch.no_grad():
            return self.values(*arguments).double()

    def scale(self, values: Tensor) -> float:
        """The unit of differences of values."""
        return max(values.std().item(), 1e-3 * values.abs().max().item(), 1e-12)

    def same(self, a: Tensor, b: Tensor, what: str, times: float = 1.0) -> tuple[str, str]:
        difference = (a - b).abs().max().item() / self.scale(a)
        limit = times * self.tolerance
        outcome = "passed" if difference <= limit else "failed"
        return outcome, f"{what} differ by {difference:.2g} of their spread (at most {limit:.2g})"

    def shape(self) -> tuple[str, str]:
        with torch.no_grad():
            values = self.values()
        if values.dtype.itemsize < 4:
            return "failed", f"{values.dtype}: too coarse for log-sum-exp, return float32"
        return "passed", f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"

    def deterministic(self) -> tuple[str, str]:
        before, states = self.images.clone(), self.random_states()
        first = self.plain()
        if not torch.equal(before, self.images):
            return "failed", "it changes the images it is given"
        if not all(map(torch.equal, states, self.random_states())):
            return "failed", "it draws from the global random state: give it a generator of its own with a fixed seed"
        training = self.reward.training
        try:
            self.reward.train()
            after = self.plain()
        finally:
            self.reward.train(training)
        return self.same(first, after, "two calls")

    def random_states(self) -> list[Tensor]:
        device = self.images.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def independence(self) -> tuple[str, str]:
        together, order = self.plain(), list(range(len(self.images)))[::-1]
        alone = torch.cat([self.plain(self.images[rows], rows.tolist()) for rows in self.parts])
        outcome, found = self.same(together, alone, "values in a batch and alone")
        if outcome == "failed":
            return outcome, found
        return self.same(together[order], self.plain(self.images[order], order), "values in another order")

    def autocast(self) -> tuple[str, str]:
        exact = self.plain()
        with torch.autocast(self.images.device.type, torch.bfloat16):
            values = self.plain(self.images)
            with torch.no_grad():
                coarse = self.values().dtype.itemsize < 4
        if coarse:
            return "failed", "16 bits come out of it in autocast: return float32"
        if not values.isfinite().all():
            return "failed", "values in autocast are not finite"
        return self.same(exact, values, "values with and without bf16 autocast", 0.2 / self.tolerance)

    def no_graph(self) -> tuple[str, str]:
        images = self.images.clone().requires_grad_()
        with torch.no_grad():
            values = self.values(images)
        if values.requires_grad:
            return "failed", "values carry a graph under no_grad"
        if not self.reward.differentiable and self.values(images.detach()).requires_grad:
            return "failed", "it says that it is not differentiable, and its values carry a graph"
        return "passed", ""

    def gradient(self) -> tuple[str, str]:
        if not self.reward.differentiable:
            return "skipped", "differentiable = False"
        images = self.images.clone().requires_grad_()
        values = self.values(images)
        if not values.requires_grad:
            return "failed", "values carry no gradient: say differentiable = False, or keep detach() and no_grad out"
        (gradient,) = torch.autograd.grad(values.sum(), images)
        if not gradient.isfinite().all():
            return "failed", "the gradient is not finite"
        size = self.by_part(gradient.flatten(1).square().sum(dim=1)).sqrt()
        if not (size > 0).any():
            return "failed", "the gradient is zero everywhere"
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(images.shape, generator=generator).to(images)
        worst = 0.0
        # along the gradient, where the change is largest; and halfway to a random direction
        for direction in (gradient, _unit(gradient) + _unit(noise)):
            direction = _unit(direction)
            wanted = self.by_part((gradient * direction).flatten(1).sum(dim=1).double())
            errors = []
            for step in STEPS:
                ahead, behind = (self.plain(self.images + sign * step * direction) for sign in (1, -1))
                errors.append(
                    (self.by_part(ahead - behind) / (2 * step) - wanted).abs()
                    / size.double().clamp_min(size.max() * 1e-3)
                )
            # the best step for each image: large steps are not linear, small ones are lost in rounding
            worst = max(worst, torch.stack(errors).amin(dim=0).max().item())
        outcome = "passed" if worst <= self.gradient_tolerance else "failed"
        return outcome, f"off finite differences by {worst:.2g} of its size (at most {self.gradient_tolerance:g})"

    def own_gradient(self) -> tuple[str, str]:
        if not self.reward.differentiable:
            return "skipped", "differentiable = False"
        images = self.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.values(images)[0], images)
        own = len(self.parts[0])
        others = gradient[own:].abs().max().item()
        found = f"the first reward's gradient in other {'images' if own == 1 else 'groups'} is at most {others:.2g}"
        return ("passed" if others <= 1e-6 * max(gradient[:own].abs().max().item(), 1e-30) else "failed"), found

    def nan(self) -> tuple[str, str]:
        images = self.images.clone()
        rows = images.shape[2] // 4  # in the middle, so that a crop or a mask keeps some of it
        images[1, :, rows : max(rows + 1, 3 * rows)] = torch.nan
        exact = self.plain()
        context = {"prompts": self.prompts, "labels": self.labels, "groups": self.groups}
        try:
            with torch.no_grad():
                values = self.reward(images, *[context[n] for n in self.reward.needs[1:]]).double()
        except Exception as error:
            return "passed", f"raises {type(error).__name__}"
        if values[1].isfinite():
            return "failed", f"an image with NaN pixels gets {values[1].item():.3g}: return NaN, or raise"
        rest = [i for rows in self.parts if 1 not in rows for i in rows.tolist()]
        return self.same(exact[rest], values[rest], "values beside an image with NaN")


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, *[1] * (x.dim() - 1))
