"""`mfm data`: what a config will read, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path


def data(*, config: Path, output: Path = Path("outputs/data"), pictures: int = 64) -> None:
    """Show what a config will read: counts by class, sizes, a picture of a training batch.

    Nothing is trained. Images that fit in memory are all decoded, so that a damaged one is found here.

    Args:
        config: YAML of a job, of which the section data is read: its path, or the name of a packaged one.
        output: folder for batch.png, classes.csv and classes.json.
        pictures: images of the batch that are drawn.

    Raises:
        FileNotFoundError: if there is no such config, or what it reads is not there.
        ValueError: if it has no data section, or one whose settings are unknown or do not fit.
    """
    from mfm_lightning.commands.data_report import report
    from mfm_lightning.utils.atomic import check_is_folder

    check_is_folder(output)
    if pictures < 1:
        raise ValueError(f"--pictures {pictures} must be at least 1")
    report(config, output, pictures)
