"""`mfm average`: the averaged weights of a run, of any length."""

from __future__ import annotations

import logging
from pathlib import Path

from mfm_lightning.commands.errors import CommandLineError

log = logging.getLogger(__name__)
ROUNDED = 1e-3  # of the weights: from here on it is said
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
    found = average_snapshots(folder, output, sigma_rel, step)
    log.info(
        "average of sigma_rel %g up to step %d, of %d snapshots in %s, written to %s; its profile is off by %.1f %%",
        sigma_rel, found.profile.last, found.snapshots, folder, output, 100 * found.missed,
    )  # fmt: skip
    if found.missed > MISSED:
        log.warning("that is much: the snapshots are too few for this length, or of lengths too far from it")
    if found.profile.begin:
        log.warning("the averages begin at step %d: the width is a share of the steps since", found.profile.begin)
    if found.rounding > ROUNDED:
        log.warning(
            "the rounding of the files' numbers becomes %.2f %% of the weights: for this length let EMASnapshots write "
            "fp32", 100 * found.rounding,
        )  # fmt: skip
