"""What is made of images of prompts: reward by evaluations and seconds, what it costs in what is not optimised."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Block, Claims, Headline, Picture, Table
from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.prompt_entries import PromptEntry
from mfm_benchmarks.parts.reward_report import BASE, BEST, Contest, contest
from mfm_lightning.metrics.measured import Measured, rounded

# columns of the table besides what is measured
COLUMNS = (
    "reward", "method", "setting", "NFE", "of the transformer", "of the reward", "seconds", "mean reward",
    "above the base flow", "above Best-of-N", "above Best-of-N of as many NFE", "best look-ahead", "diversity",
    "images",
)  # fmt: skip


@dataclass
class PromptReport:
    """Args:
    entries: by reward, that of the base flow first.
    columns: names of all that is measured, in order.
    prompts: of the entries' images.
    """

    entries: Mapping[str, Sequence[PromptEntry]]
    columns: Sequence[str]
    prompts: Sequence[str]

    def blocks(self) -> list[Block]:
        return [*self._reaching(), *self._claims(), *self._pictures(), self._table()]

    def _reaching(self) -> list[Block]:
        """For each reward, what is above Best-of-N of the largest N at the lowest cost, for all settings at once."""
        items, rows = [], []
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
                    items.append(("none", f"is above Best-of-{number} in {reward} with fewer {what}"))
                    continue
                e = cheaper[0].entry
                words = f"fewer {what} than Best-of-{number} for a higher reward, {reward}: {e.name}"
                items.append((f"{rounded(cost(best) / cost(e))} x", words))
            rows += [self._row(reward, c, best) for c in sorted(above, key=lambda c: c.entry.nfe)]
        caption = (
            "Settings whose mean reward is above that of Best-of-N with the largest N, for all settings of a reward at "
            "once. Intervals in the table are of one comparison each."
        )
        table = [Table("reaching_best_of_n", "Above Best-of-N", rows, caption)] if rows else []
        return [Headline(items), *table] if items else []

    def _row(self, reward: str, c: Contest, best: PromptEntry) -> dict[str, Any]:
        e = c.entry
        return {
            "reward": reward, "method": e.method, "setting": e.label, "NFE": round(e.nfe),
            "times fewer NFE": best.nfe / e.nfe, "times fewer seconds": _seconds(best) / _seconds(e),
            "above by": c.gain,
        }  # fmt: skip

    def _claims(self) -> list[Claims]:
        """Each method in its setting of most evaluations: against both baselines, and what it does to the rest."""
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
                    said.append(f"best look-aheads {_against(e.best - e.reward, 'its endpoints')}")
                gains.append(f"{reward}: {e.name}, {cost}: {'; '.join(said)}.")
                if changes := self._changes(e, base):
                    rest.append(f"{reward}: {e.name}: {'; '.join(changes)}.")
        blocks = [Claims("The reward that is optimised, each method in its setting of most evaluations", gains)]
        return [*blocks, Claims("What is not optimised, against the base flow", rest)] if rest else blocks

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
            ("reward_nfe", "Reward against evaluations", "NFE an image", _nfe),
            ("reward_seconds", "Reward against seconds", "seconds an image", _seconds),
        ):
            panels = {
                reward: {m: [(cost(e), e.reward) for e in entries if e.method == m] for m in _methods(entries)}
                for reward, entries in self.entries.items()
            }
            caption = "Mean reward; 95 % intervals over prompts are shaded. A line joins the settings of a method."
            found.append(
                Picture(name, title, plots.lines(panels, label, "mean reward", sharey=False, mark=False), caption)
            )
        for reward, entries in self.entries.items():
            last = {e.method: e for e in sorted(entries, key=_nfe) if len(e.images)}
            if last:
                found.append(self._sheet(reward, last))
        return found

    def _sheet(self, reward: str, last: Mapping[str, PromptEntry]) -> Picture:
        """A row a prompt, a column a method."""
        images = torch.stack([e.images for e in last.values()], dim=1)
        titles = [
            f"{textwrap.fill(e.label.replace('N ', 'Best-of-') if m == BEST else m, 16)}\n{e.reward.value:.3g}"
            for m, e in last.items()
        ]
        rows = [(textwrap.fill(text, 26, max_lines=6), row) for text, row in zip(self.prompts, images, strict=True)]
        plot = plots.gallery(rows, len(last), titles, size=1.5)
        caption = (
            "A prompt a row, from the same noise in all columns; above each column the method, in its setting of most "
            f"evaluations, and its mean {reward} over all prompts."
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
                    "of the transformer": e.network, "of the reward": e.evaluations, "seconds": e.seconds,
                    "mean reward": e.reward, "above the base flow": _gain(e, base), "above Best-of-N": _gain(e, best),
                    "above Best-of-N of as many NFE": _gain(e, equal), "best look-ahead": e.best,
                    **{name: e.others.get(name) for name in self.columns}, "diversity": e.diversity,
                    "images": e.folder,
                })  # fmt: skip
        known = [key for key in rows[0] if any(row[key] is not None for row in rows)]
        rows = [{key: row[key] for key in known} for row in rows]
        caption = (
            "Means of all prompts. What is beside the reward was not optimised in that line. Best-of-N has the largest "
            "N; that of as many NFE has at least those of the setting, or the most that there are."
        )
        return Table("results", "All results", rows, caption)


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
