"""Workers as processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(args: Sequence[str], workers: int, folder: Path, *, threads: int | None = None) -> dict[str, str]:
    """Run `mfm ARGS` in so many processes, and wait for their end. Each has the GPU of its number, where there are any.

    Args:
        args: of the command.
        workers: how many.
        folder: for `worker_K.log`.
        threads: of each; the cores by the number of workers where None. Results are the same bit for bit only with the
            same number of threads, as sums of floats are taken in another order.

    Returns:
        what went wrong, by the worker's name.

    Raises:
        ValueError: for `threads` that are no number from 1 on.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"launcher_options, threads: {threads!r} must be a whole number from 1 on")
    folder.mkdir(parents=True, exist_ok=True)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // workers)
    command = [sys.executable, "-m", "mfm_lightning.commands.main", *args]
    processes, files = [], []
    try:
        for number in range(workers):
            rank = {"RANK": str(number), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(number)}
            files.append((folder / f"worker_{number}.log").open("a"))  # of an earlier launch, too
            environment = {**os.environ, **rank, "OMP_NUM_THREADS": str(threads), "COLUMNS": "120"}
            processes.append(subprocess.Popen(command, env=environment, stdout=files[-1], stderr=subprocess.STDOUT))
        codes = [process.wait() for process in processes]
    finally:  # of an interrupt, too
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for file in files:
            file.close()
    ends = {f"worker {number} ({files[number].name})": code for number, code in enumerate(codes)}
    return {name: f"ended with status {code}" for name, code in ends.items() if code}
