"""`max_rows: auto`: how many rows a network takes at once, found by what memory has room for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from mfm_lightning.utils.atomic import save_json

log = logging.getLogger(__name__)
ROWS = "max_rows.json"  # in a run's folder
MaxRows = int | Literal["auto"]
Result = TypeVar("Result")


class RowBudget:
    """The most rows at once that memory has room for, found by the work itself: all rows first; where memory ends half
    as many, and from there on the middle between what fits and what does not, until both are neighbours.

    Args:
        what: needs the memory, for messages.
        lowest: fewest rows that can be taken.

    Attributes:
        fits: the most rows that were taken; 0 before.
        fails: the fewest for which memory ended; None where it never has.
    """

    def __init__(self, what: str, lowest: int = 1) -> None:
        self.what, self.lowest, self.fits, self.fails = what, lowest, 0, None
        self.fails: int | None
        self._said = False

    @property
    def settled(self) -> bool:
        """Whether it is known that no more rows fit."""
        return self.fails is not None and self.fails - self.fits <= 1

    def rows(self, num: int) -> int:
        """How many to take of `num` rows."""
        if self.fails is None:
            return num
        more = self.fits if self.settled else (self.fits + self.fails) // 2
        return min(num, max(self.lowest, more))

    def attempt(self, compute: Callable[[int], Result], num: int, device: torch.device) -> tuple[Result, int]:
        """`compute(rows)` with as many of `num` rows as fit: the result, and how many. It is called again with fewer
        where memory ends.

        Raises:
            torch.OutOfMemoryError: if `lowest` rows do not fit.
        """
        if device.type == "cpu" and not self._said:
            self._said = True
            log.info("max_rows: auto measures a GPU's memory; on the CPU %s takes all %d rows at once", self.what, num)
        while True:
            rows = self.rows(num)
            try:
                found = compute(rows)
            except torch.OutOfMemoryError as error:
                if rows <= self.lowest:
                    raise torch.OutOfMemoryError(
                        f"{self.what} runs out of memory with {rows} at once, the fewest: {str(error).splitlines()[0]}"
                    ) from error
                self._failed(rows)
            else:
                self._fitted(rows)
                return found, rows
            if device.type == "cuda":  # the failed try's tensors are gone only here
                torch.cuda.empty_cache()

    def _fitted(self, rows: int) -> None:
        before = self.settled
        self.fits = max(self.fits, rows)
        self._say(before)

    def _failed(self, rows: int) -> None:
        before = self.settled and rows > self.fits
        self.fails = rows
        if rows <= self.fits:  # memory has become less: others take it, or it is in pieces
            self.fits = 0
        self._say(before)

    def _say(self, before: bool) -> None:
        if self.settled and not before and self.fits:
            log.info("max_rows: auto, %s: %d at once fit, %d do not", self.what, self.fits, self.fails)


def in_parts(
    compute: Callable[[slice], Result], num: int, max_rows: MaxRows, budget: RowBudget, device: torch.device
) -> list[Result]:
    """`compute(rows)` of `num` rows in parts of `max_rows`, or of as many as the budget finds."""
    if max_rows != "auto":
        return [compute(slice(k, k + max_rows)) for k in range(0, num, max_rows)]
    parts: list[Result] = []
    done = 0
    while done < num:
        begin = done
        part, rows = budget.attempt(lambda rows, begin=begin: compute(slice(begin, begin + rows)), num - done, device)
        parts.append(part)
        done += rows
    return parts


class RowsNote:
    """What `max_rows: auto` found, in a file, so that a later run on such a device begins with it.

    Args:
        path: of the file.
        budgets: by name.
        context: what the numbers hold for: of another one the file is not read, and written over.
    """

    def __init__(self, path: Path, budgets: Mapping[str, RowBudget], context: Mapping[str, Any]) -> None:
        self.path, self.budgets, self.context = path, dict(budgets), dict(context)
        self._written = self._content()
        if not self.budgets or not path.is_file():
            return
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            found = {name: (int(row["fits"]), row["fails"]) for name, row in said["rows"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no note of max_rows ({error}): delete it") from error
        if said.get("context") != json.loads(json.dumps(self.context)):
            log.info("%s is of another device or other settings: max_rows is measured anew", path)
            return
        for name, (fits, fails) in found.items():
            if name in self.budgets and fails is not None:
                self.budgets[name].fits, self.budgets[name].fails = fits, int(fails)
        log.info("max_rows: auto begins with what %s says", path)

    def save(self) -> None:
        """Write it where something new was found."""
        content = self._content()
        if content != self._written and any(budget.fails is not None for budget in self.budgets.values()):
            save_json(content, self.path)
            self._written = content

    def _content(self) -> dict[str, Any]:
        rows = {name: {"fits": budget.fits, "fails": budget.fails} for name, budget in self.budgets.items()}
        return {"context": self.context, "rows": rows}


def device_context(device: torch.device) -> dict[str, Any]:
    """What a device's memory depends on."""
    if device.type != "cuda":
        return {"device": device.type}
    about = torch.cuda.get_device_properties(device)
    return {"device": about.name, "memory": about.total_memory}


def check_max_rows(max_rows: MaxRows | None) -> None:
    """Raise ValueError unless it is a number from 1 on, "auto", or None."""
    if max_rows is not None and max_rows != "auto" and (not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"max_rows {max_rows!r} must be at least 1, or auto")
