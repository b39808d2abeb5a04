"""The lines of a report on images of prompts, from the outcomes of their cells and from what evaluators wrote."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.prompt_cells import Setting
from mfm_benchmarks.parts.thumbnails import thumbnails
from mfm_benchmarks.suite import Outcome, Results
from mfm_lightning.metrics.measured import Measured, mean_of, mean_of_groups
from mfm_lightning.sampling.evaluations import read_evaluation
from mfm_lightning.utils.decoding import load_image

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PromptEntry(Entry):
    """A setting's images of all prompts.

    Attributes:
        network, evaluations: of the transformer and of the reward, an image.
        seconds: an image.
        others: what is not optimised, by name.
        folder: of the images, seen from the report's.
    """

    network: float
    evaluations: float
    seconds: Measured
    others: dict[str, Measured]
    folder: str


def entry_of(
    setting: Setting, reward: str, results: Results, evaluated: Mapping[str, Measured], output: Path, shown: int
) -> PromptEntry | None:
    """A setting as one line of a reward's curves; None where its images or their reward failed.

    Args:
        evaluated: what evaluators found, by name.
        output: the suite's folder.
        shown: prompts in the pictures.
    """
    made, scored = results.all(setting.made), results.all(setting.scored[reward])
    if made is None or scored is None:
        return None
    prompts = torch.tensor([image.prompt_index for image in setting.folder.images])

    def over_prompts(outcomes: Sequence[Outcome], key: str) -> Measured:
        values = torch.cat([outcome.tensors[key].reshape(-1) for outcome in outcomes])
        return mean_of_groups(values, prompts)

    others = {
        name: over_prompts(outcomes, "score")
        for name, cells in setting.scored.items()
        if name != reward and (outcomes := results.all(cells)) is not None
    }
    best = over_prompts(scored, "best") if all("best" in outcome.tensors for outcome in scored) else None
    spreads = results.all(setting.spread) if setting.spread else None
    diversity = None if spreads is None else mean_of(torch.cat([o.tensors["diversity"] for o in spreads]))
    network, evaluations = over_prompts(made, "network").value, over_prompts(made, "reward").value
    return PromptEntry(
        setting.method, setting.label, None, network + evaluations, over_prompts(scored, "score"), None, diversity,
        first_images(setting, shown), network=network, evaluations=evaluations, seconds=over_prompts(made, "seconds"),
        others={**others, **evaluated}, best=best, folder=str(setting.folder.path.relative_to(output)),
    )  # fmt: skip


def first_images(setting: Setting, num: int) -> Tensor:
    """The first image of each of the first prompts, `(P, C, h, w)`; empty where a file is gone."""
    step = setting.folder.images_per_prompt
    files = [setting.folder.path / file for file in setting.folder.files[: num * step : step]]
    if not all(file.is_file() for file in files):
        return torch.empty(0)
    return torch.cat([thumbnails(load_image(file)[None]) for file in files])


def evaluated(
    settings: Sequence[Setting], evaluations: Mapping[str, str]
) -> tuple[dict[str, dict[str, Measured]], list[str]]:
    """What evaluators found, by a setting's name and theirs; and what is to be said of it.

    Args:
        evaluations: files in the folders of the settings, by the names of the evaluators.
    """
    found: dict[str, dict[str, Measured]] = {setting.name: {} for setting in settings}
    notes: list[str] = []
    for name, file in evaluations.items():
        absent = [setting for setting in settings if not (setting.folder.path / file).is_file()]
        if absent:
            notes.append(
                f"{name}: {len(absent)} of {len(settings)} settings have no {file} in the folder of their images, such "
                f"as {absent[0].folder.path}: run the evaluator there, then this command again."
            )
        for setting in settings:
            if setting in absent:
                continue
            try:
                scores = read_evaluation(setting.folder.path / file, setting.folder)
                if left := len(setting.folder.images) - len(scores):
                    num, path = len(setting.folder.images), setting.folder.path / file
                    raise ValueError(
                        f"{left} of {num} images have no row in {path}, and all methods must have the same"
                    )
            except ValueError as error:
                notes.append(f"{name} is left out for {setting.name}: {error}.")
                log.warning("%s", notes[-1])
                continue
            images = setting.folder.images
            values = torch.tensor([scores[image.index] for image in images], dtype=torch.float64)
            prompts = torch.tensor([image.prompt_index for image in images])
            found[setting.name][name] = mean_of_groups(values, prompts)
    return found, notes
