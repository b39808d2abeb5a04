"""Reward against cost on a pretrained text-to-image flow, for prompts and rewards of the user's."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch

from mfm_benchmarks.blocks import Block, Text
from mfm_benchmarks.claims import counted
from mfm_benchmarks.methods import MethodSettings, Point, points
from mfm_benchmarks.parts.opened_flow import open_adapted, open_flow
from mfm_benchmarks.parts.posterior_recovery import PosteriorRecovery
from mfm_benchmarks.parts.prompt_cells import PromptCells
from mfm_benchmarks.parts.prompt_draws import PromptDraws
from mfm_benchmarks.parts.prompt_entries import PromptEntry, entry_of, evaluated
from mfm_benchmarks.parts.prompt_images import PromptFlow
from mfm_benchmarks.parts.prompt_pool import PromptPool
from mfm_benchmarks.parts.prompt_report import COLUMNS, PromptReport
from mfm_benchmarks.parts.reward_report import BASE, BEST
from mfm_benchmarks.parts.value_estimation import ValueComparison
from mfm_benchmarks.spec import Spec, plain
from mfm_benchmarks.suite import Cell, Results, Suite, no_result
from mfm_benchmarks.suites.alignment import RewardSettings
from mfm_lightning.alignment import BestOfN, TimeGrid
from mfm_lightning.checkpoints import CheckpointError, fingerprint
from mfm_lightning.data import StepDataModule
from mfm_lightning.metrics.diversity import find_diversity
from mfm_lightning.sampling.prompt_folder import PromptFolder
from mfm_lightning.sampling.prompts import Prompt, as_prompts
from mfm_rewards import Reward, RewardError, evaluate
from mfm_rewards import build as build_reward
from mfm_rewards.testing import smooth_images


class TextToImageSuite(Suite):
    """Rewards of images of prompts by evaluations and seconds, with the base flow and Best-of-N beside all methods.

    Args:
        flow: a folder of diffusers or a Hugging Face id; or, with options,
            `{class_path: mfm_lightning.backbones.load_flow, init_args: {name: ..., ...}}`.
        mfm: a `model.safetensors` of a `FlowAdapter` of this flow, for methods that draw posteriors in one step or
            need a flow map, and for `posterior` and `value`. The others run on the flow alone, with or without it.
        data: captioned latents of the flow (EncodedImages, LatentShards), whose test states are noised for `posterior`
            and `value`; their captions are the conditions, with `guidance`.
        posterior: the part on posterior draws; left out where None.
        value: the part on value estimates, for each reward; left out where None.
        prompts: a file (`mfm_lightning.sampling.prompts.read_prompts`), or texts.
        rewards: what is optimised, by the names of the report.
        methods: by the names of the report.
        held_out: rewards that are measured alone, by the names of the report.
        alignment: the reward that stands for how well an image fits its prompt, such as clip_score; measured alone.
            None for none.
        best_of_n: candidates of Best-of-N, whose first is the base flow.
        images_per_prompt: from two on there is a diversity.
        seed: of the noise; all methods take the same for an image. A prompt with a seed of its own has that.
        guidance: scale of the flow's guidance; the pipeline's usual one where None, 1 for none.
        negative: negative prompt; the pipeline's usual one where None.
        column: of the file, that has the texts.
        batch_size: images of a method at once.
        block: prompts whose images are made between two looks at the store: what a stopped run may lose.
        layout: of the images' folders: "flat", "geneval", "compbench" or "unigenbench".
        evaluations: by the names of the report, files that an evaluator wrote into the folder of a setting's images,
            such as results.jsonl; read where they are there.
        diversity: distance of two images of a prompt (`mfm_lightning.metrics.diversity.find_diversity`).
        shown: prompts in the pictures.
        quick_prompts: prompts of --quick, which has the cheapest setting of each method.

    Raises:
        ValueError: for numbers below 1, names that stand twice, or a method that is trained first; for `posterior` or
            `value` without `mfm` and `data`.
    """

    name = "text-to-image"
    title = "Text to image: reward against cost"
    about = (
        "Alignment of a pretrained text-to-image flow without training: the mean reward that each method reaches, by "
        "evaluations of the transformer and of rewards (NFE), and by seconds per image."
    )
    intervals = (
        "Means and differences have a 95 % interval over prompts, beside the number or shaded. Images of one prompt "
        "are not independent, so they are averaged first. Differences are paired by prompt: all methods start from "
        "the same noise. The page says “higher” or “lower” only if the interval excludes zero. Each interval is of "
        "one comparison; which setting has the fewest evaluations or seconds is decided for all settings of a reward "
        "together."
    )

    def __init__(
        self,
        flow: Spec | str,
        prompts: str | list[str],
        rewards: dict[str, RewardSettings],
        methods: dict[str, MethodSettings],
        held_out: dict[str, Spec | str] | None = None,
        alignment: Spec | str | None = None,
        best_of_n: PromptPool | None = None,
        images_per_prompt: int = 4,
        seed: int = 0,
        guidance: float | None = None,
        negative: str | None = None,
        column: str = "prompt",
        batch_size: int = 1,
        block: int = 4,
        layout: str = "flat",
        evaluations: dict[str, str] | None = None,
        diversity: str = "auto",
        shown: int = 4,
        quick_prompts: int = 2,
        mfm: str | None = None,
        data: StepDataModule | None = None,
        posterior: PosteriorRecovery | None = None,
        value: ValueComparison | None = None,
    ) -> None:
        self.flow, self.prompts, self.column = flow, prompts, column
        self.rewards, self.methods, self.held_out = dict(rewards), dict(methods), dict(held_out or {})
        self.alignment, self.best_of_n = alignment, best_of_n or PromptPool()
        self.images_per_prompt, self.seed, self.guidance, self.negative = images_per_prompt, seed, guidance, negative
        self.batch_size, self.block, self.layout = batch_size, block, layout
        self.evaluations, self.diversity, self.shown = dict(evaluations or {}), diversity, shown
        self.quick_prompts, self._limit, self._skipped = quick_prompts, None, {}
        self.mfm, self._draws = mfm, None
        if data is not None or posterior is not None or value is not None:
            if data is None or mfm is None:
                raise ValueError("posterior and value need both data (captioned latents) and mfm (the adapter's file)")
            self._draws = PromptDraws(data, posterior, value)
        numbers = {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "block": block, "shown": shown}
        for key, number in {**numbers, "quick_prompts": quick_prompts}.items():
            if number < 1:
                raise ValueError(f"{key} {number} must be at least 1")
        if not self.rewards or any(r.scale <= 0 or r.shares for r in self.rewards.values()):
            raise ValueError("rewards: give at least one, with a scale above 0 and no shares of classes")
        columns = [*self.rewards, *self.held_out, *self.evaluations, *(["alignment"] if alignment else [])]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise ValueError(
                f"{', '.join(twice)}: rewards, held_out, evaluations and alignment need names of their own"
            )
        if taken := set(columns) & set(COLUMNS):
            raise ValueError(f"{min(taken)!r} is a column of the report already: give what is measured another name")
        if taken := {BASE, BEST} & self.methods.keys():
            raise ValueError(f"a method cannot be called {min(taken)}: that is a baseline's name")
        for name, method in self.methods.items():
            if method.fit is not None:
                raise ValueError(f"method {name!r}: fit trains for a model of this package, not for a pretrained flow")
            if unknown := set(method.rewards or ()) - set(self.rewards):
                raise ValueError(f"method {name!r}: {min(unknown)} is none of the rewards {', '.join(self.rewards)}")
        self._points = [point for name, method in self.methods.items() for point in points(name, method)]

    # what is run

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def shrink(self) -> None:
        self._limit, self.images_per_prompt = self.quick_prompts, min(2, self.images_per_prompt)
        self.rewards = dict(itertools.islice(self.rewards.items(), 2))
        self.best_of_n.shrink()
        if self._draws is not None:
            self._draws.shrink()
        kept: dict[str, Point] = {}
        for point in self._points:
            if self.methods[point.method].quick:
                kept.setdefault(point.method, point)
            else:
                self._skipped[point.method] = "not in --quick, to save time (quick: false)"
        self._points = list(kept.values())

    @property
    def noise(self) -> str:
        prompts = [[prompt.text, prompt.seed] for prompt in self._source.prompts]
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]
        return f"{self.images_per_prompt} images of each of {len(prompts)} prompts ({digest}), seed {self.seed}"

    def missing(self) -> list[str]:
        self._methods = {point: point.build() for point in self._points}
        self._measured: dict[str, Reward] = {}
        found, prompts = [], []
        try:
            prompts = as_prompts(self.prompts, self.column)[: self._limit]
            PromptFolder(self.output, prompts, self.images_per_prompt, self.layout)
        except (FileNotFoundError, ImportError, ValueError) as error:
            found.append(f"prompts: {error}")
        for name, spec in self._specs().items():
            try:
                self._measured[name] = reward = build_reward(spec).eval().requires_grad_(False)
                if "labels" in reward.needs:
                    found.append(f"rewards, {name}: needs labels of classes, which prompts have none of")
                if "groups" in reward.needs:
                    found.append(f"rewards, {name}: scores images beside others, which the suite's blocks take apart")
            except RewardError as error:
                found.append(f"rewards, {name}: {error}")
        try:
            self._diversity = find_diversity(self.diversity) if self.images_per_prompt > 1 else None
        except (FileNotFoundError, ImportError, ValueError) as error:
            found.append(f"diversity: {error}")
        if not found:  # last, for it takes the longest
            found += self._load(prompts)
        return found

    def _load(self, prompts: list[Prompt]) -> list[str]:
        try:
            flow = open_flow(self.flow)
            flow.time_grid(self.best_of_n.steps)
        except (FileNotFoundError, ImportError, CheckpointError, ValueError) as error:
            return [f"flow: {error}"]
        try:
            for method in self._methods.values():
                _ = [grid.pairs(flow) for grid in vars(method).values() if isinstance(grid, TimeGrid)]
        except (TypeError, ValueError) as error:
            return [f"methods: {error}"]
        self._source = PromptFlow(
            flow, prompts, self.images_per_prompt, self.layout, self.seed, self.guidance, self.negative,
            self.batch_size, self.device,
        )  # fmt: skip
        try:
            if self.mfm is not None:
                self._source.adapted = open_adapted(self.mfm, flow, self.guidance)
                self._source.mfm = fingerprint(self.mfm)
        except (FileNotFoundError, ImportError, CheckpointError, ValueError) as error:
            return [f"mfm: {error}"]
        try:
            self._captions = [] if self._draws is None else self._draws.read(self._source)
        except (FileNotFoundError, ImportError, CheckpointError, ValueError) as error:
            return [f"data: {error}"]
        return []

    def _specs(self) -> dict[str, Any]:
        """All rewards that are measured, as `mfm_rewards.build` takes them."""
        found = {name: settings.plain for name, settings in self.rewards.items()}
        found |= {name: plain(spec) for name, spec in self.held_out.items()}
        return found | ({"alignment": plain(self.alignment)} if self.alignment else {})

    def prepare(self) -> None:
        self._source.prepare(self._captions)
        if self._diversity is not None:
            self._diversity.to(self.device)
        else:
            self._skipped["diversity"] = "needs images_per_prompt of 2 or more"
        for reward in self._measured.values():
            reward.to(self.device)
        self._probes = {name: self._probe(reward) for name, reward in self._measured.items()}
        if len(self._source.prompts) == 1:
            self._skipped["intervals"] = "are over prompts, and there is only one prompt"

    @torch.no_grad()
    def _probe(self, reward: Reward) -> list[str]:
        """The reward of a few images, rounded: results of a reward whose code has changed since are not taken."""
        images, texts = smooth_images(2).to(self.device), [p.text for p in self._source.prompts[:1]] * 2
        try:
            return [f"{value:.4g}" for value in evaluate(reward, images, texts).tolist()]
        except RewardError as error:
            return [str(error)]

    # what is made of it

    def cells(self) -> Sequence[Cell]:
        identities = {name: [spec, self._probes[name]] for name, spec in self._specs().items()}
        scales = {name: settings.scale for name, settings in self.rewards.items()}
        self._cells = PromptCells(
            self._source, self._measured, identities, scales, self.best_of_n, self._diversity, self.block, self.output
        )
        found = self._cells.baselines()
        for reward, point in itertools.product(self.rewards, self._points):
            wanted = self.methods[point.method].rewards
            if (wanted is None or reward in wanted) and self._suits(point, reward):
                found += self._cells.aligned(point, self._methods[point], reward)
        if self._draws is not None:
            found += self._draws.cells(self._source, self._measured, scales, identities)
        return found

    def _suits(self, point: Point, reward: str) -> bool:
        method = self._methods[point]
        try:
            self._source.model_for(method, self._measured[reward])
        except RewardError as error:
            self._skipped[f"{point.method}, {reward}"] = str(error)
            return False
        except CheckpointError as error:  # whatever the reward is
            more = "; or give an adapter's file (mfm)" if self.mfm is None else ""
            self._skipped[point.method] = f"{error}{more}"
            return False
        if isinstance(method, BestOfN):
            self._skipped[point.method] = "measured already as best_of_n, whose candidates all rewards share"
            return False
        return True

    # what is made of it

    def report(self, results: Results) -> Sequence[Block]:
        settings = [setting for setting in self._cells.settings if results.all(setting.made) is not None]
        scores, notes = evaluated(settings, self.evaluations)
        entries: dict[str, list[PromptEntry]] = {}
        for reward in self.rewards:
            for setting in settings:
                if setting.aim in (None, reward):
                    entry = entry_of(setting, reward, results, scores[setting.name], self.output, self.shown)
                    entries.setdefault(reward, []).extend([] if entry is None else [entry])
        draws = [] if self._draws is None else self._draws.blocks(results)
        if not any(entries.values()):
            return draws or [no_result(results)]
        if gone := [e.folder for found in entries.values() for e in found if not len(e.images)]:
            notes.append(f"The images in {', '.join(dict.fromkeys(gone))} were deleted, so they are in no picture.")
        shown = [prompt.text for prompt in self._source.prompts[: self.shown]]
        report = PromptReport(entries, [*self._measured, *self.evaluations], shown, next(iter(self.methods), ""))
        return [*report.blocks(), *draws, Text("How it was measured", [*self._how(), *notes])]

    def _how(self) -> list[str]:
        number, K = len(self._source.prompts), self.images_per_prompt
        found = [f"{number} prompts with {K} images each; the flow is a {type(self._source.flow).__name__}."]
        if self.mfm is not None:
            found.append(f"One-step draws and flow maps are those of the adapter {self.mfm}, whose base is the flow.")
        if self._draws is not None:
            found.append(self._draws.how)
        if self._diversity is not None:
            found.append(f"Diversity is the mean distance between two images of one prompt: {self._diversity.about}.")
        if self.alignment:
            found.append(f"Alignment to the prompt is measured by {self._specs()['alignment']}.")
        found.append(
            "Rewards are of the 8-bit images in the folders. Seconds are of one run, including decoding and the "
            f"scoring of the returned images, with {counted(self.batch_size, 'image')} at once and "
            f"{counted(self.best_of_n.max_rows, 'candidate')} of Best-of-N at once. The base flow and each "
            f"candidate take {self.best_of_n.steps} steps on the flow's own times."
        )
        return found
