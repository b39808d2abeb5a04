"""The work of a comparison on prompts, in cells: one for each setting, block of prompts, and what is measured of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_benchmarks.methods import Point
from mfm_benchmarks.parts.prompt_images import PromptFlow, make
from mfm_benchmarks.parts.prompt_pool import PromptPool, candidate_file
from mfm_benchmarks.parts.prompt_scores import score, score_files, spread
from mfm_benchmarks.parts.reward_report import BASE, BEST
from mfm_benchmarks.suite import Cell, Outcome
from mfm_lightning.alignment import AlignmentMethod
from mfm_lightning.metrics.diversity import Diversity
from mfm_lightning.sampling.prompt_folder import PromptFolder, PromptImage
from mfm_rewards import Reward


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


class PromptCells:
    """Settings and their cells: images are made in one, and judged in others, so that one more reward makes none again.

    Args:
        source: what all methods run on.
        measured: all rewards, by name.
        identities: what they depend on, by name, as JSON.
        scales: of those that are optimised, by name.
        pool: the candidates of Best-of-N.
        diversity: of a prompt's images; None for none.
        block: prompts of a cell.
        output: the suite's folder; images are in `images/`.

    Attributes:
        settings: those whose cells have been made.
    """

    def __init__(
        self,
        source: PromptFlow,
        measured: Mapping[str, Reward],
        identities: Mapping[str, Any],
        scales: Mapping[str, float],
        pool: PromptPool,
        diversity: Diversity | None,
        block: int,
        output: Path,
    ) -> None:
        self.source, self.measured, self.identities, self.scales = source, measured, identities, scales
        self.pool, self.diversity, self.output = pool, diversity, output
        self.settings: list[Setting] = []
        images, size = source.images, source.images_per_prompt * block
        self.blocks = [images[begin : begin + size] for begin in range(0, len(images), size)]

    def baselines(self) -> list[Cell]:
        """The base flow, and Best-of-N of each reward, of one pool."""
        base = self._setting(BASE, "", None, self._of_pool)
        pools = [self._pool_cells(base, block) for block in self.blocks]
        base.made = [cells[0] for cells in pools]
        found = [cell for cells in pools for cell in cells] + self._judging(base)
        for reward in self.scales:
            scores = [
                [self._candidate_cell(base, reward, block, cell) for cell in cells]
                for block, cells in zip(self.blocks, pools, strict=True)
            ]
            found += [cell for cells in scores for cell in cells]
            for number in self.pool.numbers[1:]:
                best = self._best_of(number, reward, base, pools, scores)
                found += [*best.made, *self._judging(best)]
        return found

    def aligned(self, point: Point, method: AlignmentMethod, reward: str) -> list[Cell]:
        """A method in one of its settings, for one reward."""
        depends = {"settings": point.settings}
        if self.source.model_for(method, self.measured[reward]) is not self.source.flow:
            depends["mfm"] = self.source.mfm
        setting = self._setting(point.method, point.label, reward, depends)
        for block in self.blocks:

            def compute(block: Sequence[PromptImage] = block) -> Outcome:
                setting.folder.claim(setting.identity)
                return make(self.source, method, self.measured[reward], self.scales[reward], setting.folder, block)

            setting.made.append(self._cell(setting, "images", block, compute))
        return [*setting.made, *self._judging(setting)]

    @property
    def _of_pool(self) -> dict[str, Any]:
        return {"steps": self.pool.steps, "rows": self.pool.max_rows}

    def _setting(self, method: str, label: str, aim: str | None, depends: dict[str, Any]) -> Setting:
        name, depends = f"{method} ({label})" if label else method, {"method": method, **depends}
        if aim is not None:
            name = f"{name}, {aim}"
            depends["reward"] = [*self.identities[aim], self.scales[aim]]
        folder = self.source.folder(self.output / "images", name, depends)
        identity = {**self.source.identity, **depends, "folder": folder.path.name}
        self.settings.append(setting := Setting(method, label, aim, name, folder, identity))
        return setting

    def _cell(self, setting: Setting, what: str, block: Sequence[PromptImage], compute: Any, **more: Any) -> Cell:
        """A cell of one block; more: `needs`, and what else the outcome depends on."""
        needs = more.pop("needs", ())
        first, last = block[0].prompt_index + 1, block[-1].prompt_index + 1
        noise = [[image.prompt.text, *image.noise_key(self.source.seed)] for image in block]
        identity = {**setting.identity, "images": noise, **more}
        return Cell(f"{setting.name}: {what}, prompts {first} to {last}", identity, compute, needs)

    def _pool_cells(self, pool: Setting, block: Sequence[PromptImage]) -> list[Cell]:
        def generate(begin: int, n: int) -> Outcome:
            pool.folder.claim(pool.identity)
            return self.pool.generate(self.source, pool.folder, block, begin, n)

        return [
            self._cell(
                pool, f"candidates {begin + 1} to {begin + n}", block, lambda b=begin, n=n: generate(b, n),
                begin=begin, n=n,
            )
            for begin, n in self.pool.parts(self.pool.numbers[-1])
        ]  # fmt: skip

    def _candidate_cell(self, pool: Setting, reward: str, block: Sequence[PromptImage], made: Cell) -> Cell:
        begin, n = made.identity["begin"], made.identity["n"]

        def compute(_: Outcome) -> Outcome:
            files = [candidate_file(pool.folder, image, k) for image in block for k in range(begin, begin + n)]
            texts = [image.prompt.text for image in block for _ in range(n)]
            values, seconds = score_files(self.measured[reward], files, texts, self.source.device)
            return Outcome({}, {"score": values.reshape(-1, n), "seconds": seconds.reshape(-1, n)})

        what = f"{reward} of candidates {begin + 1} to {begin + n}"
        return self._cell(pool, what, block, compute, needs=(made,), begin=begin, n=n, measured=self.identities[reward])

    def _best_of(
        self, number: int, reward: str, pool: Setting, pools: list[list[Cell]], scores: list[list[Cell]]
    ) -> Setting:
        setting = self._setting(BEST, f"N {number}", reward, {**self._of_pool, "number": number})
        take = next(k for k, c in enumerate(pools[0], 1) if c.identity["begin"] + c.identity["n"] == number)
        for block, made, scored in zip(self.blocks, pools, scores, strict=True):

            def compute(*found: Outcome, block: Sequence[PromptImage] = block) -> Outcome:
                setting.folder.claim(setting.identity)
                return self.pool.choose(
                    self.source, number, pool.folder, setting.folder, block, found[:take], found[take:]
                )

            setting.made.append(self._cell(setting, "choice", block, compute, needs=(*made[:take], *scored[:take])))
        return setting

    def _judging(self, setting: Setting) -> list[Cell]:
        """The cells that judge a setting's images."""
        for block, made in zip(self.blocks, setting.made, strict=True):
            for name, reward in self.measured.items():

                def compute(of: Outcome, block: Sequence[PromptImage] = block, reward: Reward = reward) -> Outcome:
                    return score(reward, setting.folder, block, bool(of.numbers.get("best")), self.source.device)

                what = f"{name} of the images"
                cell = self._cell(setting, what, block, compute, needs=(made,), measured=self.identities[name])
                setting.scored.setdefault(name, []).append(cell)
            if (diversity := self.diversity) is not None:

                def look(_: Outcome, block: Sequence[PromptImage] = block, by: Diversity = diversity) -> Outcome:
                    return spread(by, setting.folder, block, self.source.device)

                setting.spread.append(
                    self._cell(setting, "diversity", block, look, needs=(made,), diversity=diversity.kind)
                )
        return [*itertools.chain(*setting.scored.values()), *setting.spread]
