"""Pictures that a run writes to files go to its loggers, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image


@contextmanager
def logged_pictures(trainer: L.Trainer, folder: Path, stage: str) -> Iterator[None]:
    """Give the loggers every PNG that is written to a folder within the context, as "STAGE/NAME".

    Args:
        trainer: of the run; on ranks other than 0 nothing is done.
        folder: that is looked at, without the folders in it. It need not exist yet.
        stage: "val", "test" or "predict".
    """
    before = _written(folder)
    yield
    if not trainer.is_global_zero:
        return
    for path, at in sorted(_written(folder).items()):
        if before.get(path) != at:
            log_picture(trainer, f"{stage}/{path.stem}", path)


def log_picture(trainer: L.Trainer, name: str, path: Path) -> None:
    """Give a picture to all loggers of a run, at the step that they have for the metrics of the same moment.

    TensorBoard and MLflow have ways of their own. Any other logger takes it by `log_image(key=, images=[FILE], step=)`,
    as Weights & Biases does; one without that method has no pictures (CSV) and is passed over.

    Args:
        name: such as "val/samples".
        path: of the PNG.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # as Lightning counts for metrics
    for logger in trainer.loggers:
        _log(logger, name, path, step)


def _log(logger: Logger, name: str, path: Path, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, _pixels(path), step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, _pixels(path), key=name, step=step, synchronous=True)
    elif (log_image := getattr(logger, "log_image", None)) is not None:
        log_image(key=name, images=[str(path)], step=step)


def _pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`(H, W, 3)`, bytes."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _written(folder: Path) -> dict[Path, int]:
    """When each PNG was written, in ns."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} if folder.is_dir() else {}
