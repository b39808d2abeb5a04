"""Averages of two lengths, kept at regular steps, of which one of any length is made after training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.checkpoints.post_hoc_ema import Profile, snapshots_in, write_snapshot
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.networks.files import file_header
from mfm_lightning.training.logs import goes_on_in_its_folder
from mfm_lightning.training.sharding import plain_class, whole
from mfm_rewards.execution import DTYPES, Precision, check_precision

log = logging.getLogger(__name__)


class EMASnapshots(L.Callback):
    """Averages the trained weights by power-function profiles, and every so many steps writes each average to
    `FOLDER/STEP-WIDTH.safetensors` of the run: a network that `load_model` reads. `mfm average` puts the average of any
    length together from them (post-hoc EMA; Karras et al., arXiv 2312.02696, Section 3). The run's own average, which
    is evaluated and exported, stays that of `EMA`. The averages are float32, one copy of the trained weights each, in
    memory and in the run's checkpoint.

    Args:
        every: steps between snapshots; the paper's runs have some tens of them. The last step has one, too.
        sigma_rel: relative widths of the averages kept, at least two; see `post_hoc_ema.power`.
        folder: for the snapshots alone, in the trainer's `default_root_dir`.
        precision: of the files' weights, "fp32", "bf16" or "fp16". What is put together has their rounding.

    Raises:
        ValueError: for numbers out of range, fewer than two widths, or a folder that is none of its own. Before
            training: if the run's file is made of more than its weights, such as adapters merged into a copy, the scale
            of a VAE, or the classes of a classifier.
    """

    def __init__(
        self,
        every: int,
        sigma_rel: Sequence[float] = (0.05, 0.1),
        folder: str = "ema",
        precision: Precision = "fp32",
    ) -> None:
        if every < 1:
            raise ValueError(f"every {every} must be a number of steps")
        if len(set(sigma_rel)) < 2:
            raise ValueError(f"sigma_rel {list(sigma_rel)}: averages of two lengths at least are needed")
        if not Path(folder).name or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"folder {folder!r}: expected one for the snapshots alone, within that of the run")
        self.every, self.folder = every, folder
        self.precision: Precision = check_precision(precision)
        self.averages = {width: EMA(sigma_rel=width) for width in sorted(set(sigma_rel))}
        self.begin = 0  # the step after which averages begin
        self._resumed = self._cleared = False
        self._written = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, TrainingModule):
            raise ValueError(f"{type(pl_module).__name__} has no network to be written: leave EMASnapshots out")
        if pl_module.exported_part() is None:
            raise ValueError(
                "EMASnapshots: the file of this run is made of more than its weights (adapters merged into a copy, a "
                "VAE's scale, a classifier's classes), so that no average of it can be put together: leave it out"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._written = trainer.global_step
        if trainer.global_step and not self._resumed:
            self.begin = trainer.global_step
            log.warning(
                "the checkpoint has no averages of EMASnapshots: they begin at step %d, and widths are shares of the "
                "training since then", self.begin,
            )  # fmt: skip
        for average in self.averages.values():
            average.start_step = self.begin
            average.start(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._cleared and trainer.is_global_zero:  # not before all callbacks have agreed to the start
            self._clear(Path(trainer.default_root_dir) / self.folder, trainer)
        self._cleared = True

    def _clear(self, folder: Path, trainer: L.Trainer) -> None:
        """Remove snapshots that the run's own would not fit to: of a run before, or of steps that are trained anew."""
        own, there = goes_on_in_its_folder(trainer), snapshots_in(folder) if folder.is_dir() else {}
        stale = [
            path
            for profile, path in there.items()
            if not own or profile.last > trainer.global_step or profile.begin != self.begin
        ]
        for path in stale:
            path.unlink()
        if stale:
            log.info("%d snapshots in %s were of a run before this one, and are removed", len(stale), folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if all(average.num_updates >= step for average in self.averages.values()):  # no optimiser step
            return
        for average in self.averages.values():
            average.update(pl_module, step)
        if step % self.every == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._written:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)  # by `setup`
        step, folder = trainer.global_step, Path(trainer.default_root_dir) / self.folder
        first, prefix = trainer.is_global_zero, f"{pl_module.exported_part()}."
        with pl_module.whole_weights(to_write=True):
            exported = pl_module.exported
            state = exported.state_dict() if first else {}
            for width, average in self.averages.items():
                averaged = whole(average.average, keep=first, device="cpu")
                if not first:
                    continue
                header = {**file_header(exported, plain_class(exported)), **pl_module.file_metadata()}
                # the averages themselves: in the place of bfloat16 weights they would be rounded
                named = {name.removeprefix(prefix): tensor for name, tensor in averaged.items()}
                tensors = state | {name: tensor for name, tensor in named.items() if name in state}
                profile = Profile(step, width, self.begin)
                write_snapshot(folder, profile, tensors, header, DTYPES[self.precision])
        self._written = step

    def state_dict(self) -> dict[str, Any]:
        averages = {f"{width:g}": average.state_dict() for width, average in self.averages.items()}
        return {"begin": self.begin, "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there = state_dict["averages"]
        if absent := [width for width in self.averages if f"{width:g}" not in there]:
            raise ValueError(f"the checkpoint has averages of sigma_rel {', '.join(there)}, not {absent[0]:g}")
        self.begin, self._resumed = state_dict["begin"], True
        for width, average in self.averages.items():
            average.load_state_dict(there[f"{width:g}"])
