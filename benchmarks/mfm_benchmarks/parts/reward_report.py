"""What is made of aligned samples: reward by cost, what it costs in distance to the data, and who reaches Best-of-N."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Table
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.parts.entry import Entry
from mfm_lightning.metrics.measured import rounded

BASE, BEST = "base flow", "Best-of-N"


@dataclass
class RewardReport:
    """Args:
    entries: by reward.
    scales: lambda, one a column of the figures.
    ours: the method that claims are about.
    samples: what the table says of their number.
    candidates: how those of Best-of-N are made.
    frechet_limit: the headline takes settings whose Fréchet distance is at most so many times Best-of-N's.
    """

    entries: Mapping[str, Sequence[Entry]]
    scales: Sequence[float]
    ours: str
    samples: str
    candidates: str
    frechet_limit: float = 1.5

    def blocks(self) -> list[Block]:
        return [*self._reaching(), self._claims(), *self._pictures(), self._table()]

    @property
    def _judged(self) -> bool:
        return any(e.frechet is not None for found in self.entries.values() for e in found)

    def _reaching(self) -> list[Block]:
        """For each method, the least cost at which its reward is above that of Best-of-N with the largest N."""
        items, rows, number = [], [], "N"
        short: dict[str, list[str]] = {}  # what does not reach it, in which rewards
        for reward, found in self.entries.items():
            best = next((e for e in reversed(found) if e.method == BEST), None)
            if best is None:
                continue
            number, near = best.label.removeprefix("N "), []
            limit = math.inf if best.frechet is None else self.frechet_limit * best.frechet.value
            for method, scale in dict.fromkeys((e.method, e.scale) for e in found if e.method != BEST):
                line = [e for e in found if (e.method, e.scale) == (method, scale)]
                above = sorted((e for e in line if (e.reward - best.reward).sign > 0), key=lambda e: e.nfe)
                row = {"reward": reward, "method": method, "λ": _lambda(scale)}
                if not above:
                    short.setdefault(f"{method} (λ = {_lambda(scale)})", []).append(reward)
                    continue
                cheapest = above[0]
                leave = None
                if cheapest.frechet is not None and best.frechet is not None:
                    leave = cheapest.frechet.value / best.frechet.value
                row |= {
                    "setting": cheapest.label, "NFE": round(cheapest.nfe), "times fewer NFE": best.nfe / cheapest.nfe,
                    "times fewer seconds": best.seconds / cheapest.seconds, "above by": cheapest.reward - best.reward,
                }  # fmt: skip
                rows.append(row if leave is None else {**row, f"Fréchet over {BEST}'s": leave})
                for e in above:
                    near_data = e.frechet is None or e.frechet.value <= limit
                    if near_data and e.nfe < best.nfe:
                        near.append((best.nfe / e.nfe, f"{method}, λ = {_lambda(scale)}, {e.label}"))
            if near:
                ratio, winner = max(near)
                words = f"fewer evaluations than Best-of-{number} for a higher reward, {reward}: {winner}"
                items.append((f"{rounded(ratio)} x", words))
            else:
                items.append(
                    ("none", f"is above Best-of-{number} in {reward} with fewer evaluations{self._limit_words(' and')}")
                )
        caption = (
            f"For each method the cheapest setting whose mean reward is above that of Best-of-{number} "
            f"({self.candidates}): the interval of the paired difference is above zero. At the top are the largest "
            f"ratios{self._limit_words()}. Ratios are of point estimates, seconds of one run."
        )
        table = Table("reaching_best_of_n", f"Cost of reaching Best-of-{number}", rows, caption)
        if not short:
            return [Headline(items), table]
        said = [f"{who}: {', '.join(rewards)}." for who, rewards in short.items()]
        return [Headline(items), table, Claims(f"Not above Best-of-{number} in any setting", said)]

    def _limit_words(self, before: str = " with") -> str:
        return f"{before} at most {self.frechet_limit:g} times its Fréchet distance" if self._judged else ""

    def _claims(self) -> Claims:
        """Our method against each of the others, all in their settings of most evaluations."""
        lines = []
        for (reward, found), scale in itertools.product(self.entries.items(), self.scales):
            last = _most_evaluations(found, scale)
            if self.ours not in last or len(last) < 2:
                continue
            mine = last.pop(self.ours)
            others = {f"{e.name}, {round(e.nfe):,} NFE": e.reward for e in last.values()}
            said = verdict(mine.reward, others, gap=lambda difference: f" (by {rounded(abs(difference.value))})")
            lines.append(
                f"{reward}, λ = {scale:g}: the mean reward of {mine.name}, {round(mine.nfe):,} NFE, is {said}."
            )
        return Claims(f"{self.ours} against the others, each in its setting of most evaluations", lines)

    def _pictures(self) -> list[Picture]:
        found = [
            Picture(
                "reward_nfe", "Reward against evaluations", plots.curves(self.entries, self.scales, "nfe"),
                "Mean reward of single samples by network and reward evaluations a sample; 95 % intervals shaded. A "
                "line joins the settings of a method.",
            ),
            Picture(
                "reward_seconds", "Reward against seconds", plots.curves(self.entries, self.scales, "seconds"),
                "The same by wall time a sample, of one run on the machine named below. Training of policies and "
                "value networks is not in it; the table has it.",
            ),
        ]  # fmt: skip
        if self._judged:
            title = "What the reward costs in distance to the data"
            caption = "Fréchet distance to real images by mean reward: up is reward bought by leaving the data."
            found.append(Picture("reward_frechet", title, plots.hacking(self.entries, self.scales), caption))
        for reward, entries in self.entries.items():
            if entries[0].images.dim() == 4:
                caption = (
                    f"The same noise in each column, λ = {self.scales[0]:g}; beside each row the method, in its "
                    "setting of most evaluations, and its mean reward."
                )
                plot = plots.gallery(self._gallery(entries))
                found.append(Picture(f"samples_{_slug(reward)}", f"Samples: {reward}", plot, caption))
        return found

    def _gallery(self, found: Sequence[Entry]) -> list[tuple[str, Tensor]]:
        rows = [(f"{BASE}\n{e.reward.value:.3g}", e.images) for e in found if (e.method, e.label) == (BEST, "N 1")]
        for entry in _most_evaluations(found, self.scales[0]).values():
            name = entry.label.replace("N ", "Best-of-") if entry.method == BEST else entry.method
            rows.append((f"{name}\n{entry.reward.value:.3g}", entry.images))
        return rows

    def _table(self) -> Table:
        rows = []
        for reward, found in self.entries.items():
            for e in found:
                row = {
                    "reward": reward, "λ": _lambda(e.scale), "method": e.method, "setting": e.label,
                    "NFE": round(e.nfe), "seconds a sample": e.seconds, "mean reward": e.reward, "Fréchet": e.frechet,
                    "diversity": e.diversity, "training seconds": e.fit_seconds,
                }  # fmt: skip
                rows.append({key: value for key, value in row.items() if key != "Fréchet" or value is not None})
        caption = (
            "Mean reward of the images without multipliers; diversity is the mean distance between the states of two "
            f"samples. {self.samples}"
        )
        return Table("results", "All results", rows, caption, folded=True)


def _most_evaluations(found: Sequence[Entry], scale: float) -> dict[str, Entry]:
    """Each method's setting of most evaluations."""
    last: dict[str, Entry] = {}
    for e in found:
        if e.scale in (None, scale) and (e.method not in last or e.nfe >= last[e.method].nfe):
            last[e.method] = e
    return last


def _lambda(scale: float | None) -> str:
    return "any" if scale is None else f"{scale:g}"


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text).split())
