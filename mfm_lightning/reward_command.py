"""`mfm rewards`: list the rewards, or score a folder of images with one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewards
from mfm_lightning.images import SUFFIXES
from rewards import RewardError


def main(args: Sequence[str]) -> None:
    """Entry point of the subcommand.

    Raises:
        RewardError: for an unknown reward, options that do not fit, or a missing prompt.
        FileNotFoundError: if the folder holds no images.
    """
    parser = argparse.ArgumentParser(prog="mfm rewards", description="List the rewards, or score images with one.")
    parser.add_argument("--score", metavar="NAME", help="reward to score with")
    parser.add_argument("--images", metavar="DIR", type=Path, help="folder of images")
    parser.add_argument("--prompt", help="text for rewards that need one")
    parser.add_argument("--label", type=int, help="class for rewards that need one")
    parser.add_argument(
        "--option", metavar="KEY=VALUE", action="append", default=[], help="an option of the reward, value as YAML"
    )
    options = parser.parse_args(args)
    console = Console()
    if options.score is None:
        table = Table("name", "what it is")
        for name, description in rewards.available().items():
            table.add_row(name, description)
        console.print(table)
        return
    if options.images is None:
        parser.error("--score needs --images DIR")
    reward = rewards.build(options.score, **dict(_option(text) for text in options.option))
    scores = score_folder(reward, options.images, options.prompt, options.label)
    table = Table("image", options.score)
    for name, score in sorted(scores.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{score:.5g}")
    console.print(table)


def score_folder(
    reward: rewards.Reward, folder: Path, prompt: str | None = None, label: int | None = None
) -> dict[str, float]:
    """The reward of each image in a folder, by file name; images may differ in size."""
    paths = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {folder}")
    scores = {}
    for path in paths:
        try:
            with torch.no_grad():
                value = rewards.evaluate(
                    reward, load_image(path)[None], [prompt] if prompt is not None else None,
                    torch.tensor([label]) if label is not None else None,
                )  # fmt: skip
        except RewardError as error:
            raise RewardError(f"{path}: {error}") from error
        scores[path.name] = value.item()
    return scores


def load_image(path: Path) -> Tensor:
    """An image file as `(C, H, W)` in [0, 1]; grey files have one channel, others three."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    with Image.open(path) as image:
        return to_tensor(image if image.mode == "L" else image.convert("RGB"))


def _option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RewardError(f"option {text!r} must be KEY=VALUE")
    return key, yaml.safe_load(value)
