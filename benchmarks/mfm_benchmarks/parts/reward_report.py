"""The report of aligned samples: reward by cost, distance to the data, and which methods exceed Best-of-N."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import family
from mfm_benchmarks.claims import TIMES, listed, verdict
from mfm_benchmarks.parts.entry import Entry
from mfm_lightning.metrics.measured import Measured, rounded, simultaneous

BASE, BEST = "base flow", "Best-of-N"
FURTHER, CLOSER = "further from the requested shares than", "closer to the requested shares than"


@dataclass
class RewardReport:
    """Args:
    entries: by reward.
    scales: lambda, a panel of the figures for each.
    ours: the method that claims are about.
    samples: what the table says about their number.
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
        return [*self._reaching(), *self._pictures(), *self._shares(), *self._claims(), self._table()]

    @property
    def _judged(self) -> bool:
        return any(e.frechet is not None for found in self.entries.values() for e in found)

    def _reaching(self) -> list[Block]:
        """For each method, the least cost at which its reward is above that of Best-of-N with the largest N."""
        items, rows, said, only, number, every = [], [], [], list[str](), "N", dict[str, list[Contest]]()
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
                    fewest = min(line, key=lambda c: c.entry.nfe)
                    rows.append(self._row(reward, fewest, best))
                    only.append(_cells_of(fewest.entry, reward))
                else:
                    short.setdefault(f"{method} (λ = {_lambda(scale)})", []).append(reward)
            every[reward] = sorted(contests, key=lambda c: c.entry.nfe)
            cheaper = [c for c in every[reward] if c.above and c.fewer > 1]
            aim = self._share_headline(reward) if best.shares else self._headline(reward, cheaper, number)
            items.append(aim)
            said.append(self._decided(reward, cheaper, number, len(settings)))
        caption = (
            "For each method, the setting with the fewest evaluations whose mean reward is higher than that of "
            f"Best-of-{number} ({self.candidates}); tested for all settings of a reward together. Intervals in the "
            "table are of one comparison each; ratios of evaluations are exact. Seconds are with the judging of the "
            "samples, on the machine and beside the work of that time; those of several processes are added."
        )
        table = Table(
            "reaching_best_of_n", f"Cost of exceeding Best-of-{number}", rows, caption, keys=["reward", "method", "λ"],
            only=only,
        )  # fmt: skip
        blocks = [Headline(items), table, Claims("How each result was decided", said)]
        if items:
            blocks.insert(0, self._summary(every, number))
        if short:
            said = [f"{who}: {', '.join(rewards)}." for who, rewards in short.items()]
            blocks.append(Claims(f"No setting exceeds Best-of-{number}", said))
        return blocks

    def _summary(self, found: Mapping[str, list[Contest]], number: str) -> Summary:
        """For each reward, the setting with the fewest evaluations within the limit, and what needs fewer without being
        shown to keep to it; what the distance is; what was compared."""
        within = self._limit_words(",") + ("," if self._judged else "")
        goal = f"a higher mean reward than Best-of-{number}{within}"
        won = {reward: c for reward, contests in found.items() if (c := _winner(contests)) is not None}
        none = [reward for reward in found if reward not in won]
        said = []
        if won:
            reached = [f"{c.entry.method} with {self._fewer(c)} fewer evaluations ({r})" for r, c in won.items()]
            said.append(f"{goal[0].upper()}{goal[1:]} is reached by {listed(reached)}.")
        if none:
            which, what = (
                f"For {listed(none)}, no" if won or len(found) > 1 else "No",
                "do so" if won else f"reach {goal}",
            )
            said.append(f"{which} setting is shown to {what} with fewer evaluations.")
        for reward, contests in found.items():
            said += self._not_ours(reward, contests)
            said += self._open(reward, contests, len(found) > 1)
        kept = [f"{c.ratio.text(2)} for {reward}" for reward, c in won.items() if c.ratio is not None]
        costs = f"The Fréchet distance to real images, relative to Best-of-{number}, is {listed(kept)}." if kept else ""
        methods = dict.fromkeys(e.method for entries in self.entries.values() for e in entries)
        third = f"{len(methods)} methods were compared on the same model and the same noise, with {self.samples}"
        return Summary([text for text in (" ".join(said), costs, third) if text])

    def _fewer(self, c: Contest) -> str:
        return f"{rounded(c.fewer)} times"

    def _not_ours(self, reward: str, contests: Sequence[Contest]) -> list[str]:
        """Where another method wins: a sentence that says so, and where ours is."""
        winner, strong = _winner(contests), family(self.ours, list(dict.fromkeys(c.entry.method for c in contests)))
        if winner is None or not strong or winner.entry.method in strong:
            return []
        names = listed(strong, "or")
        mine = next((c for c in contests if c.entry.method in strong and c.above and c.near > 0), None)
        if mine is None:
            ends = f"no setting of {names} is shown to reach this"
        else:
            ends = f"{mine.entry.method} needs {rounded(mine.entry.nfe / winner.entry.nfe)} times as many"
        return [f"For {reward}, another method, {winner.entry.method}, needs the fewest evaluations: {ends}."]

    def _open(self, reward: str, contests: Sequence[Contest], several: bool) -> list[str]:
        """Other methods' settings with a higher reward and even fewer evaluations, which are not shown to keep to the
        limit: the one with the fewest evaluations of each."""
        winner, said = _winner(contests), []
        for method, c in _not_within(contests).items():
            gain = f"a gain of {rounded(c.gain.value)}"
            if winner:
                gain += f", {winner.entry.method} {rounded(winner.gain.value)}"
            exceeds = f"{method} has a higher mean reward with {self._fewer(c)} fewer evaluations ({gain})"
            ratio = "" if c.ratio is None else f"{c.ratio.text(2)} times"
            ends = "but whether its Fréchet distance is within the limit is not decided"
            ends = ends if c.near == 0 else "but its Fréchet distance is above the limit"
            said.append(f"{f'For {reward}, ' if several else ''}{exceeds}, {ends}: {ratio}.")
        return said

    def _row(self, reward: str, cheapest: Contest, best: Entry) -> dict[str, Any]:
        e = cheapest.entry
        row = {
            "reward": reward, "method": e.method, "λ": _lambda(e.scale), "setting": e.label, "NFE": round(e.nfe),
            "times fewer NFE": cheapest.fewer, "gain in reward": cheapest.gain,
        }  # fmt: skip
        if cheapest.ratio is not None:
            near = {1: "yes", -1: "no", 0: "not decided"}[cheapest.near]
            row |= {"Fréchet ratio": cheapest.ratio, f"ratio at most {self.frechet_limit:g}": near}
        if e.wall_time and best.wall_time:
            row |= {"seconds a sample": e.wall_time, "times fewer seconds": best.wall_time / e.wall_time}
        return row

    def _headline(self, reward: str, cheaper: Sequence[Contest], number: str) -> tuple[str, str]:
        """The setting with the fewest evaluations that is above and near; else whether there may be one."""
        if winner := _winner(cheaper):
            words = f"fewer evaluations than Best-of-{number} for a higher reward ({reward}){self._limit_words('')}"
            others = [f"{c.entry.method}, {self._fewer(c)} fewer" for c in _not_within(cheaper).values() if not c.near]
            open_ = f"; not decided for {listed(others)}" if others else ""
            return f"{rounded(winner.fewer)} {TIMES}", f"{words}: {_setting(winner.entry)}{open_}"
        words = f"higher {reward} than Best-of-{number} with fewer evaluations{self._limit_words(' and')}"
        if undecided := next((c for c in cheaper if c.near == 0), None):
            setting, fewer = _setting(undecided.entry), self._fewer(undecided)
            return "not decided", f"whether {setting}, with {fewer} fewer, reaches a {words}"
        return "none", f"of the settings is shown to reach a {words}"

    def _decided(self, reward: str, cheaper: Sequence[Contest], number: str, num: int) -> str:
        """The sentence on what decided a headline."""
        if not cheaper:
            return f"{reward}: none of {num} settings has a higher reward than Best-of-{number} with fewer evaluations."
        winner = _winner(cheaper)
        others = cheaper[: cheaper.index(winner)] if winner else cheaper
        parts = [f"{_setting(winner.entry)} has {self._reasons(winner)}"] if winner else []
        before = "Even fewer evaluations" if winner else "Higher reward with fewer evaluations"
        limit = f"the limit of {self.frechet_limit:g} times the Fréchet distance"
        for sign, words in ((0, f"it is not decided whether {limit} holds"), (-1, f"above {limit}")):
            if some := [f"{_setting(c.entry)} ({self._ratio(c)})" for c in others if c.near == sign]:
                parts.append(f"{before}, but {words}: {'; '.join(some)}")
        return f"{reward}: {'. '.join(parts)}."

    def _reasons(self, c: Contest) -> str:
        above = (
            f"a mean reward higher by {rounded(c.gain.value)} (at least {rounded(c.least)} for all settings together)"
        )
        return above if c.ratio is None else f"{above} and {self._ratio(c)} (limit {self.frechet_limit:g})"

    def _ratio(self, c: Contest) -> str:
        return "" if c.ratio is None else f"{c.ratio.text()} times the Fréchet distance of {BEST}"

    def _limit_words(self, before: str) -> str:
        return f"{before} at no more than {self.frechet_limit:g} times its Fréchet distance" if self._judged else ""

    def _claims(self) -> list[Claims]:
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
        title = f"{self.ours} against each other method, each in its setting with the most evaluations"
        return [Claims(title, lines)] if lines else []

    def _share_headline(self, reward: str) -> tuple[str, str]:
        last = _most_evaluations(self.entries[reward], self.scales[0])
        mine = last.pop(self.ours, None)
        if mine is None or mine.shares is None:
            return "n/a", f"{self.ours} has no result for {reward}"
        said = verdict(mine.shares, _shares_of(last), FURTHER, CLOSER)
        return rounded(
            mine.shares.value
        ), f"distance (L2) to the requested class shares, {reward}: {_setting(mine)}; {said}"

    def _shares(self) -> list[Block]:
        """Which methods find all modes of a mixture, in the shares that the reward asks for: words, and a table."""
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
            "The mean reward does not show whether all modes were found; the class shares do. Each method is in its "
            "setting with the most evaluations."
        )
        return [Claims("Class shares of samples against the requested ones", lines)]

    def _pictures(self) -> list[Picture]:
        found = [
            Picture(
                "reward_nfe", "Reward against evaluations", plots.curves(self.entries, self.scales, self.ours, BEST),
                "Mean reward of single samples, by evaluations of networks and reward per sample (NFE). 95 % intervals "
                "are shaded. A line joins the settings of a method. The training of policies and value networks is not "
                "counted. Higher and further left is better.",
            ),
        ]  # fmt: skip
        if self._judged:
            title = "Reward against distance to the data"
            caption = (
                "Fréchet distance to real images, by mean reward. Lower and further right is better: a high distance "
                "means that the reward was gained by leaving the data distribution."
            )
            chart = plots.hacking(self.entries, self.scales, self.ours, BEST)
            found.append(Picture("reward_frechet", title, chart, caption))
        for reward, entries in self.entries.items():
            if entries[0].images.dim() == 4:
                caption = (
                    f"Each column starts from the same noise; λ = {self.scales[0]:g}. Each row has the name of the "
                    "method, in its setting with the most evaluations, and its mean reward."
                )
                rows = self._gallery(entries)
                plot = plots.gallery(rows, ours=family(self.ours, [name.partition("\n")[0] for name, _ in rows]))
                found.append(Picture(f"samples_{_slug(reward)}", f"Samples: {reward}", plot, caption))
        return found

    def _gallery(self, found: Sequence[Entry]) -> list[tuple[str, Tensor]]:
        rows = [(f"{BASE}\n{e.reward.value:.3g}", e.images) for e in found if (e.method, e.label) == (BEST, "N 1")]
        for entry in _most_evaluations(found, self.scales[0]).values():
            name = entry.label.replace("N ", "Best-of-") if entry.method == BEST else entry.method
            rows.append((f"{name}\n{entry.reward.value:.3g}", entry.images))
        return rows

    def _table(self) -> Table:
        rows, only = [], []
        for reward, found in self.entries.items():
            for e in found:
                only.append(_cells_of(e, reward))
                row = {
                    "reward": reward, "λ": _lambda(e.scale), "method": e.method, "setting": e.label,
                    "NFE": round(e.nfe), "mean reward": e.reward, "best look-ahead": e.best, "Fréchet": e.frechet,
                    "diversity": e.diversity, "L2 to the shares": e.shares,
                    "needs training": "yes" if e.trained else None,
                }  # fmt: skip
                rows.append({key: value for key, value in row.items() if value is not None})
        caption = (
            "Mean reward: of the images, without λ. Best look-ahead: mean reward of the best clean state that the "
            "method scored on the way to each sample; it needs no further evaluations. Diversity: mean distance "
            f"between two samples. {self.samples}"
        )
        keys = ["reward", "λ", "method", "setting"]
        return Table("results", "All results", rows, caption, folded=True, keys=keys, only=only)


@dataclass
class Contest:
    """A setting against Best-of-N, in reward and in distance to the data.

    Attributes:
        gain: by how much its mean reward is higher; `least`: its lower bound, for all settings at once.
        above: whether that is above 0.
        ratio: of the Fréchet distances; None where there are none.
        near: 1 where the ratio is at most the limit, -1 where it is above, 0 where that is not decided.
        fewer: how many times fewer evaluations it needs than Best-of-N.
    """

    entry: Entry
    gain: Measured
    least: float
    ratio: Measured | None
    near: int
    fewer: float

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
        found.append(Contest(e, gain, gain.value - c * gain.error, ratio, near, best.nfe / e.nfe))
    return found


def _cells_of(e: Entry, reward: str) -> str:
    """The beginning of the names of the results that an entry is of."""
    if e.method == BEST:
        return f"{BEST}, {reward}"
    return f"{e.name}, {reward}" + ("" if e.scale is None else f", λ = {e.scale:g}")


def _winner(contests: Sequence[Contest]) -> Contest | None:
    """Of contests by rising evaluations, the first that is above and near, with fewer evaluations than Best-of-N."""
    return next((c for c in contests if c.above and c.near > 0 and c.fewer > 1), None)


def _not_within(contests: Sequence[Contest]) -> dict[str, Contest]:
    """Of contests by rising evaluations, the first of each other method that is above with fewer evaluations than the
    winner (or Best-of-N), and not shown to be near."""
    winner, found = _winner(contests), dict[str, Contest]()
    for c in contests:
        fewer = c.fewer > (winner.fewer if winner else 1.0)
        if c.above and c.near <= 0 and fewer and not (winner and c.entry.method == winner.entry.method):
            found.setdefault(c.entry.method, c)
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
