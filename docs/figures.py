"""Draws the pictures of docs/concepts, from the MNIST model of the package and from an exact mixture.

python docs/figures.py              all of them, into docs/figures/: about three minutes on one core
python docs/figures.py value        one of them
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

import mfm_rewards
from mfm_lightning import (
    AlignmentMethod,
    BestOfN,
    DrawGradient,
    ExactGradient,
    FeynmanKac,
    GaussianMixture,
    MetaFlowMap,
    OraclePosterior,
    PixelDecoder,
    Search,
    Steering,
    Target,
    TimeGrid,
    load_model,
    sample_ode,
    sample_refinement,
)
from mfm_lightning.interpolant import interpolate
from mfm_rewards import Reward

OUTPUT = Path(__file__).with_name("figures")
BASE, TILTED, INK = "#8a93a6", "#d1495b", "#30343f"
MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)  # the paper's (F.1)
REWARD = mfm_rewards.build("linear_gaussian", operator=[1.2, -0.8], observation=-1.0, noise_std=0.6)
LIMITS = (-5.0, 5.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(states: Tensor) -> Tensor:
    return PixelDecoder()(states)[:, 0].detach()


def a_digit(model: MetaFlowMap) -> Tensor:
    return sample_refinement(model, noise(1, 1, 28, 28), 4, generator=torch.Generator().manual_seed(15))


def panel(axes, title: str = "") -> None:
    axes.set(xlim=LIMITS, ylim=LIMITS, xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_color("#c8ccd4")


def image(axes, picture: Tensor, title: str = "") -> None:
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_color("#c8ccd4")


def plane(points: int = 160) -> tuple[Tensor, Tensor, Tensor]:
    """A grid over the panel: its axis, and its points `(points^2, 2)` with their shape."""
    axis = torch.linspace(*LIMITS, points)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return axis, torch.stack([x, y], dim=-1).reshape(-1, 2), x


def contours(axes, density: GaussianMixture, colour: str) -> None:
    axis, points, like = plane()
    level = density.log_prob(1.0, points).reshape(like.shape)
    peak = float(level.max())
    axes.contour(axis, axis, level, levels=[peak - 4, peak - 1], colors=colour, linewidths=[0.8, 1.2], linestyles="-")


def interpolant() -> Figure:
    """The noisy states of a mixture and of a digit, from noise to data."""
    times = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure, rows = plt.subplots(2, 5, figsize=(9, 3.9))
    data, start = MIXTURE.sample(1500, torch.Generator().manual_seed(0)), noise(1500, 2)
    digit = a_digit(load_model("mnist"))
    grain = noise(1, 1, 28, 28, seed=1)
    for t, above, below in zip(times, rows[0], rows[1], strict=True):
        x_t = interpolate(torch.full((len(data),), t), start, data)
        above.scatter(*x_t.T, s=1.5, color=BASE, linewidths=0)
        panel(above, f"t = {t:g}" + {0.0: ", noise", 1.0: ", data"}.get(t, ""))
        image(below, pixels(interpolate(torch.tensor([t]), grain, digit))[0])
    return figure


def posterior() -> Figure:
    """One-step draws of the MNIST model, given noisier and less noisy states of one digit."""
    model, times, draws = load_model("mnist"), [0.1, 0.3, 0.5, 0.7], 7
    digit = a_digit(model)
    figure, rows = plt.subplots(len(times), draws + 2, figsize=(9, 4.3))
    for t, axes in zip(times, rows, strict=True):
        x_t = interpolate(torch.tensor([t]), noise(1, 1, 28, 28, seed=1), digit)
        with torch.no_grad():
            x1 = model.sample_posterior(x_t, t, noise=noise(1, draws, 1, 28, 28, seed=2))[0]
            mean = x_t + (1 - t) * model.drift(t, x_t)
        image(axes[0], pixels(x_t)[0], "noisy state" if t == times[0] else "")
        image(axes[1], pixels(mean)[0], "mean" if t == times[0] else "")
        axes[0].set_ylabel(f"t = {t:g}", fontsize=10, color=INK)
        for ax, picture in zip(axes[2:], pixels(x1), strict=True):
            image(ax, picture)
        if t == times[0]:
            axes[2 + draws // 2].set_title("draws, one network evaluation each", fontsize=10, color=TILTED)
    return figure


def value() -> Figure:
    """The exact value of noisy states of the mixture at three times, with the steering; the reward at t = 1."""
    times = [0.2, 0.5, 0.8, 1.0]
    figure, rows = plt.subplots(1, 4, figsize=(9, 2.6))
    axis, points, like = plane(100)
    _, few, _ = plane(12)
    for t, axes in zip(times, rows, strict=True):
        level = REWARD(points) if t == 1 else MIXTURE.value(points, t, REWARD)
        axes.pcolormesh(axis, axis, level.reshape(like.shape).clamp_min(-12), cmap="BuPu", vmin=-12, vmax=0)
        if t < 1:
            near = few[MIXTURE.log_prob(t, few) > -9]
            arrows = MIXTURE.steering(near, t, REWARD)
            arrows = arrows / arrows.norm(dim=1, keepdim=True).clamp_min(1.5)
            axes.quiver(*near.T, *arrows.T, color=TILTED, scale=14, width=0.008)
        panel(axes, "t = 1: the reward" if t == 1 else f"value at t = {t:g}")
    return figure


def draws_needed() -> Figure:
    """The error of the value's estimate by the number of draws, against the closed form."""
    counts, repeats = [1, 2, 4, 8, 16, 32, 64, 128, 256], 400
    figure, axes = plt.subplots(figsize=(4.4, 3.0))
    states = interpolate(torch.full((32,), 0.5), noise(32, 2), MIXTURE.sample(32, torch.Generator().manual_seed(1)))
    exact = MIXTURE.value(states, 0.5, REWARD)
    x1 = MIXTURE.sample_posterior(states, 0.5, max(counts) * repeats, generator=torch.Generator().manual_seed(2))
    rewards = REWARD(x1.flatten(0, 1)).reshape(len(states), repeats, max(counts))
    bias, spread = [], []
    for n in counts:
        error = rewards[:, :, :n].logsumexp(dim=2) - math.log(n) - exact[:, None]
        bias.append(-float(error.mean()))
        spread.append(float(error.std(dim=1).mean()))
    axes.loglog(counts, bias, "o-", color=TILTED, label="bias, downwards", markersize=4)
    axes.loglog(counts, spread, "s-", color=BASE, label="standard deviation", markersize=4)
    axes.set(xlabel="posterior draws N", ylabel="error of the value")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def steering() -> Figure:
    """Paths of the base flow and of the steered one, from the same noise, and where they end."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.1))
    target, x0, many = Target(MIXTURE, REWARD), noise(14, 2, seed=3), noise(800, 2, seed=5)
    grid = TimeGrid(100)
    for ax, title, colour, strength in zip(
        axes, ("base flow", "steered, strength 0.3", "steered, strength 1"), (BASE, "#a3627c", TILTED), (0.0, 0.3, 1.0),
        strict=True,
    ):  # fmt: skip
        method = Steering(ExactGradient(MIXTURE), grid, strength=strength)
        contours(ax, MIXTURE.tilted(REWARD) if strength == 1 else MIXTURE, "#b7bcc8")
        ends = method(target, many, torch.Generator().manual_seed(0)).states
        ax.scatter(*ends.T, s=2, color=colour, alpha=0.5, linewidths=0)
        ax.scatter(*x0.T, s=9, color=INK, zorder=3)
        for path in paths(method, target, x0).transpose(0, 1):
            ax.plot(*path.T, color=INK, linewidth=0.7, alpha=0.8)
        panel(ax, title)
    return figure


def paths(method: Steering, target: Target, x0: Tensor) -> Tensor:
    """The states at all steps, `(steps + 1, B, 2)`."""
    from mfm_lightning import steer

    found = [x0]
    steer(target, x0, method, callback=lambda k, x: found.append(x))
    return torch.stack(found)


def digits() -> Figure:
    """MNIST digits of the base flow, and steered from the same noise to four rewards (MFM-G, four draws a step)."""
    model, x0 = load_model("mnist"), noise(14, 1, 28, 28, seed=2)
    rewards: list[tuple[str, Reward, float]] = [
        ("more ink", mfm_rewards.build("brightness"), 50.0),
        ("symmetric", mfm_rewards.build("symmetry"), 200.0),
        ("a three", mfm_rewards.build("classifier", classifier="mnist", target=3), 2.5),
        ("0 or 1", mfm_rewards.build("class_mixture", classifier="mnist", weights=[1, 1, *[0] * 8]), 1.0),
    ]
    method = Steering(DrawGradient(num_draws=4), TimeGrid(50), clip=2.0)
    with torch.no_grad():
        lines = [("base flow", sample_ode(model.drift, x0, 50))]
    for name, reward, scale in rewards:
        target = Target(model, reward, PixelDecoder(), reward_scale=scale)
        lines.append((name, method(target, x0, torch.Generator().manual_seed(0)).states))
    figure, rows = plt.subplots(len(lines), len(x0), figsize=(9, 3.6))
    figure.subplots_adjust(wspace=0.06, hspace=0.06)
    for (name, states), axes in zip(lines, rows, strict=True):
        for ax, picture in zip(axes, pixels(states), strict=True):
            image(ax, picture)
        bold = "normal" if name == "base flow" else "bold"
        axes[0].set_ylabel(name, fontsize=9, color=INK, rotation=0, ha="right", va="center", weight=bold)
    return figure


def search() -> Figure:
    """Samples of four methods, all with exact draws or drifts, on the tilted density."""
    target, x0, grid = Target(MIXTURE, REWARD), noise(400, 2, seed=6), TimeGrid(50)
    methods: list[tuple[str, AlignmentMethod]] = [
        ("Best-of-16", BestOfN(16, steps=50)),
        ("search", Search(num_particles=4, num_draws=4, steps=10, posterior=OraclePosterior(MIXTURE))),
        ("Feynman-Kac, 16 particles", FeynmanKac(num_particles=16, grid=grid)),
        ("steering", Steering(ExactGradient(MIXTURE), TimeGrid(100))),
    ]
    figure, rows = plt.subplots(1, 4, figsize=(9, 2.6))
    for ax, (name, method) in zip(rows, methods, strict=True):
        contours(ax, MIXTURE.tilted(REWARD), "#b7bcc8")
        ends = method(target, x0, torch.Generator().manual_seed(0)).states
        ax.scatter(*ends.T, s=3, color=TILTED if name == "steering" else INK, alpha=0.6, linewidths=0)
        panel(ax, name)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    made.__name__: made for made in (interpolant, posterior, value, draws_needed, steering, digits, search)
}


def main(names: list[str]) -> None:
    if unknown := set(names) - set(PICTURES):
        sys.exit(f"no picture {', '.join(sorted(unknown))}: there are {', '.join(PICTURES)}")
    matplotlib.use("agg")
    OUTPUT.mkdir(exist_ok=True)
    for name in names or PICTURES:
        torch.manual_seed(0)
        figure = PICTURES[name]()
        figure.savefig(OUTPUT / f"{name}.png", dpi=150, bbox_inches="tight", facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
