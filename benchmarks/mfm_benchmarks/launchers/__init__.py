"""Starts processes that share a suite's cells: on this machine, on SLURM by submitit, or on a ray cluster.

No launcher deals out work: each process claims cells by itself (`mfm_lightning.utils.shared_work`), so that more may be
started at any time, by any launcher or by hand.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Launch = Callable[..., dict[str, str]]


def find_launcher(name: str) -> Launch:
    """The `launch` of a launcher's file.

    Raises:
        ImportError: if the launcher's package is not installed, with the extra that brings it.
    """
    module = importlib.import_module(f"mfm_benchmarks.launchers.{name}_launcher")
    return module.launch


def check_options(name: str, launch: Launch, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that the launcher does not take."""
    parameters = inspect.signature(launch).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # they are the package's own
    known = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    if wrong := sorted(options.keys() - set(known)):
        raise ValueError(f"launcher_options has {wrong[0]!r}: the launcher {name} takes {', '.join(known)}")


def run_worker(args: Sequence[str], folder: str) -> None:
    """`mfm ARGS` in the folder that the launcher was called in; called in a process of a cluster."""
    import os

    from mfm_lightning.commands.main import main

    os.chdir(folder)
    main(list(args))


def logs(output: Path) -> Path:
    """Where the workers' words go."""
    return output / "workers"
