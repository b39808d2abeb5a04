"""The trained network as one safetensors file."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L

from mfm_lightning.callbacks.checkpoint import LastCheckpoint
from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.checkpoints import check_network, fingerprint, save_network
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.training.logs import goes_on_in_its_folder
from mfm_lightning.training.sharding import plain_class
from mfm_lightning.utils.atomic import PARTIAL, mend, put_in_place, remove

log = logging.getLogger(__name__)


@runtime_checkable
class HasFolder(Protocol):
    """A network that other libraries read from a folder of their own layout."""

    def write_beside(self, folder: Path) -> Path:
        """Write it to a folder of its own in `folder`; returns where."""
        ...


class ExportModel(L.Callback):
    """Writes `model.safetensors` (averaged weights where EMA is on) to the run's folder when training ends, after the
    last checkpoint: what goes wrong then costs no step, and `--ckpt_path last` writes it. Its metadata has
    the `step`; under `latents` the data's scale and shift, where they are latents; and under `checkpoint` the SHA-256
    of the `last.ckpt` that it was made with (of one in shards, none). A network that `HasFolder` writes it, too.

    Args:
        filename: in the trainer's `default_root_dir`.
        overwrite: begin a run in the folder of a finished one, whose file is there.

    Raises:
        ValueError: before training, if the LightningModule has no network to be written, or the network cannot be made
            again from what it says of itself (`checkpoints.save_network`).
        FileExistsError: before training, if a finished run's file is there, and this one does not go on from a
            checkpoint.
    """

    def __init__(self, filename: str = "model.safetensors", overwrite: bool = False) -> None:
        self.filename, self.overwrite = filename, overwrite

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_network(_exporting(pl_module).exported)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if goes_on_in_its_folder(trainer):
            return
        self.refuse_overwriting(trainer.default_root_dir)
        path = Path(trainer.default_root_dir) / self.filename
        if trainer.is_global_zero and path.exists():  # else it would pass for this run's, should that be stopped
            path.unlink()
            log.info("%s was of the run before this one, and is removed", path)

    def refuse_overwriting(self, folder: str | Path) -> None:
        """Raise FileExistsError if a run that begins would write over a finished one's file."""
        path = Path(folder) / self.filename
        if path.exists() and not self.overwrite:
            raise FileExistsError(
                f"{path} is of a finished run, which this one would write over: go on from it by --ckpt_path, begin "
                "anew by --overwrite, or take another folder by --trainer.default_root_dir"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _exporting(pl_module)
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue] # Lightning sets it elsewhere
        kept = [c for c in callbacks if isinstance(c, LastCheckpoint)]
        for callback in kept:
            callback.finish(trainer)
        ema = next((c for c in callbacks if isinstance(c, EMA)), EMA())
        with ema.applied(module), module.whole_weights(to_write=True):
            if trainer.is_global_zero:
                folder = Path(trainer.default_root_dir)
                said = module.file_metadata() | module.exported_metadata()
                metadata = {"step": str(trainer.global_step), **said}
                if kept and (checkpoint := folder / "last.ckpt").is_file():
                    metadata["checkpoint"] = fingerprint(checkpoint)
                path = folder / self.filename
                exported = module.exported  # once: adapters are merged into a copy
                if isinstance(exported, HasFolder):  # before the file, by which a run is known to be finished
                    log.info("written for other libraries: %s", write_folder(exported, folder))
                save_network(exported, path, metadata, kind=plain_class(exported))
                log.info("model written to %s", path)


def write_folder(network: HasFolder, folder: Path) -> Path:
    """What a network writes beside its file, whole: what stops on its way leaves the folder before it as it was."""
    partial = folder / f"beside{PARTIAL}{uuid.uuid4().hex[:12]}"
    try:
        partial.mkdir(parents=True)
        made = network.write_beside(partial)
        place = folder / made.name
        mend(place)
        put_in_place(made, place)
        return place
    finally:
        remove(partial)


def _exporting(module: L.LightningModule) -> TrainingModule:
    if not isinstance(module, TrainingModule):
        raise ValueError(f"{type(module).__name__} has no network to be written: leave ExportModel out")
    return module
