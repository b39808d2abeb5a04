"""Averages of two lengths, kept at regular steps, of which one of any length is made after training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from mfm_lightning.callbacks.ema import EMA
from mfm_lightning.checkpoints.post_hoc_ema import SIGMA_REL
from mfm_lightning.modules.base import TrainingModule
from mfm_lightning.networks.files import save_network
from mfm_lightning.training.logs import goes_on_in_its_folder
from mfm_lightning.training.sharding import plain_class
from mfm_rewards.execution import DTYPES, Precision, check_precision

log = logging.getLogger(__name__)


class EMASnapshots(L.Callback):
    """Averages the trained weights by power-function profiles, and every so many steps writes each average to
    `FOLDER/STEP-WIDTH.safetensors` of the run: a network that `load_model` reads. `mfm average` puts the average of any
    length together from them (post-hoc EMA; Karras et al., arXiv 2312.02696, Section 3). The run's own average, which
    is evaluated and exported, stays that of `EMA`.

    Args:
        every: steps between snapshots; the paper's runs have some tens of them. The last step has one, too.
        sigma_rel: relative widths of the averages kept, at least two; see `post_hoc_ema.power`.
        folder: in the trainer's `default_root_dir`.
        precision: of the files' weights, "fp32", "bf16" or "fp16".

    Raises:
        ValueError: for numbers out of range, or fewer than two widths. Before training: if what is written is no part
            of the module, such as adapters merged into a copy: sums of merged weights are not merged sums.
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
        self.every, self.folder = every, folder
        self.precision: Precision = check_precision(precision)
        self.averages = {width: EMA(sigma_rel=width) for width in sorted(set(sigma_rel))}
        self._written = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, TrainingModule):
            raise ValueError(f"{type(pl_module).__name__} has no network to be written: leave EMASnapshots out")
        exported = pl_module.exported
        if not any(part is exported for part in pl_module.modules()):
            raise ValueError(
                "EMASnapshots: what this run writes is made of more than its weights (adapters merged into a copy), of "
                "which no average can be put together: leave the callback out, or train all weights"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for average in self.averages.values():
            average.start(pl_module)
        self._written = trainer.global_step
        own, folder = goes_on_in_its_folder(trainer), Path(trainer.default_root_dir) / self.folder
        # what is trained anew from here would not fit to them
        stale = [path for path in folder.glob("*.safetensors") if not own or _step(path) > trainer.global_step]
        if stale and trainer.is_global_zero:
            for path in stale:
                path.unlink()
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
        dtype = None if self.precision == "fp32" else DTYPES[self.precision]
        for width, average in self.averages.items():
            with average.applied(pl_module), pl_module.whole_weights(to_write=True):
                if trainer.is_global_zero:
                    exported = pl_module.exported
                    said = {**pl_module.file_metadata(), "step": str(step), SIGMA_REL: f"{width:g}"}
                    path = folder / f"{step:08d}-{width:g}.safetensors"
                    save_network(exported, path, said, dtype, plain_class(exported))
        self._written = step

    def state_dict(self) -> dict[str, Any]:
        return {f"{width:g}": average.state_dict() for width, average in self.averages.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for width, average in self.averages.items():
            if f"{width:g}" not in state_dict:
                raise ValueError(f"the checkpoint has averages of sigma_rel {', '.join(state_dict)}, not {width:g}")
            average.load_state_dict(state_dict[f"{width:g}"])


def _step(path: Path) -> int:
    return int(path.name.partition("-")[0]) if path.name.partition("-")[0].isdigit() else 0
