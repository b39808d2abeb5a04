"""What is made of aligned samples: reward by cost, what it costs in distance to the data, and who reaches Best-of-N."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Table
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.parts.entry import Entry
from mfm_lightning.metrics.measured import Measured, rounded, simultaneous

BASE, BEST = "base flow", "Best-of-N"
FURTHER, CLOSER = "further from the shares than", "closer to the shares than"


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
        return [*self._reaching(), *self._shares(), self._claims(), *self._pictures(), self._table()]

    @property
    def _judged(self) -> bool:
        return any(e.frechet is not None for found in self.entries.values() for e in found)

    def _reaching(self) -> list[Block]:
        """For each method, the least cost at which its reward is above that of Best-of-N with the largest N."""
        items, rows, said, number = [], [], [], "N"
        short: dict[str, list[str]] = {}  # what does not reach it, in which rewards
        for reward, found in self.entries.items():
            best = next((e for e in reversed(found) if e.method == BEST), None)
            if best is None:
                continue
            number = best.label.removeprefix("N ")
            settings = [e for e in found if e.method != BEST]
            contests = contest(settings, best, self.frechet_limit)
            for method, scale in dict.fromkeys((e.method, e.scale) for e in settings):
                line = [c for c in contests if (c.entry.method, c.entry.scale) == (method, scale) and c.above]
                if line:
                    rows.append(self._row(reward, min(line, key=lambda c: c.entry.nfe), best))
                else:
                    short.setdefault(f"{method} (λ = {_lambda(scale)})", []).append(reward)
            cheaper = sorted((c for c in contests if c.above and c.entry.nfe < best.nfe), key=lambda c: c.entry.nfe)
            aim = self._share_headline(reward) if best.shares else self._headline(reward, cheaper, best, number)
            items.append(aim)
            said.append(self._decided(reward, cheaper, number, len(settings)))
        caption = (
            f"For each method the cheapest setting whose mean reward is above that of Best-of-{number} "
            f"({self.candidates}), for all settings of a reward at once. Intervals in the table are of one comparison "
            "each; ratios of evaluations are exact."
        )
        table = Table("reaching_best_of_n", f"Cost of reaching Best-of-{number}", rows, caption)
        blocks = [Headline(items), table, Claims("What decided", said)]
        if short:
            said = [f"{who}: {', '.join(rewards)}." for who, rewards in short.items()]
            blocks.append(Claims(f"Not above Best-of-{number} in any setting", said))
        return blocks

    def _row(self, reward: str, cheapest: Contest, best: Entry) -> dict[str, Any]:
        e = cheapest.entry
        row = {
            "reward": reward, "method": e.method, "λ": _lambda(e.scale), "setting": e.label, "NFE": round(e.nfe),
            "times fewer NFE": best.nfe / e.nfe, "above by": cheapest.gain,
        }  # fmt: skip
        if cheapest.ratio is None:
            return row
        near = {1: "yes", -1: "no", 0: "not decided"}[cheapest.near]
        return {**row, f"Fréchet over {BEST}'s": cheapest.ratio, f"at most {self.frechet_limit:g}": near}

    def _headline(self, reward: str, cheaper: Sequence[Contest], best: Entry, number: str) -> tuple[str, str]:
        """The cheapest setting that is above and near; else whether there may be one."""
        if near := [c for c in cheaper if c.near > 0]:
            e = near[0].entry
            words = f"fewer evaluations than Best-of-{number} for a higher reward, {reward}: {_setting(e)}"
            return f"{rounded(best.nfe / e.nfe)} x", words
        words = f"above Best-of-{number} in {reward} with fewer evaluations{self._limit_words(' and')}"
        if open_ := [c for c in cheaper if c.near == 0]:
            e = open_[0].entry
            return "not decided", f"whether {_setting(e)}, {rounded(best.nfe / e.nfe)} times fewer, is {words}"
        return "none", f"is {words}"

    def _decided(self, reward: str, cheaper: Sequence[Contest], number: str, num: int) -> str:
        """The sentence on what decided a headline."""
        if not cheaper:
            return f"{reward}: none of {num} settings has a reward above Best-of-{number}'s at fewer evaluations."
        winner = next((c for c in cheaper if c.near > 0), None)
        others = cheaper[: cheaper.index(winner)] if winner else cheaper
        parts = [f"{_setting(winner.entry)} is {self._reasons(winner)}"] if winner else []
        for sign, words in ((0, "not decided"), (-1, f"further than {self.frechet_limit:g} times")):
            if some := [f"{_setting(c.entry)} ({self._ratio(c)})" for c in others if c.near == sign]:
                parts.append(f"{words}{', with fewer evaluations' if winner else ''}: {'; '.join(some)}")
        return f"{reward}: {'. '.join(parts)}."

    def _reasons(self, c: Contest) -> str:
        above = f"above by {rounded(c.gain.value)} (at least {rounded(c.least)} for all settings at once)"
        return above if c.ratio is None else f"{above}, at {self._ratio(c)}, at most {self.frechet_limit:g}"

    def _ratio(self, c: Contest) -> str:
        return "" if c.ratio is None else f"{c.ratio.text()} times its Fréchet distance"

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

    def _share_headline(self, reward: str) -> tuple[str, str]:
        last = _most_evaluations(self.entries[reward], self.scales[0])
        mine = last.pop(self.ours, None)
        if mine is None or mine.shares is None:
            return "n/a", f"{self.ours} has no result in {reward}"
        said = verdict(mine.shares, _shares_of(last), FURTHER, CLOSER)
        return rounded(mine.shares.value), f"from the class shares asked for, {reward}: {_setting(mine)}; {said}"

    def _shares(self) -> list[Block]:
        """Which methods find all modes of a mixture, in the shares that the reward asks for."""
        lines = []
        for reward, found in self.entries.items():
            last = _most_evaluations(found, self.scales[0])
            for name, e in last.items():
                others = _shares_of({other: value for other, value in last.items() if other != name})
                if e.shares and others:
                    said = verdict(e.shares, others, FURTHER, CLOSER)
                    lines.append(f"{reward}: {_setting(e)}, L2 {e.shares.text()}: {said}.")
        if not lines:
            return []
        lines.append(
            "A higher mean reward is no sign that all modes were found: it says nothing of their shares. Each method "
            "is in its setting of most evaluations."
        )
        return [Claims("Class shares against those that a mixture asks for", lines)]

    def _pictures(self) -> list[Picture]:
        found = [
            Picture(
                "reward_nfe", "Reward against evaluations", plots.curves(self.entries, self.scales),
                "Mean reward of single samples by network and reward evaluations a sample; 95 % intervals shaded. A "
                "line joins the settings of a method. Trainings of policies and value networks are not counted.",
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
                    "NFE": round(e.nfe), "mean reward": e.reward, "best look-ahead": e.best, "Fréchet": e.frechet,
                    "diversity": e.diversity, "L2 to the shares": e.shares,
                    "trained first": "yes" if e.trained else "",
                }  # fmt: skip
                rows.append({key: value for key, value in row.items() if value is not None})
        caption = (
            "Mean reward of the images without multipliers; of the best look-ahead, the mean reward of the best clean "
            "state that was scored on the way to each sample, at no further evaluations; diversity is the mean "
            f"distance between the states of two samples. {self.samples}"
        )
        return Table("results", "All results", rows, caption, folded=True)


@dataclass
class Contest:
    """A setting against Best-of-N, in reward and in distance to the data.

    Attributes:
        gain: by how much its mean reward is higher; `least`: its lower bound, for all settings at once.
        above: whether that is above 0.
        ratio: of the Fréchet distances; None where there are none.
        near: 1 where the ratio is at most the limit, -1 where it is above, 0 where that is not decided.
    """

    entry: Entry
    gain: Measured
    least: float
    ratio: Measured | None
    near: int

    @property
    def above(self) -> bool:
        return self.least > 0


def contest(entries: Sequence[Entry], best: Entry, limit: float) -> list[Contest]:
    """All settings against Best-of-N at once: with 95 % probability no bound of the family is wrong.

    Bounds are one-sided, by the largest studentised difference over settings (max-t), of rewards and of the logarithms
    of Fréchet ratios together.
    """
    gains = [e.reward - best.reward for e in entries]
    ratios = [e.frechet.over(best.frechet) if e.frechet and best.frechet else None for e in entries]
    rooms = [None if ratio is None else ratio.unscaled() * -1.0 for ratio in ratios]
    c, found = simultaneous([*gains, *(room for room in rooms if room is not None)]), []
    for e, gain, ratio, room in zip(entries, gains, ratios, rooms, strict=True):
        near = 1
        if room is not None:
            left, width = room.value + math.log(limit), c * room.error
            near = int(left > width) - int(left < -width)
        found.append(Contest(e, gain, gain.value - c * gain.error, ratio, near))
    return found


def _shares_of(entries: Mapping[str, Entry]) -> dict[str, Measured]:
    return {f"{name} ({rounded(e.shares.value)})": e.shares for name, e in entries.items() if e.shares}


def _setting(e: Entry) -> str:
    return ", ".join(part for part in (e.method, f"λ = {_lambda(e.scale)}", e.label) if part)


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
