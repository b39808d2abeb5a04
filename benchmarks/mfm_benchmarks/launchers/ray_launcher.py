"""Workers as tasks of a ray cluster: the one that the environment or `address` names, else one on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_benchmarks.launchers import run_worker


def launch(
    args: Sequence[str],
    workers: int,
    folder: Path,
    *,
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    init: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Run `mfm ARGS` in so many tasks, and wait for their end. All nodes must see the working directory.

    Args:
        args: of the command.
        workers: how many.
        folder: of no account: ray keeps the logs.
        address: of the cluster, as `ray.init` takes it.
        num_cpus: CPU cores of a task.
        num_gpus: GPUs of a task.
        init: other arguments of `ray.init`.

    Returns:
        what went wrong, by the task's number.

    Raises:
        ImportError: if ray is not installed.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError("the launcher ray needs pip install 'mfm-lightning[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, **(init or {}))
    try:
        # a task whose process dies is begun again by ray; what was done is in the folder
        task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_calls=1)(run_worker)
        pending = {task.remote(list(args), str(Path.cwd())): number for number in range(workers)}
        failed = {}
        for reference, number in pending.items():
            try:
                ray.get(reference)
            except RayError as error:
                failed[f"task {number}"] = str(error).strip().splitlines()[-1]
        return failed
    finally:
        if started:
            ray.shutdown()
