"""What sharing work costs: cells that only sleep, done by many processes through the claim code of the benchmarks.

    python -m mfm_benchmarks.claiming --processes 512 --cells 2048 --seconds 1

prints how much longer it took than if claiming cost nothing, and how many operations on files a cell had, by
kind, of all processes: what a file server would have to answer. It needs neither torch nor a model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mfm_lightning.utils.atomic import save_json
from mfm_lightning.utils.leases import Lease, Leases
from mfm_lightning.utils.shared_work import Board, Piece, share

AUDITED = {"open": "open", "os.listdir": "list", "os.scandir": "list", "os.remove": "remove", "os.rename": "rename",
           "os.utime": "touch", "os.mkdir": "mkdir"}  # fmt: skip


class Operations:
    """Counts operations on files below a folder, from its making to the process's end."""

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._folder = str(folder)
        sys.addaudithook(self._heard)
        plain = os.stat

        def counted(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
            if str(path).startswith(self._folder):
                self.counts["stat"] += 1
            return plain(path, *args, **kwargs)

        os.stat = counted  # the only one that Python does not report

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in AUDITED and args and str(args[0]).startswith(self._folder):
            self.counts[AUDITED[event]] += 1


def worker(folder: Path, pieces: list[Piece], seconds: float, lease: float) -> dict[str, Any]:
    """One process's part: how many cells it did, seconds to the last one, of its processor, and operations on files."""
    operations, done, begin = Operations(folder), 0, time.monotonic()
    last = begin

    def do(piece: Piece, held: Lease) -> None:
        nonlocal done, last
        time.sleep(seconds)
        if held.is_held:
            save_json({"by": os.getpid()}, folder / f"{piece.key}.json")
            done, last = done + 1, time.monotonic()

    share(pieces, Board(folder), Leases(folder / "claims", lease), do)
    return {"done": done, "seconds": last - begin, "cpu": time.process_time(), "operations": operations.counts}


def simulate(folder: Path, processes: int, cells: int, seconds: float, lease: float = 120.0) -> dict[str, Any]:
    """Cells done, the times that each took (a process's run from its begin to its last cell, over its cells), how many
    were done twice, and operations on files a cell."""
    pieces = [Piece(f"cell-{number:06d}", f"cell {number}") for number in range(cells)]
    said, begin, children = folder.with_name(f"{folder.name}-said"), time.monotonic(), []
    said.mkdir(parents=True)
    for _ in range(processes):
        if (child := os.fork()) == 0:
            status = 1
            try:
                found = worker(folder, pieces, seconds, lease)
                (said / f"{os.getpid()}.json").write_text(json.dumps(found))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    failed = sum(os.waitpid(child, 0)[1] != 0 for child in children)
    took = time.monotonic() - begin
    found = [json.loads(path.read_text()) for path in said.glob("*.json")]
    shutil.rmtree(said)
    counts: Counter[str] = sum((Counter(one["operations"]) for one in found), Counter())
    done, busy = sum(one["done"] for one in found), sum(one["seconds"] for one in found)
    return {
        "processes": processes, "cells": len(list(folder.glob("cell-*.json"))), "done": done, "failed": failed,
        "wall": took, "overhead": busy / (done * seconds) - 1 if done else float("nan"),
        "cpu": sum(one["cpu"] for one in found) / cells, "left": len(list((folder / "claims").glob("*.lease"))),
        "operations": {kind: round(number / cells, 2) for kind, number in counts.most_common()},
    }  # fmt: skip


def main() -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--cells", type=int, default=0, help="four for each process where 0")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a cell takes")
    parser.add_argument("--folder", type=Path, default=None, help="on the file system that is asked about")
    given = parser.parse_args()
    print("processes  cells  twice  wall [s]  overhead  CPU a cell  operations on files a cell")
    for processes in given.processes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            found = simulate(Path(folder) / "results", processes, given.cells or 4 * processes, given.seconds)
        kinds = ", ".join(f"{kind} {number:g}" for kind, number in found["operations"].items())
        print(
            f"{processes:9d}  {found['cells']:5d}  {found['done'] - found['cells']:5d}  {found['wall']:8.1f}  "
            f"{found['overhead']:8.2%}  {found['cpu'] * 1e3:7.2f} ms  {kinds}",
            flush=True,
        )


if __name__ == "__main__":
    main()
