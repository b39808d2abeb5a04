"""One-line errors, each of which a named test must catch: `make mutations`, before a release.

`tests/mutations/*.json` lists them, one file a subject: objects with the fields of `Mutation`. Each is put into a copy
of the repository, where its test must fail. All named tests must pass there first.

    python -m tests.mutations            # all
    python -m tests.mutations smc -j 4   # those with "smc" in list, file, test or description; four at once
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LISTS = "tests/mutations"
TIMEOUT = 1200  # seconds of one test: a mutation that makes it hang is not caught
CAUGHT, SURVIVED = "caught", "SURVIVED"


@dataclass(frozen=True)
class Mutation:
    """A one-line error.

    Attributes:
        file: the file that it is in, from the repository's root.
        old: what is there, once in the file.
        new: what stands there in error.
        test: the test that must then fail, `tests/FILE.py::NAME`.
        what: the error in words.
        listed: the list that it is from.
    """

    file: str
    old: str
    new: str
    test: str
    what: str
    listed: str = ""

    def apply(self, root: Path) -> str:
        """Put the error into the file below `root`; what was in the file.

        Raises:
            ValueError: unless `old` is there once, and `new` differs from it.
        """
        path = root / self.file
        before = path.read_text()
        if before.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.listed}, {self.what!r}: {self.old!r} occurs {before.count(self.old)} times in {self.file}, "
                "expected once, and another text in its place: make the list follow the code"
            )
        path.write_text(before.replace(self.old, self.new))
        return before


def listed(root: Path = ROOT) -> list[Mutation]:
    """All of `tests/mutations/*.json`."""
    return [
        Mutation(**entry, listed=path.stem)
        for path in sorted((root / LISTS).glob("*.json"))
        for entry in json.loads(path.read_text())
    ]


def copied(root: Path, folder: Path) -> Path:
    """A copy of what git tracks, or would, in `folder`.

    Raises:
        RuntimeError: if Python there imports the package from elsewhere.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (root / name).is_file():  # else it is deleted, and not yet so in git
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    check = "import mfm_lightning; print(mfm_lightning.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", check], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    if not found.stdout.startswith(str(folder)):
        raise RuntimeError(f"mfm_lightning is imported from {found.stdout.strip()}, not from the copy {folder}")
    return folder


def environment(copy: Path) -> dict[str, str]:
    """Of processes that import the packages of a copy."""
    paths = [str(copy), str(copy / "rewards"), str(copy / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    # no bytecode: a file of the same size and second would be taken for the one before
    other = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **other}


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status in a copy, and its output; status -1 where it ran past `TIMEOUT` a test."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *tests]
    limit = TIMEOUT * len(tests)
    try:
        done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return -1, f"past {limit} s"
    return done.returncode, done.stdout + done.stderr


def outcome(mutation: Mutation, copy: Path) -> str:
    """`CAUGHT` if the test fails in the copy with the error in it; the copy is then as it was."""
    before = mutation.apply(copy)
    try:
        status, output = run_tests(copy, [mutation.test])
    finally:
        (copy / mutation.file).write_text(before)
    if status in (0, 1):
        return CAUGHT if status else SURVIVED
    # it does not run: no test has looked at it
    return f"no answer (status {status}: {output.strip().splitlines()[-1] if output.strip() else ''})"


def try_all(root: Path, mutations: Sequence[Mutation], processes: int, console: Console) -> dict[Mutation, str]:
    """The outcome of each, in copies of the repository `root`, as many as `processes`.

    Raises:
        ValueError: if an error cannot be put where it belongs.
        RuntimeError: if a named test fails without any error.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for i in range(processes):
            copies.put(copied(root, Path(folder).resolve() / f"copy_{i}"))
        first = copies.get()
        for mutation in mutations:  # all that would be refused, before any long work
            (first / mutation.file).write_text(mutation.apply(first))
        copies.put(first)

        def with_copy(function, *arguments):
            copy = copies.get()
            try:
                return function(*arguments, copy)
            finally:
                copies.put(copy)

        def passing(tests: Sequence[str], copy: Path) -> None:
            status, output = run_tests(copy, tests)
            if status:
                raise RuntimeError(f"a named test fails as it is, with no error put in:\n{output}")

        def tried(mutation: Mutation, copy: Path) -> str:
            begin = time.monotonic()
            found = outcome(mutation, copy)
            console.print(
                f"{found}, {time.monotonic() - begin:.0f} s: {mutation.what}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            return found

        with ThreadPoolExecutor(processes) as pool:
            tests = list(dict.fromkeys(mutation.test for mutation in mutations))
            console.print(f"{len(tests)} tests, as they are", highlight=False)
            shares = [tests[i::processes] for i in range(min(processes, len(tests)))]  # one start for many tests
            list(pool.map(lambda share: with_copy(passing, share), shares))
            found = list(pool.map(lambda mutation: with_copy(tried, mutation), mutations))
    return dict(zip(mutations, found, strict=True))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Status 0 if each error is caught, 1 if one is not, 2 if lists or tests are at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="One-line errors and their tests.")
    parser.add_argument("parts", nargs="*", help="only those with one of these in list, file, test or description")
    parser.add_argument("-j", "--processes", type=int, default=1, help="so many at once")
    options, console = parser.parse_args(arguments), Console()

    def chosen(mutation: Mutation) -> bool:
        names = (mutation.listed, mutation.file, mutation.test, mutation.what)
        return not options.parts or any(part in name for part in options.parts for name in names)

    mutations = [mutation for mutation in listed(root) if chosen(mutation)]
    if not mutations:
        parser.error(f"no mutation for {options.parts} in {root / LISTS}")
    try:
        found = try_all(root, mutations, max(1, options.processes), console)
    except (ValueError, RuntimeError) as error:
        console.print(str(error), markup=False, highlight=False)
        return 2
    table = Table("file", "error", "test", "outcome")
    for mutation, result in found.items():
        table.add_row(mutation.file, mutation.what, mutation.test.rpartition("::")[2], result)
    console.print(table)
    caught = sum(result == CAUGHT for result in found.values())
    console.print(f"{caught} of {len(found)} one-line errors are caught", highlight=False)
    return int(caught < len(found))


if __name__ == "__main__":
    sys.exit(main())
