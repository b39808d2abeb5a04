"""What `mfm fit`, `validate`, `test` and `predict` say at their end: metrics, where things are, what may follow."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from mfm_lightning.backbones import PromptedNetwork
from mfm_lightning.callbacks import ExportModel, LastCheckpoint, RunRecord
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.utils.console import duration

METRICS = 6  # that are named; all are in the logs
PICTURES = 4
NOT_AGAIN = ("--ckpt_path", "--overwrite", "--trainer.max_steps")  # options of a fit that its test does not take over


def summary(stage: str, trainer: L.Trainer, seconds: float, typed: Sequence[str]) -> str:
    """A few lines of plain text.

    Args:
        stage: "fit", "validate", "test" or "predict".
        seconds: that the command took so far.
        typed: its command line, without "mfm".
    """
    folder = Path(trainer.default_root_dir)
    steps = f" after step {trainer.global_step}" if stage == "fit" else ""
    parts = {
        "metrics": [_metrics(trainer)],
        "weights": _weights(trainer, folder) if stage == "fit" else [],
        "checkpoint": _checkpoints(trainer, folder) if stage == "fit" else [],
        "results": _results(stage, folder),
        "pictures": _pictures(stage, trainer, folder),
        "logs": [text for logger in trainer.loggers if (text := where(logger))],
        "next": _next(stage, trainer, folder, typed),
    }
    lines = [f"mfm {stage} is done{steps}, in {duration(seconds)}"]
    for name, found in parts.items():
        for k, text in enumerate(text for text in found if text):
            lines.append(f"  {name if k == 0 else '':<10}  {text}")
    return "\n".join(lines)


def where(logger: Logger) -> str:
    """Where a logger writes to: a folder, an address, or its class where it does not say."""
    if isinstance(logger, MLFlowLogger):
        return f"MLflow: {logger._tracking_uri}, run {logger.run_id}"
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return _short(logger.log_dir)
    kind = type(logger).__name__.removesuffix("Logger")
    experiment = getattr(logger, "experiment", None)
    url = None if getattr(experiment, "offline", False) else getattr(experiment, "url", None)
    place = url or getattr(experiment, "dir", None) or logger.save_dir
    return f"{kind}: {_short(place) if isinstance(place, str | Path) and '://' not in str(place) else place}"


def _short(path: str | Path) -> str:
    """Relative to the current folder, where it is below it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _metrics(trainer: L.Trainer) -> str:
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("lr-")}
    names = sorted(found, key=lambda name: (not name.endswith("/loss"), name))
    texts = [f"{name} {found[name]:.4g}" for name in names[:METRICS]]
    more = [f"{len(names) - METRICS} more in the logs"] * (len(names) > METRICS and bool(trainer.loggers))
    record = next((c for c in _callbacks(trainer) if isinstance(c, RunRecord)), None)
    best = []
    if trainer.state.fn == "fit" and record is not None and record.best is not None:
        best = [f"lowest val/loss {record.best[0]:.4g} at step {record.best[1]}"]
    return ", ".join([*texts, *more, *best])


def _weights(trainer: L.Trainer, folder: Path) -> list[str]:
    names = [c.filename for c in _callbacks(trainer) if isinstance(c, ExportModel)]
    return [_short(folder / name) for name in names if (folder / name).exists()]


def _checkpoints(trainer: L.Trainer, folder: Path) -> list[str]:
    found = [folder / "last.ckpt"] if any(isinstance(c, LastCheckpoint) for c in _callbacks(trainer)) else []
    texts = [f"{_short(path)} (--ckpt_path last goes on from it)" for path in found if path.exists()]
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            score = "" if callback.best_model_score is None else f" {float(callback.best_model_score):.4g}"
            texts.append(f"{_short(callback.best_model_path)} (best {callback.monitor}{score})")
    return texts


def _results(stage: str, folder: Path) -> list[str]:
    if stage == "test":
        return [_short(path) for path in sorted((folder / "test").glob("*.csv"))]
    if stage == "predict":
        paths = (folder / "summary.json", folder / "predict" / "summary.json", folder / "predict")
        return [_short(path) for path in paths if path.exists()]
    return []


def _pictures(stage: str, trainer: L.Trainer, folder: Path) -> list[str]:
    """The last ones of training; of other stages what they leave."""
    places = [folder / stage, folder]
    if stage in ("fit", "validate"):
        places = sorted((folder / "pictures").glob("step_*"))[-1:]
    for place in places:
        if paths := sorted(place.glob("*.png")):
            more = f" and {len(paths) - PICTURES} more" if len(paths) > PICTURES else ""
            return [f"{_short(place)}{os.sep}: {', '.join(path.name for path in paths[:PICTURES])}{more}"]
    return []


def _next(stage: str, trainer: L.Trainer, folder: Path, typed: Sequence[str]) -> list[str]:
    """Commands."""
    found, module = [], trainer.lightning_module
    if stage == "fit" and getattr(module, "evaluation", None) is not None:
        found.append(shlex.join(["mfm", "test", *_kept(typed[1:])]))
    model = getattr(module, "trained", None)
    weights = _weights(trainer, folder)
    of_prompts = isinstance(getattr(model, "network", None), PromptedNetwork)
    if stage in ("fit", "test") and weights and isinstance(model, MetaFlowMap) and not of_prompts:
        samples = ["--output", _short(folder / "samples"), "--num-samples", "64"]
        found.append(shlex.join(["mfm", "sample", weights[0], *samples]))
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if boards and stage == "fit":
        found.append(shlex.join(["tensorboard", "--logdir", _short(Path(boards[0].log_dir).parent)]))
    return found


def _kept(options: Sequence[str]) -> list[str]:
    """The options of a fit that its test needs, too."""
    found, leave = [], False
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("--"):
            leave = name.replace("-", "_").replace("__", "--", 1) in NOT_AGAIN
        if not leave:
            found.append(option)
    return found


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] # Lightning sets it elsewhere
