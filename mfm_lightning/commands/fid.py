"""`mfm fid`: Fréchet Inception distance and Inception score of samples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.utils.atomic import save_json

if TYPE_CHECKING:
    from mfm_lightning.metrics.fid import Quality, Statistics
    from mfm_lightning.metrics.inception import Inception

WHAT = "a folder of images or shards, an .npz of images (arr_0, ADM's layout)"


def fid(
    *,
    samples: Path | None = None,
    reference: Path | None = None,
    weights: Path | None = None,
    allow_download: bool = False,
    cache: Path | None = None,
    crop: int | None = None,
    num_features: Literal[64, 192, 768, 2048] = 2048,
    splits: int = 10,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    output: Path | None = None,
    save_statistics: Path | None = None,
) -> None:
    """Measure the Fréchet Inception distance to a reference, and the Inception score.

    By torch-fidelity's network. Without samples, a reference's statistics are made and kept.

    Args:
        samples: a folder of images or shards, an .npz of images (arr_0, ADM's layout) or of statistics (mu, sigma).
        reference: as samples; without it, the Inception score alone.
        weights: file of Inception's weights; torch-fidelity's own if left out.
        allow_download: let torch-fidelity fetch its weights.
        cache: folder for statistics of references.
        crop: cut the reference's image files to so many pixels, as preparation does.
        num_features: of Inception's layers; FID is of 2048.
        splits: of the Inception score.
        batch_size: images at once.
        num_workers: processes that decode image files.
        device: auto, cpu, cuda, cuda:1, ...
        output: write the figures to this JSON file.
        save_statistics: write mu and sigma (the reference's, without samples) to this .npz.

    Raises:
        CommandLineError: if options do not fit together.
        FileNotFoundError: if images, statistics or Inception's weights are not there.
        ValueError: if they do not fit.
    """
    from mfm_lightning.metrics.fid import Quality, Statistics, has_statistics, measure_images, reference_statistics
    from mfm_lightning.metrics.inception import Inception, find_inception_weights
    from mfm_lightning.utils.atomic import check_is_folder
    from mfm_lightning.utils.devices import find_device
    from mfm_lightning.utils.images import ImageSet

    if samples is None and (reference is None or has_statistics(reference)):
        raise CommandLineError("give --samples, or a --reference of images whose statistics are wanted")
    if samples is None and output is not None:
        raise CommandLineError("--output has figures of --samples, which are not given")
    for path in (output, save_statistics):
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: expected the name of a file to write")
        if path is not None:
            check_is_folder(path.parent)
    images = None if samples is None or has_statistics(samples) else ImageSet(samples)
    if splits < 1:
        raise ValueError(f"--splits {splits} must be at least 1")
    needed = max(splits, 2)
    if images is not None and (number := images.count(needed)) < needed:
        raise ValueError(f"{samples} has {number} images, too few for {splits} splits (--splits)")
    if reference is None and images is None:
        raise CommandLineError("--samples of statistics need --reference")
    if reference is not None and not reference.exists():
        raise FileNotFoundError(f"no reference at {reference}: expected {WHAT}, or of statistics")
    inception: Inception | None = None
    if images is not None or (reference is not None and not has_statistics(reference)):
        found = find_inception_weights(weights, allow_download)
        inception = Inception(found, num_features, logits=images is not None).to(find_device(device))
    known: Statistics | None = None
    if reference is not None and inception is None:
        known = Statistics.load(reference)
    elif reference is not None and inception is not None:
        known = reference_statistics(reference, inception, cache, crop, batch_size, num_workers)
    if samples is None:
        if known is not None and save_statistics is not None:
            known.save(save_statistics)
        return
    if images is not None and inception is not None:
        batches = images.batches(batch_size, num_workers)
        quality = measure_images(batches, inception, known, splits, str(samples), images.number, save_statistics)
    else:
        statistics = Statistics.load(samples)
        if save_statistics is not None:
            statistics.save(save_statistics)
        quality = Quality.of(statistics, reference=known)
    _show(quality, {"samples": str(samples), "reference": str(reference), "num_features": str(num_features)}, output)


def _show(quality: Quality, settings: dict[str, str], output: Path | None) -> None:
    from rich.table import Table

    from mfm_lightning.utils.console import console

    table = Table("samples", "images", "FID", "Inception score")
    score = (
        "" if quality.inception_score is None else f"{quality.inception_score:.3f} ± {quality.inception_score_std:.3f}"
    )
    fid = "" if quality.fid is None else f"{quality.fid:.4f}"
    table.add_row(settings["samples"], str(quality.num_samples or ""), fid, score)
    console().print(table)
    if output is not None:
        save_json({**asdict(quality), **settings}, output)
