"""Workers as jobs of SLURM, by submitit; where there is no SLURM, as processes of this machine that submitit runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfm_benchmarks.launchers import run_worker


def launch(args: Sequence[str], workers: int, folder: Path, **options: Any) -> dict[str, str]:
    """Run `mfm ARGS` in so many jobs, one array, and wait for their end.

    A job that is preempted or killed for its time loses the cell it was at, which another takes over.

    Args:
        args: of the command.
        workers: how many.
        folder: for submitit's files: logs and what it pickles for its jobs.
        options: `cluster` ("slurm", "local" or "debug"; SLURM where None and there is one), and all that
            `submitit.AutoExecutor.update_parameters` takes: `timeout_min`, `gpus_per_node`, `cpus_per_task`,
            `slurm_partition`, `slurm_array_parallelism`, ...

    Returns:
        what went wrong, by the job's name.

    Raises:
        ImportError: if submitit is not installed.
        ValueError: for an option that it does not take.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError
    except ImportError as error:
        raise ImportError("the launcher submitit needs pip install 'mfm-lightning[submitit]'") from error
    executor = submitit.AutoExecutor(folder=folder, cluster=options.pop("cluster", None))
    try:
        executor.update_parameters(**{"name": "mfm-benchmark", "timeout_min": 24 * 60, **options})
    except (NameError, AssertionError, TypeError) as error:  # of an unknown one, and of a wrong type
        raise ValueError(f"launcher_options of submitit: {' '.join(str(error).split())}") from error
    with executor.batch():
        jobs = [executor.submit(run_worker, list(args), str(Path.cwd())) for _ in range(workers)]
    failed = {}
    try:
        for job in jobs:
            try:
                job.result()
            except (FailedJobError, UncompletedJobError) as error:
                words = str(error).strip().splitlines()
                failed[f"job {job.job_id} ({job.paths.stderr})"] = words[-1] if words else "failed"
    except BaseException:  # an interrupt: jobs are not left behind
        for job in jobs:
            job.cancel(check=False)
        raise
    return failed
