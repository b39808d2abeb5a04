"""What `mfm rewards` shows: the zoo, one reward's options, scores of a folder's images, and the conformance checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

import mfm_rewards
from mfm_lightning.utils.console import console
from mfm_lightning.utils.decoding import load_image
from mfm_lightning.utils.image_files import find_files
from mfm_rewards import RewardError
from mfm_rewards.execution import Execution
from mfm_rewards.protocol import device_of
from mfm_rewards.registry import check_options, factory
from mfm_rewards.testing import Conformance, check_reward, smooth_images


def listing() -> Table:
    """All rewards, with what each is; below, what it needs, whether it has no gradient, and the memory that it is
    expected to take."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, description in mfm_rewards.available().items():
        made = factory(name)
        # what an installed package's reward needs is not known before it is imported
        needs = getattr(made, "needs", ("images",))[1:]
        card = getattr(made, "card", None)
        more = [
            *([f"needs {' and '.join(needs)}"] if needs else []),
            *([] if getattr(made, "differentiable", True) else ["no gradient"]),
            *([card.memory] if card and card.memory else []),
        ]
        table.add_row(name, Group(description, Text("; ".join(more), style="dim")) if more else description)
    return table


def describe(name: str, options: Mapping[str, Any] | None = None) -> Table:
    """A reward's description, weights and options.

    Raises:
        RewardError: for a reward that is not known, or `options` that it does not have.
    """
    made = factory(name)
    check_options(made, name, options or {}, complete=False)
    table = Table(show_header=False, box=None)
    table.add_row(name, docstring_parser.parse(inspect.getdoc(made) or "").description or "")
    if (card := getattr(made, "card", None)) is not None:
        for field in ("measures", "values", "memory", "licence", "source", "fetch"):
            table.add_row(field, getattr(card, field))
    for signature, text in options_of(made).items():
        table.add_row("option", Group(Text(signature), Padding(Text(text, style="dim"), (0, 0, 0, 2))))
    return table


def options_of(made: Callable[..., Any], prefix: str = "") -> dict[str, str]:
    """Options of a class or function, "name: type = default", each with its line of help; "" where it has none.

    The options of `execution` follow it, with their names in full, such as `execution.precision`.
    """
    help_of: dict[str, str] = {}
    for source in reversed(inspect.getmro(made)) if inspect.isclass(made) else (made,):  # a class's own lines count
        parsed = docstring_parser.parse(inspect.cleandoc(source.__doc__ or ""))
        help_of |= {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    found = {}
    for parameter in inspect.signature(made).parameters.values():
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = "" if parameter.annotation is parameter.empty else f": {_type_name(parameter.annotation)}"
        found[f"{prefix}{parameter.name}{kind}{default}"] = help_of.get(parameter.name, "")
        if parameter.name == "execution":
            found |= options_of(Execution, "execution.")
    return found


def _type_name(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def check(
    reward: mfm_rewards.Reward,
    folder: Path | None,
    prompts: str | Callable[[str], str] | None,
    label: int | None,
) -> Conformance:
    """The conformance checks on a folder's images, all of one size, or on random ones.

    Args:
        prompts: as in `score_folder`; the checks' own where None.
        label: as in `score_folder`; the checks' own where None.
    """
    if folder is None:
        images = smooth_images(4)
        names = [""] * len(images)
    else:
        images, names = _batch(folder)
    device = device_of(reward)
    texts = None if prompts is None else [_prompt(prompts, name) for name in names]
    labels = None if label is None else torch.full((len(names),), label, device=device)
    return check_reward(reward, images.to(device), texts, labels)


def show_checks(result: Conformance) -> None:
    """Print the outcome; SystemExit with status 1 if anything failed."""
    table = Table("check", "outcome", "found", title=result.reward)
    for check in result.checks:
        table.add_row(check.name, check.outcome, check.found)
    console().print(table)
    if result.failures:
        raise SystemExit(1)


def score_folder(
    reward: mfm_rewards.Reward,
    folder: Path,
    prompts: str | Callable[[str], str] | None = None,
    label: int | None = None,
) -> dict[str, float]:
    """The reward of each image in a folder, by file name; images may differ in size.

    Args:
        prompts: one for all, or what gives one for a file's name.
    """
    device, scores = device_of(reward), {}
    for path in image_paths(folder):
        try:
            with torch.no_grad():
                text = None if prompts is None else [_prompt(prompts, path.name)]
                labels = None if label is None else torch.tensor([label], device=device)
                value = mfm_rewards.evaluate(reward, load_image(path)[None].to(device), text, labels)
        except RewardError as error:
            raise RewardError(f"{path}: {error}") from error
        scores[path.name] = value.item()
    return scores


def image_paths(folder: Path, say: bool = True) -> list[Path]:
    """Images that lie in a folder itself.

    Args:
        say: count what else is there in a line.

    Raises:
        FileNotFoundError: if there are none.
        NotADirectoryError: for a file.
    """
    images, tars, left_out = find_files(folder, deep=False)
    for path in tars:
        left_out.add("tars", path.name)
    if not images:
        others = f"; {line}" if (line := left_out.line()) else ""
        raise FileNotFoundError(f"no images (.png, .jpg, ...) in {folder}{others}")
    if say:
        left_out.report(folder)
    return images


def _batch(folder: Path) -> tuple[Tensor, list[str]]:
    """A folder's images, which must have one shape, and their files' names."""
    paths = image_paths(folder)
    images = [load_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise RewardError(
                f"{path} has shape {tuple(image.shape)}, {paths[0]} {tuple(images[0].shape)}: the checks take a batch "
                "of one size"
            )
    return torch.stack(images), [path.name for path in paths]


def _prompt(prompts: str | Callable[[str], str], name: str) -> str:
    return prompts(name) if callable(prompts) else prompts
