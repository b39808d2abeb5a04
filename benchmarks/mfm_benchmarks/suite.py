"""What a suite is: parameters, cells of work, and what it makes of their results.

To add a suite, add one file to `benchmarks/mfm_benchmarks/suites/` with a subclass of `Suite`; or name a class of your
own: `mfm benchmark my_module.MySuite`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mfm_benchmarks.blocks import Block, Text
from mfm_benchmarks.fitting import Fit
from mfm_benchmarks.spec import Spec
from mfm_rewards.registry import nearest


@dataclass
class Outcome:
    """What a cell found: numbers and text that JSON holds, and tensors; `commit`: of the code that found it."""

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    commit: str = ""


@dataclass(frozen=True)
class Cell:
    """One unit of work: computed once, stored, and taken from the store by later runs.

    Attributes:
        name: what progress and failures call it, unique in its suite.
        identity: all that its outcome depends on, as JSON; a stored outcome of equal identity is taken instead.
        compute: called with the outcomes of `needs`, in their order.
        needs: cells that must be there first.
        fit: a job that is run first, unless its file is there.
        alone: it measures time: of such cells one is computed at a time on a machine, however many processes there are.
    """

    name: str
    identity: dict[str, Any]
    compute: Callable[..., Outcome]
    needs: tuple[Cell, ...] = ()
    fit: Fit | None = None
    alone: bool = False


class Results:
    """Outcomes of the cells that succeeded.

    Attributes:
        failures: what went wrong with others, by the cell's name.
        missing: names of those that are not computed yet.
        stored: how many outcomes another run or process has computed.
        seconds: that all took.
    """

    def __init__(self) -> None:
        self._outcomes: dict[str, Outcome] = {}
        self.failures: dict[str, str] = {}
        self.missing: list[str] = []
        self.stored, self.seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def commits(self) -> list[str]:
        """Of the code that found them."""
        return sorted({outcome.commit for outcome in self._outcomes.values() if outcome.commit})

    def add(self, cell: Cell, outcome: Outcome) -> None:
        self._outcomes[cell.name] = outcome

    def __getitem__(self, cell: Cell) -> Outcome:
        return self._outcomes[cell.name]

    def all(self, cells: Iterable[Cell]) -> list[Outcome] | None:
        """The outcomes of all these cells; None if one has none."""
        cells = list(cells)
        return [self[cell] for cell in cells] if all(cell in self for cell in cells) else None

    def __contains__(self, cell: object) -> bool:
        return isinstance(cell, Cell) and cell.name in self._outcomes


def no_result(results: Results) -> Text:
    """In place of a report on nothing: why there is none."""
    if results.missing:
        return Text(
            "No result", ["None of these results is there yet: what is not computed, and what failed, is above."]
        )
    return Text("No result", ["Every run failed; the messages are above."])


class MissingInput(FileNotFoundError):
    """What a suite needs and does not find."""

    def __init__(self, suite: str, missing: Sequence[str]) -> None:
        super().__init__(
            f"the suite {suite} cannot run, for these are missing:\n" + "\n".join(f"  - {m}" for m in missing)
        )


class Suite(ABC):
    """Base class. The constructor's parameters are what `--config` and the command line can set.

    Methods are called in this order: `shrink` (with --quick), `missing`, `fits`, `prepare`, `cells`, `report`.

    Attributes:
        name: as `mfm benchmark NAME`; its config is `configs/benchmarks/NAME.yaml`.
        title, about, intervals: of the report's page; the last says what its intervals are.
        device, output: set before any method is called; `output` is the folder of results and report.
        skipped: what was left out on purpose, and why, for the report.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""
    intervals: ClassVar[str] = (
        "Means, distances and ratios have a 95 % interval, beside the number or shaded; costs are exact. The page says "
        "“higher” or “lower” only if the interval of the paired difference excludes zero. Each interval is of one "
        "comparison, without a correction for their number; which setting has the fewest evaluations is decided for "
        "all settings together."
    )
    device: torch.device = torch.device("cpu")
    output: Path = Path("outputs/benchmarks")

    @property
    def noise(self) -> str:
        """What the noise of its samples is made from, such as the seeds and their number: two runs with the same text
        have the same noise, sample by sample, and are compared so. Empty where runs have nothing in common."""
        return ""

    @property
    def skipped(self) -> dict[str, str]:
        return {}

    def shrink(self) -> None:  # noqa: B027
        """Make it finish within four minutes on two cores; by itself it does nothing."""

    def missing(self) -> list[str]:
        """What must be given and is not there, each with what would be right; nothing is run if there is any."""
        return []

    def fits(self) -> list[Fit]:
        """Training jobs whose files `prepare` and cells take; those that are there are not run again."""
        return []

    @abstractmethod
    def prepare(self) -> None:
        """Load models and check that methods and rewards fit each other, before any long work."""

    @abstractmethod
    def cells(self) -> Sequence[Cell]:
        """The work, in order; a cell's needs come before it."""

    def described(self) -> dict[str, Any]:
        """The settings of each method by its name, for the page; by default those of the parameter `methods`."""
        found = getattr(self, "methods", None)
        return {name: described(method) for name, method in found.items()} if isinstance(found, dict) else {}

    @abstractmethod
    def report(self, results: Results) -> Sequence[Block]:
        """Summary, headline, text, tables and figures; cells that failed are not in `results`."""


def described(value: Any) -> Any:
    """The settings of an object as JSON has them: of a dataclass by its class and fields, those without a value left
    out."""
    if isinstance(value, Spec):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: described(getattr(value, f.name)) for f in fields(value) if f.init}
        kept = {name: setting for name, setting in settings.items() if setting not in (None, {}, [])}
        return {"class": type(value).__name__, **kept}
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else type(value).__name__


def suites() -> dict[str, type[Suite]]:
    """The suites of `benchmarks/mfm_benchmarks/suites/`, by name."""
    package = importlib.import_module("mfm_benchmarks.suites")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"mfm_benchmarks.suites.{module.name}")
    found, open_ = {}, [Suite]
    while open_:
        for kind in open_.pop().__subclasses__():
            open_.append(kind)
            if kind.name and kind.__module__.startswith("mfm_benchmarks.suites."):
                found[kind.name] = kind
    return dict(sorted(found.items()))


def find_suite(name: str) -> type[Suite]:
    """A suite by its name, or by the path of a class.

    Raises:
        ValueError: if there is no such suite; the nearest name is suggested.
    """
    known = suites()
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if module and "/" not in name:  # of the user's own
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"suite {name!r} cannot be imported: {error}") from error
        if isinstance(found, type) and issubclass(found, Suite):
            return found
        raise ValueError(f"{name} is no subclass of mfm_benchmarks.suite.Suite")
    raise ValueError(f"unknown suite {name!r}: did you mean {nearest(name, known)!r}? Known are {', '.join(known)}")
