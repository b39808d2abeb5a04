"""`mfm average`: the averaged weights of a run, of any length."""

from __future__ import annotations

import logging
from pathlib import Path

from mfm_lightning.commands.errors import CommandLineError

log = logging.getLogger(__name__)
MISSED = 0.1  # of a profile's norm: from here on it is said that the average is another one


def average(path: Path, *, sigma_rel: float, output: Path, step: int | None = None) -> None:
    """Put the average of a run's weights together, of a length chosen after training.

    From the snapshots that the callback EMASnapshots leaves (post-hoc EMA of EDM2, arXiv 2312.02696).

    Args:
        path: the run's folder, or that of its snapshots.
        sigma_rel: width of the average as a share of the training so far, in (0, 0.2887]: 0.05 is short, 0.2 is long.
        output: file to write, .safetensors.
        step: the last step that counts, one of a snapshot; the last one if left out.

    Raises:
        CommandLineError: for an output of another kind.
        FileNotFoundError, ValueError, CheckpointError: as `average_snapshots`.
    """
    if output.suffix != ".safetensors":
        raise CommandLineError(f"--output {output}: expected a name that ends in .safetensors")
    from mfm_lightning.checkpoints.post_hoc_ema import average_snapshots

    folder = path / "ema" if (path / "ema").is_dir() else path
    found, number, missed = average_snapshots(folder, output, sigma_rel, step)
    log.info(
        "average of sigma_rel %g up to step %d, of %d snapshots in %s, written to %s",
        sigma_rel, found, number, folder, output,
    )  # fmt: skip
    if missed > MISSED:
        log.warning(
            "its profile is off by %.0f %%: snapshots are too few for this length, or of lengths too far from it",
            100 * missed,
        )
