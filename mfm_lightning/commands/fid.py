"""`mfm fid`: Fréchet Inception distance and Inception score of samples."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import get_console
from rich.table import Table

from mfm_lightning.metrics.fid import (
    Quality,
    Statistics,
    has_statistics,
    measure_images,
    reference_statistics,
)
from mfm_lightning.metrics.inception import FEATURES, Inception, find_inception_weights
from mfm_lightning.utils.devices import find_device
from mfm_lightning.utils.images import ImageSet

log = logging.getLogger(__name__)
WHAT = "a folder of images or shards, an .npz of images (arr_0, ADM's layout)"


def main(args: Sequence[str]) -> None:
    """Entry point of the subcommand.

    Raises:
        FileNotFoundError: if images, statistics or Inception's weights are not there.
        ValueError: if they do not fit.
    """
    parser = _parser()
    options = parser.parse_args(args)
    if options.samples is None and (options.reference is None or has_statistics(options.reference)):
        parser.error("give --samples, or a --reference of images whose statistics are wanted")
    if options.samples is None and options.output is not None:
        parser.error("--output has figures of --samples")
    images = None if options.samples is None or has_statistics(options.samples) else ImageSet(options.samples)
    if options.splits < 1:
        raise ValueError(f"--splits {options.splits} must be at least 1")
    needed = max(options.splits, 2)
    if images is not None and (number := images.count(needed)) < needed:
        raise ValueError(f"{options.samples} has {number} images, too few for {options.splits} splits (--splits)")
    if options.reference is None and images is None:
        parser.error("--samples of statistics need --reference")
    if options.reference is not None and not options.reference.exists():
        raise FileNotFoundError(f"no reference at {options.reference}: expected {WHAT}, or of statistics")
    inception, images_as_reference = None, options.reference is not None and not has_statistics(options.reference)
    if images is not None or images_as_reference:
        weights = find_inception_weights(options.weights, options.allow_download)
        device = find_device(options.device)
        inception = Inception(weights, options.num_features, logits=images is not None).to(device)
    reference = _reference(options, inception)
    if options.samples is None:
        if reference is not None and options.save_statistics is not None:
            reference.save(options.save_statistics)
        return
    _show(options, _measure(options, images, inception, reference))


def _reference(options: argparse.Namespace, inception: Inception | None) -> Statistics | None:
    if options.reference is None:
        return None
    if inception is None:
        return Statistics.load(options.reference)
    settings = (options.cache, options.crop, options.batch_size, options.workers)
    return reference_statistics(options.reference, inception, *settings)


def _measure(
    options: argparse.Namespace, images: ImageSet | None, inception: Inception | None, reference: Statistics | None
) -> Quality:
    save, what = options.save_statistics, str(options.samples)
    if images is not None and inception is not None:
        batches = images.batches(options.batch_size, options.workers)
        return measure_images(batches, inception, reference, options.splits, what, images.number, save)
    statistics = Statistics.load(options.samples)
    if save is not None:
        statistics.save(save)
    return Quality.of(statistics, reference=reference)


def _show(options: argparse.Namespace, quality: Quality) -> None:
    table = Table("samples", "images", "FID", "Inception score")
    score = (
        "" if quality.inception_score is None else f"{quality.inception_score:.3f} ± {quality.inception_score_std:.3f}"
    )
    fid = "" if quality.fid is None else f"{quality.fid:.4f}"
    table.add_row(str(options.samples), str(quality.num_samples or ""), fid, score)
    get_console().print(table)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: str(getattr(options, k)) for k in ("samples", "reference", "num_features")}
        options.output.write_text(json.dumps({**asdict(quality), **settings}, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mfm fid",
        description="Fréchet Inception distance to a reference, and Inception score, by torch-fidelity's network. "
        "Without samples, a reference's statistics are made and kept.",
    )
    parser.add_argument("--samples", type=Path, help=f"{WHAT}, or an .npz of statistics (mu, sigma)")
    parser.add_argument("--reference", type=Path, help=f"{WHAT}, or of statistics; without, the Inception score alone")
    parser.add_argument("--weights", type=Path, help="of Inception; torch-fidelity's own if left out")
    parser.add_argument("--allow-download", action="store_true", help="let torch-fidelity fetch its weights")
    parser.add_argument("--cache", type=Path, help="folder for statistics of references")
    parser.add_argument(
        "--crop", type=int, help="cut the reference's image files to so many pixels, as preparation does"
    )
    parser.add_argument("--num-features", type=int, choices=FEATURES, default=2048, help="2048 if left out: FID")
    parser.add_argument("--splits", type=int, default=10, help="of the Inception score")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode image files")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument(
        "--save-statistics", type=Path, help="write mu and sigma (the reference's without samples) to this .npz"
    )
    return parser
