"""The report of images of prompts: reward by evaluations and seconds, and what happens to what is not optimised."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Summary, Table
from mfm_benchmarks.charts import family
from mfm_benchmarks.claims import TIMES
from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.prompt_entries import PromptEntry
from mfm_benchmarks.parts.reward_report import BASE, BEST, Contest, contest
from mfm_lightning.metrics.measured import Measured, rounded

# columns of the table besides what is measured
COLUMNS = (
    "reward", "method", "setting", "NFE", "transformer evaluations", "reward evaluations", "seconds", "mean reward",
    "gain over the base flow", "gain over Best-of-N", "gain over Best-of-N of equal NFE", "best look-ahead",
    "diversity", "images",
)  # fmt: skip


@dataclass
class PromptReport:
    """Args:
    entries: by reward, that of the base flow first.
    columns: names of all that is measured, in order.
    prompts: of the entries' images.
    ours: the method that is drawn strongly, with those of its kind.
    """

    entries: Mapping[str, Sequence[PromptEntry]]
    columns: Sequence[str]
    prompts: Sequence[str]
    ours: str = ""

    def blocks(self) -> list[Block]:
        return [*self._reaching(), *self._pictures(), *self._claims(), self._table()]

    def _strong(self) -> list[str]:
        return family(self.ours, list(dict.fromkeys(e.method for found in self.entries.values() for e in found)))

    def _reaching(self) -> list[Block]:
        """For each reward, the setting above Best-of-N of the largest N that costs least, all tested at once."""
        items, rows, won, lost = [], [], [], []
        for reward, found in self.entries.items():
            best = _largest(found)
            settings = [e for e in found if e.method not in (BASE, BEST)]
            if best is None or not settings:
                continue
            above = [c for c in contest(settings, best, 1.0) if c.above]
            number = best.label.removeprefix("N ")
            for what, cost in (("evaluations", _nfe), ("seconds", _seconds)):
                cheaper = sorted((c for c in above if cost(c.entry) < cost(best)), key=lambda c: cost(c.entry))
                if not cheaper:
                    words = f"of the settings is shown to exceed Best-of-{number} in {reward} with fewer {what}"
                    items.append(("none", words))
                    lost.append(f"{reward} by {what}")
                    continue
                e = cheaper[0].entry
                words = f"fewer {what} than Best-of-{number} for a higher reward ({reward}): {e.name}"
                items.append((f"{rounded(cost(best) / cost(e))} {TIMES}", words))
                won.append(f"{e.name} with {rounded(cost(best) / cost(e))} times fewer {what} ({reward})")
            rows += [self._row(reward, c, best) for c in sorted(above, key=lambda c: c.entry.nfe)]
        caption = (
            "Settings whose mean reward is higher than that of Best-of-N with the largest N; tested for all settings "
            "of a reward together. Intervals in the table are of one comparison each."
        )
        table = [Table("reaching_best_of_n", "Settings that exceed Best-of-N", rows, caption)] if rows else []
        first = "A higher mean reward than Best-of-N with the largest N is reached by " + "; ".join(won)
        first = first if won else "No setting is shown to reach a higher mean reward than Best-of-N at a lower cost"
        said = [f"{first}."]
        if lost and won:
            said.append(f"No setting does so for {', '.join(lost)}.")
        methods = dict.fromkeys(e.method for found in self.entries.values() for e in found)
        said.append(f"{len(methods)} methods were compared on the same flow, prompts and noise.")
        return [Summary(said), Headline(items), *table] if items else []

    def _row(self, reward: str, c: Contest, best: PromptEntry) -> dict[str, Any]:
        e = c.entry
        return {
            "reward": reward, "method": e.method, "setting": e.label, "NFE": round(e.nfe),
            "times fewer NFE": best.nfe / e.nfe, "times fewer seconds": _seconds(best) / _seconds(e),
            "gain in reward": c.gain,
        }  # fmt: skip

    def _claims(self) -> list[Claims]:
        """Each method in its setting with the most evaluations: against both baselines, and its effect on the rest."""
        gains, rest = [], []
        for reward, found in self.entries.items():
            base = next((e for e in found if e.method == BASE), None)
            if base is None:  # it failed, and its failure is on the page
                continue
            last = {e.method: e for e in sorted(found, key=_nfe) if e is not base}
            for e in last.values():
                cost = f"{round(e.nfe):,} NFE and {rounded(e.seconds.value)} s an image"
                said = [_against(e.reward - base.reward, "the base flow")]
                if e.method != BEST and (equal := _as_costly(found, e)) is not None:
                    words = f"{equal.label.replace('N ', 'Best-of-')} ({round(equal.nfe):,} NFE)"
                    said.append(_against(e.reward - equal.reward, words))
                if e.best is not None:
                    said.append(f"best look-aheads {_against(e.best - e.reward, 'its final samples')}")
                gains.append(f"{reward}: {e.name}, {cost}: {'; '.join(said)}.")
                if changes := self._changes(e, base):
                    rest.append(f"{reward}: {e.name}: {'; '.join(changes)}.")
        blocks = [Claims("The optimised reward, each method in its setting with the most evaluations", gains)]
        return [*blocks, Claims("Measures that are not optimised, against the base flow", rest)] if rest else blocks

    def _changes(self, e: PromptEntry, base: PromptEntry) -> list[str]:
        found = [f"{name} {_against(e.others[name] - base.others[name])}" for name in self._of_both(e, base)]
        if e.diversity is not None and base.diversity is not None:
            found.append(f"diversity {_against(e.diversity - base.diversity)}")
        return found

    def _of_both(self, e: PromptEntry, base: PromptEntry) -> list[str]:
        return [name for name in self.columns if name in e.others and name in base.others]

    def _pictures(self) -> list[Picture]:
        found = []
        for name, title, label, cost in (
            ("reward_nfe", "Reward against evaluations", "NFE per image", _nfe),
            ("reward_seconds", "Reward against seconds", "seconds per image", _seconds),
        ):
            panels = {
                reward: {m: [(cost(e), e.reward) for e in entries if e.method == m] for m in _methods(entries)}
                for reward, entries in self.entries.items()
            }
            caption = "Mean reward; 95 % intervals over prompts are shaded. A line joins the settings of a method."
            chart = plots.lines(
                panels, label, "mean reward", sharey=False, mark=False, ours=self._strong(), baselines=[BASE, BEST]
            )
            found.append(Picture(name, title, chart, caption))
        for reward, entries in self.entries.items():
            last = {e.method: e for e in sorted(entries, key=_nfe) if len(e.images)}
            if last:
                found.append(self._sheet(reward, last))
        return found

    def _sheet(self, reward: str, last: Mapping[str, PromptEntry]) -> Picture:
        """A row a prompt, a column a method."""
        images = torch.stack([e.images for e in last.values()], dim=1)
        titles, strong = [], []
        for m, e in last.items():
            name = e.label.replace("N ", "Best-of-") if m == BEST else m
            titles.append(f"{textwrap.fill(name, 16)}\n{e.reward.value:.3g}")
            strong += [titles[-1]] if m in self._strong() else []
        rows = list(zip(self.prompts, images, strict=True))
        plot = plots.gallery(rows, len(last), titles, size=1.5, ours=strong)
        caption = (
            "All images of a prompt start from the same noise. Below each image: the method, in its setting with the "
            f"most evaluations, and its mean {reward} over all prompts."
        )
        return Picture(f"images_{re.sub(r'[^A-Za-z0-9]+', '_', reward)}", f"Images: {reward}", plot, caption)

    def _table(self) -> Table:
        rows: list[dict[str, Any]] = []
        for reward, found in self.entries.items():
            base, best = next((e for e in found if e.method == BASE), None), _largest(found)
            for e in found:
                equal = None if e.method in (BASE, BEST) else _as_costly(found, e)
                rows.append({
                    "reward": reward, "method": e.method, "setting": e.label, "NFE": round(e.nfe, 1),
                    "transformer evaluations": e.network, "reward evaluations": e.evaluations, "seconds": e.seconds,
                    "mean reward": e.reward, "gain over the base flow": _gain(e, base),
                    "gain over Best-of-N": _gain(e, best), "gain over Best-of-N of equal NFE": _gain(e, equal),
                    "best look-ahead": e.best,
                    **{name: e.others.get(name) for name in self.columns}, "diversity": e.diversity,
                    "images": e.folder,
                })  # fmt: skip
        known = [key for key in rows[0] if any(row[key] is not None for row in rows)]
        rows = [{key: row[key] for key in known} for row in rows]
        caption = (
            "Means over all prompts. Only the reward of a row was optimised in it; all other measures were not. "
            "Best-of-N has the largest N. Best-of-N of equal NFE has at least as many evaluations as the setting, or "
            "the largest N."
        )
        return Table("results", "All results", rows, caption, folded=True, keys=["reward", "method", "setting"])


def _gain(e: PromptEntry, other: PromptEntry | None) -> Measured | None:
    return None if other is None or other is e else e.reward - other.reward


def _nfe(e: Entry) -> float:
    return e.nfe


def _seconds(e: Entry) -> float:
    return e.seconds.value if isinstance(e, PromptEntry) else float("nan")


def _methods(entries: Sequence[PromptEntry]) -> list[str]:
    return list(dict.fromkeys(e.method for e in entries))


def _largest(found: Sequence[PromptEntry]) -> PromptEntry | None:
    """Best-of-N of the largest N."""
    return max((e for e in found if e.method == BEST), key=_nfe, default=None)


def _as_costly(found: Sequence[PromptEntry], e: PromptEntry) -> PromptEntry | None:
    """Best-of-N of at least as many evaluations, or of the largest N."""
    enough = [b for b in found if b.method == BEST and b.nfe >= e.nfe]
    return min(enough, key=_nfe) if enough else _largest(found)


def _against(difference: Measured, other: str = "") -> str:
    """A difference in words that its interval decides."""
    if not difference.sign:
        return f"not significantly different{f' from {other}' if other else ''} ({difference.text()})"
    words, size = ("higher", difference) if difference.sign > 0 else ("lower", difference * -1.0)
    return f"{words}{f' than {other}' if other else ''} by {size.text()}"
