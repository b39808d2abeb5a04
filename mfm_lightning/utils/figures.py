"""Figures that several parts draw; each function writes one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def image_grid(
    rows: Tensor,
    path: str | Path,
    title: str,
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    size: float = 0.7,
) -> None:
    """Images in [0, 1], `(R, C, channels, H, W)`, as a grid.

    Args:
        columns: names of the first columns.
        captions: lines above each image, R rows of C.
        size: width of an image in inches.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    R, C = rows.shape[:2]
    tallest = 1 if captions is None else 1 + max(text.count("\n") for row in captions for text in row)
    height = size - 0.08 if captions is None else size + 0.15 * tallest
    figure = Figure(figsize=(max(size * C, 4), height * R + 0.6), layout="constrained")
    axes = figure.subplots(R, C, squeeze=False)
    for i in range(R):
        for j in range(C):
            image = rows[i, j].detach().cpu().float().permute(1, 2, 0).squeeze(-1).numpy()
            axes[i, j].imshow(image, cmap="gray", vmin=0, vmax=1)
            axes[i, j].axis("off")
            if captions is not None:
                axes[i, j].set_title(captions[i][j], fontsize=7, pad=2)
            elif i == 0 and j < len(columns):
                axes[i, j].set_title(columns[j], fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def before_after(
    before: Tensor, after: Tensor, scores: tuple[Tensor, Tensor], path: str | Path, title: str, columns: int = 8
) -> None:
    """Images `(B, C, H, W)` in pairs, the first above the second, each with its score; `scores` are two `(B,)`."""
    columns = min(columns, len(before))
    num = len(before) // columns * columns
    rows, captions = [], []
    for begin in range(0, num, columns):
        for images, values in zip((before, after), scores, strict=True):
            rows.append(images[begin : begin + columns])
            captions.append([f"{v:.3g}" for v in values[begin : begin + columns].tolist()])
    image_grid(torch.stack(rows), path, title, captions=captions)


def scatter(points: Mapping[str, Tensor], path: str | Path, title: str) -> None:
    """The first two coordinates of samples `(B, D)` by name, side by side on the same axes."""
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4 * len(points), 4.2), layout="constrained")
    axes = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (name, x) in zip(axes, points.items(), strict=True):
        x = x.detach().cpu().flatten(1)
        axis.scatter(x[:, 0], x[:, 1], s=4, linewidths=0, alpha=0.6)
        axis.set(title=name, aspect="equal")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
