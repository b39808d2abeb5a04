"""Reward against cost on a pretrained text-to-image flow, for prompts and rewards of the user's."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block, Text
from mfm_benchmarks.methods import MethodSettings, Point, points
from mfm_benchmarks.parts.prompt_images import PromptFlow, make
from mfm_benchmarks.parts.prompt_pool import PromptPool, candidate_file
from mfm_benchmarks.parts.prompt_report import PromptEntry, PromptReport
from mfm_benchmarks.parts.prompt_scores import score, score_files, spread
from mfm_benchmarks.parts.reward_report import BASE, BEST
from mfm_benchmarks.spec import Spec, build, plain
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite
from mfm_benchmarks.suites.alignment import RewardSettings
from mfm_lightning.alignment import BestOfN, TimeGrid
from mfm_lightning.backbones import TextToImageFlow
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.metrics.diversity import find_diversity
from mfm_lightning.metrics.measured import Measured, mean_of, mean_of_groups
from mfm_lightning.sampling.evaluations import read_evaluation
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_lightning.sampling.prompts import Prompt, as_prompts
from mfm_lightning.utils.decoding import load_image
from mfm_rewards import Reward, RewardError, evaluate
from mfm_rewards import build as build_reward
from mfm_rewards.testing import smooth_images

log = logging.getLogger(__name__)
THUMBNAIL = 192  # pixels a side at most, in the report


@dataclass
class Setting:
    """One line of the report: a method at one cost, for one reward.

    Attributes:
        aim: the reward that is optimised; None for the base flow.
        name: of all three.
        folder: of its images; identity: what they depend on.
        made: cells that make the images, one a block; scored: their rewards, by name; spread: their diversity.
    """

    method: str
    label: str
    aim: str | None
    name: str
    folder: PromptFolder
    identity: dict[str, Any]
    made: list[Cell] = field(default_factory=list)
    scored: dict[str, list[Cell]] = field(default_factory=dict)
    spread: list[Cell] = field(default_factory=list)


class TextToImageSuite(Suite):
    """Rewards of images of prompts by evaluations and seconds, with the base flow and Best-of-N beside all methods.

    Args:
        flow: `{class_path: mfm_lightning.backbones.load_flow, init_args: {name: ..., ...}}`.
        prompts: a file (`mfm_lightning.sampling.prompts.read_prompts`), or texts.
        rewards: what is optimised, by the names of the report.
        methods: by the names of the report.
        held_out: rewards that are measured alone, by the names of the report.
        alignment: the reward that stands for how well an image fits its prompt, such as clip_score; measured alone. None
            for none.
        best_of_n: candidates of Best-of-N, whose first is the base flow.
        images_per_prompt: from two on there is a diversity.
        seed: of the noise; all methods take the same for an image. A prompt with a seed of its own has that.
        guidance: scale of the flow's guidance; the pipeline's usual one where None, 1 for none.
        negative: negative prompt; the pipeline's usual one where None.
        column: of the file, that has the texts.
        batch_size: images of a method at once.
        block: prompts whose images are made between two looks at the store: what a stopped run may lose.
        layout: of the images' folders: "flat", "geneval", "compbench" or "unigenbench".
        evaluations: by the names of the report, files that an evaluator wrote into the folder of a setting's images, such
            as results.jsonl; read where they are there.
        diversity: distance of two images of a prompt (`mfm_lightning.metrics.diversity.find_diversity`).
        shown: prompts in the pictures.
        quick_prompts: prompts of --quick, which has the cheapest setting of each method.

    Raises:
        ValueError: for numbers below 1, names that stand twice, or a method that is trained first.
    """

    name = "text-to-image"
    title = "Text to image: reward against cost"
    about = (
        "Alignment of a pretrained text-to-image flow with no training: the mean reward that each method reaches, by "
        "evaluations of the transformer and of rewards (NFE; a backward counts as one more) and by seconds an image."
    )
    intervals = (
        "Means and differences have a 95 % interval, in brackets or shaded, over prompts: images of one prompt are not "
        "independent, so each prompt's are averaged first. Differences are paired by prompt: all methods begin from the same "
        "noise. “Higher” or “lower” is said only where the interval leaves out zero. Intervals are of one comparison "
        "each; what has the fewest evaluations, or seconds, is decided for all settings of a reward at once."
    )

    def __init__(
        self,
        flow: Spec,
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
    ) -> None:
        self.flow, self.prompts, self.column = flow, prompts, column
        self.rewards, self.methods, self.held_out = dict(rewards), dict(methods), dict(held_out or {})
        self.alignment, self.best_of_n = alignment, best_of_n or PromptPool()
        self.images_per_prompt, self.seed, self.guidance, self.negative = images_per_prompt, seed, guidance, negative
        self.batch_size, self.block, self.layout = batch_size, block, layout
        self.evaluations, self.diversity, self.shown = dict(evaluations or {}), diversity, shown
        self.quick_prompts, self._limit, self._skipped = quick_prompts, None, {}
        numbers = {"images_per_prompt": images_per_prompt, "batch_size": batch_size, "block": block, "shown": shown}
        for key, value in {**numbers, "quick_prompts": quick_prompts}.items():
            if value < 1:
                raise ValueError(f"{key} {value} must be at least 1")
        if not self.rewards or any(r.scale <= 0 or r.shares for r in self.rewards.values()):
            raise ValueError("rewards: give at least one, with a scale above 0 and no shares of classes")
        columns = [*self.rewards, *self.held_out, *self.evaluations, *(["alignment"] if alignment else [])]
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise ValueError(
                f"{', '.join(twice)}: rewards, held_out, evaluations and alignment need names of their own"
            )
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
        kept: dict[str, Point] = {}
        for point in self._points:
            if self.methods[point.method].quick:
                kept.setdefault(point.method, point)
            else:
                self._skipped[point.method] = "is left out of --quick, for its time (quick: false)"
        self._points = list(kept.values())

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
            flow: TextToImageFlow = build(TextToImageFlow, self.flow.value, "flow")
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
        return []

    def _specs(self) -> dict[str, Any]:
        """All rewards that are measured, as `mfm_rewards.build` takes them."""
        found = {name: settings.plain for name, settings in self.rewards.items()}
        found |= {name: plain(spec) for name, spec in self.held_out.items()}
        return found | ({"alignment": plain(self.alignment)} if self.alignment else {})

    def prepare(self) -> None:
        self._source.prepare()
        if self._diversity is not None:
            self._diversity.to(self.device)
        else:
            self._skipped["diversity"] = "needs images_per_prompt of 2 or more"
        for reward in self._measured.values():
            reward.to(self.device)
        self._probes = {name: self._probe(reward) for name, reward in self._measured.items()}
        if len(self._source.prompts) == 1:
            self._skipped["intervals"] = "are over prompts, and there is one alone"

    @torch.no_grad()
    def _probe(self, reward: Reward) -> list[str]:
        """The reward of a few images, rounded: results of a reward whose code has changed since are not taken."""
        images, texts = smooth_images(2).to(self.device), [p.text for p in self._source.prompts[:1]] * 2
        try:
            return [f"{value:.4g}" for value in evaluate(reward, images, texts).tolist()]
        except RewardError as error:
            return [str(error)]

    def cells(self) -> Sequence[Cell]:
        source, K = self._source, self.images_per_prompt
        pool = self._setting(BASE, "", None, {"steps": self.best_of_n.steps, "max_rows": self.best_of_n.max_rows})
        self._blocks = [
            pool.folder.images[b : b + K * self.block] for b in range(0, len(pool.folder.images), K * self.block)
        ]
        self._settings = [pool]
        pools = [self._pool_cells(pool, block) for block in self._blocks]
        pool.made = [cells[0] for cells in pools]
        found = [cell for cells in pools for cell in cells] + self._judging(pool)
        for reward in self.rewards:
            scores = [
                [self._candidate_cell(pool, reward, block, cell) for cell in cells]
                for block, cells in zip(self._blocks, pools, strict=True)
            ]
            found += [cell for cells in scores for cell in cells]
            for number in self.best_of_n.numbers:
                if number > 1:
                    best = self._best_of(number, reward, pool, pools, scores)
                    found += [*best.made, *self._judging(best)]
        for reward, point in itertools.product(self.rewards, self._points):
            wanted = self.methods[point.method].rewards
            if (wanted is None or reward in wanted) and self._suits(point, reward):
                setting = self._aligned(point, reward, source)
                found += [*setting.made, *self._judging(setting)]
        return found

    def _suits(self, point: Point, reward: str) -> bool:
        method = self._methods[point]
        try:
            method.check(self._measured[reward], self._source.flow)
        except RewardError as error:
            self._skipped[f"{point.method}, {reward}"] = str(error)
            return False
        except CheckpointError as error:  # whatever the reward is
            self._skipped[point.method] = str(error)
            return False
        if isinstance(method, BestOfN):
            self._skipped[point.method] = "is there already: see best_of_n, whose candidates all rewards share"
            return False
        return True

    def _setting(self, method: str, label: str, aim: str | None, depends: dict[str, Any]) -> Setting:
        name, depends = f"{method} ({label})" if label else method, {"method": method, **depends}
        if aim is not None:
            name = f"{name}, {aim}"
            depends["reward"] = [self.rewards[aim].plain, self.rewards[aim].scale, self._probes[aim]]
        folder = self._source.folder(self.output / "images", name, depends)
        identity = {**self._source.identity, **depends, "folder": folder.path.name}
        return Setting(method, label, aim, name, folder, identity)

    def _cell(self, setting: Setting, what: str, block: Sequence[PromptImage], compute: Any, **more: Any) -> Cell:
        """A cell of one block; more: `needs`, and what else the outcome depends on."""
        needs = more.pop("needs", ())
        first, last = block[0].prompt_index + 1, block[-1].prompt_index + 1
        noise = [[image.prompt.text, *image.noise_key(self.seed)] for image in block]
        identity = {**setting.identity, "images": noise, **more}
        return Cell(f"{setting.name}: {what}, prompts {first} to {last}", identity, compute, needs)

    def _pool_cells(self, pool: Setting, block: Sequence[PromptImage]) -> list[Cell]:
        def generate(begin: int, n: int) -> Outcome:
            pool.folder.claim(pool.identity)
            return self.best_of_n.generate(self._source, pool.folder, block, begin, n)

        return [
            self._cell(
                pool, f"candidates {begin + 1} to {begin + n}", block, lambda b=begin, n=n: generate(b, n),
                begin=begin, n=n,
            )
            for begin, n in self.best_of_n.parts(self.best_of_n.numbers[-1])
        ]  # fmt: skip

    def _candidate_cell(self, pool: Setting, reward: str, block: Sequence[PromptImage], made: Cell) -> Cell:
        begin, n = made.identity["begin"], made.identity["n"]

        def compute(_: Outcome) -> Outcome:
            files = [candidate_file(pool.folder, image, k) for image in block for k in range(begin, begin + n)]
            texts = [image.prompt.text for image in block for _ in range(n)]
            values, seconds = score_files(self._measured[reward], files, texts, self.device)
            return Outcome({}, {"score": values.reshape(-1, n), "seconds": seconds.reshape(-1, n)})

        what = f"{reward} of candidates {begin + 1} to {begin + n}"
        return self._cell(pool, what, block, compute, needs=(made,), begin=begin, n=n, **self._reward_identity(reward))

    def _best_of(
        self, number: int, reward: str, pool: Setting, pools: list[list[Cell]], scores: list[list[Cell]]
    ) -> Setting:
        setting = self._setting(BEST, f"N {number}", reward, {**pool.identity, "number": number})
        take = next(k for k, c in enumerate(pools[0], 1) if c.identity["begin"] + c.identity["n"] == number)
        for block, made, scored in zip(self._blocks, pools, scores, strict=True):

            def compute(*found: Outcome, block: Sequence[PromptImage] = block) -> Outcome:
                setting.folder.claim(setting.identity)
                return self.best_of_n.choose(
                    self._source, number, pool.folder, setting.folder, block, found[:take], found[take:]
                )

            setting.made.append(self._cell(setting, "choice", block, compute, needs=(*made[:take], *scored[:take])))
        self._settings.append(setting)
        return setting

    def _aligned(self, point: Point, reward: str, source: PromptFlow) -> Setting:
        setting = self._setting(point.method, point.label, reward, {"settings": point.settings})
        method, scale = self._methods[point], self.rewards[reward].scale
        for block in self._blocks:

            def compute(block: Sequence[PromptImage] = block) -> Outcome:
                setting.folder.claim(setting.identity)
                return make(source, method, self._measured[reward], scale, setting.folder, block)

            setting.made.append(self._cell(setting, "images", block, compute))
        self._settings.append(setting)
        return setting

    def _judging(self, setting: Setting) -> list[Cell]:
        """The cells that judge a setting's images."""
        for block, made in zip(self._blocks, setting.made, strict=True):
            for name, reward in self._measured.items():

                def compute(of: Outcome, block: Sequence[PromptImage] = block, reward: Reward = reward) -> Outcome:
                    return score(reward, setting.folder, block, bool(of.numbers.get("best")), self.device)

                cell = self._cell(setting, name, block, compute, needs=(made,), **self._reward_identity(name))
                setting.scored.setdefault(name, []).append(cell)
            if (diversity := self._diversity) is not None:

                def look(_: Outcome, block: Sequence[PromptImage] = block) -> Outcome:
                    return spread(diversity, setting.folder, block, self.device)

                setting.spread.append(
                    self._cell(setting, "diversity", block, look, needs=(made,), diversity=diversity.kind)
                )
        return [*itertools.chain(*setting.scored.values()), *setting.spread]

    def _reward_identity(self, name: str) -> dict[str, Any]:
        return {"measured": [self._specs()[name], self._probes[name]]}

    # what is made of it

    def report(self, results: Results) -> Sequence[Block]:
        notes = [f"{message}; there is no picture of {name}." for name, message in self._gone(results).items()]
        scores = {id(s): self._evaluated(s, notes) for s in self._settings if results.all(s.made) is not None}
        base = self._settings[0]
        entries: dict[str, list[PromptEntry]] = {}
        for reward in self.rewards:
            for setting in (base, *(s for s in self._settings if s.aim == reward)):
                if (entry := self._entry(setting, reward, results, scores.get(id(setting), {}))) is not None:
                    entries.setdefault(reward, []).append(entry)
        if not entries:
            return [Text("No result", ["Every run failed; the messages are above."])]
        shown = [prompt.text for prompt in self._source.prompts[: self.shown]]
        report = PromptReport(entries, [*self._measured, *self.evaluations], shown)
        return [*report.blocks(), Text("How it was measured", [*self._how(), *notes])]

    def _how(self) -> list[str]:
        number, K = len(self._source.prompts), self.images_per_prompt
        found = [f"{number} prompts with {K} images each, on a {type(self._source.flow).__name__}."]
        if self._diversity is not None:
            found.append(f"Diversity is the mean distance of two images of one prompt: {self._diversity.about}.")
        if self.alignment:
            found.append(f"Alignment to the prompt is measured by {self._specs()['alignment']}.")
        found.append(
            "Rewards are of the 8-bit images in the folders. Seconds are of the method with decoding, and with the scoring of "
            f"what it returns; {self.batch_size} image(s) at once, {self.best_of_n.max_rows} candidate(s) of Best-of-N. "
            f"The base flow has {self.best_of_n.steps} steps on its own times, as each candidate has."
        )
        return found

    def _evaluated(self, setting: Setting, notes: list[str]) -> dict[str, Measured]:
        """What evaluators found for a setting's images; `notes` says where they are, or do not fit."""
        found = {}
        for name, file in self.evaluations.items():
            path = setting.folder.path / file
            if not path.is_file():
                notes.append(f"{name}: no {file} for {setting.name} in {setting.folder.path}: run the evaluator there.")
                continue
            try:
                scores = read_evaluation(path, setting.folder)
            except ValueError as error:
                notes.append(f"{name} is left out for {setting.name}: {error}.")
                log.warning("%s is left out for %s: %s", name, setting.name, error)
                continue
            if left := len(setting.folder.images) - len(scores):
                notes.append(
                    f"{name} is left out for {setting.name}: {left} of {len(setting.folder.images)} images have no row in "
                    f"{path}, and all methods must have the same."
                )
                continue
            values = torch.tensor([scores[image.index] for image in setting.folder.images], dtype=torch.float64)
            found[name] = mean_of_groups(values, self._groups())
        return found

    def _groups(self) -> Tensor:
        """The prompt of each image."""
        return torch.arange(len(self._source.prompts)).repeat_interleave(self.images_per_prompt)

    def _entry(
        self, setting: Setting, reward: str, results: Results, evaluated: Mapping[str, Measured]
    ) -> PromptEntry | None:
        """A setting as one line of a reward's curves; None where something failed."""
        made, scored = results.all(setting.made), results.all(setting.scored[reward])
        if made is None or scored is None:
            return None

        def over_prompts(outcomes: Sequence[Outcome], key: str) -> Measured:
            values = torch.cat([outcome.tensors[key].reshape(-1) for outcome in outcomes])
            return mean_of_groups(values, self._groups())

        costs = {
            key: over_prompts(made, key)
            for key in ("network", "reward", "seconds")
            if all(key in outcome.tensors for outcome in made)
        }
        others: dict[str, Measured] = {}
        for name, cells in setting.scored.items():
            if name != reward and (outcomes := results.all(cells)) is not None:
                others[name] = over_prompts(outcomes, "score")
        best = over_prompts(scored, "best") if all("best" in outcome.tensors for outcome in scored) else None
        spreads = results.all(setting.spread) if setting.spread else None
        diversity = None if spreads is None else mean_of(torch.cat([o.tensors["diversity"] for o in spreads]))
        evaluations = costs["reward"].value if "reward" in costs else 0.0
        return PromptEntry(
            setting.method, setting.label, None, costs["network"].value + evaluations,
            over_prompts(scored, "score"), None, diversity, self._thumbnails(setting),
            network=costs["network"].value, evaluations=evaluations, seconds=costs["seconds"], best=best,
            others={**others, **evaluated}, folder=str(setting.folder.path.relative_to(self.output)),
        )  # fmt: skip

    def _shown(self, setting: Setting) -> list[Path]:
        """The first image of each of the first prompts."""
        step = self.images_per_prompt
        return [setting.folder.path / file for file in setting.folder.files[: self.shown * step : step]]

    def _gone(self, results: Results) -> dict[str, str]:
        """Files of the pictures that somebody has removed since, by setting."""
        made = [setting for setting in self._settings if results.all(setting.made) is not None]
        gone = {s.name: next((f for f in self._shown(s) if not f.is_file()), None) for s in made}
        return {name: f"{file} is gone" for name, file in gone.items() if file is not None}

    def _thumbnails(self, setting: Setting) -> Tensor:
        """`(P, C, h, w)`; empty where a file is gone."""
        files, found = self._shown(setting), []
        for file in files if all(file.is_file() for file in files) else ():
            image = load_image(file)[None]
            factor = min(1.0, THUMBNAIL / max(image.shape[2:]))
            found.append(torch.nn.functional.interpolate(image, scale_factor=factor, mode="area")[0])
        return torch.stack(found) if found else torch.empty(0)
