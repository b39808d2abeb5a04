"""What the LightningModules have in common: exact resume, frozen parts by reference, checks with clear errors."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Batch, Conditions, unlabelled
from mfm_lightning.evaluation.base import Evaluation, datamodule_of
from mfm_lightning.modules.finite import require_finite_gradients, require_finite_losses
from mfm_lightning.modules.optimization import Optimization, OptimizerLRSchedulerConfig
from mfm_lightning.modules.predicting import PredictedSamples, begun, checkpoint_identity
from mfm_lightning.networks.decoders import LATENTS
from mfm_lightning.networks.files import file_header, weights_fingerprint
from mfm_lightning.networks.results import measured_on
from mfm_lightning.training.consolidation import NETWORK, said_of
from mfm_lightning.training.pictures import logged_pictures
from mfm_lightning.training.sharding import elsewhere, gathered, plain_class, shard, whole_parameters
from mfm_lightning.utils.distributed import gather_ranks, own

log = logging.getLogger(__name__)


class TrainingModule(L.LightningModule, ABC):
    """Base class: trains the parameters that require a gradient, and stores nothing else.

    A subclass sets `state_shape` and `num_classes`, and implements `losses`, `trained` (the module that is trained, and
    sharded under FSDP), `exported` (the network that is written to a file of its own, where it is another one),
    `frozen` (what a checkpoint names its frozen parts by), and `to_device` (which moves them).

    Resuming is exact: checkpoints are written between two optimiser steps (`LastCheckpoint`), with each rank's random
    state.

    Args:
        optimization: the optimiser and its learning rate.
        evaluation: what `validate` draws and `test` measures.
    """

    state_shape: tuple[int, ...]
    num_classes: int
    exported_kind = "meta_flow_map"
    measures_untrained = False  # whether `test` has something to measure where there are no trained weights
    measures_at_validation = False  # whether validation measures, too, or only draws

    def __init__(self, optimization: Optimization | None = None, evaluation: Evaluation | None = None) -> None:
        super().__init__()
        self.optimization, self.evaluation = optimization or Optimization(), evaluation
        self._resumed: list[dict[str, Tensor]] | None = None
        self._predicted: PredictedSamples | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer samples to predict than ranks
        self._without_labels = False  # data with labels for a network that has no classes

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, x1: Tensor, conditions: Conditions, training: bool) -> dict[str, Tensor]:
        """The loss under "loss", and what else is logged, of data `(B, *shape)` with their conditions."""

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The module that is trained, by calls of it."""

    @property
    def exported(self) -> nn.Module:
        """The trained network, where what is trained holds more."""
        return self.trained

    @property
    def frozen(self) -> dict[str, Any]:
        """By name, the identity of each frozen part; a run cannot be resumed with another one."""
        return {}

    def exported_part(self) -> str | None:
        """The name of the `exported` network among this module's parts, whose weights in a checkpoint are its file's;
        None where they are not, or the file says what is found out at the end of training."""
        exported = self.exported
        return next((name for name, part in self.named_modules() if part is exported), None)

    def file_metadata(self) -> dict[str, str]:
        """What the file of the network says besides its class and config, at any time: its kind, and how the data's
        latents become states, where the DataModule says so, for whoever decodes needs it."""
        latents = getattr(datamodule_of(self.trainer), LATENTS, None)
        return {"kind": self.exported_kind, **({LATENTS: json.dumps(latents)} if latents else {})}

    def exported_metadata(self) -> dict[str, str]:
        """What the file of the network says besides its class and config; called where it holds what is written."""
        return {}

    def to_device(self, device: torch.device) -> None:
        """Move the frozen parts, which are no part of this module."""

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where this run writes: the trainer's `default_root_dir`."""
        return Path(self.trainer.default_root_dir)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of the strategy FSDP
            shard(self.trained, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        # a DataModule that does not say them is found out by its first batch
        shape, classes = getattr(data, "state_shape", None), getattr(data, "num_classes", None)
        if shape is not None and tuple(shape) != self.state_shape:
            raise ValueError(f"data of shape {tuple(shape)}, but the network takes {self.state_shape}")
        self._without_labels = bool(classes) and not self.num_classes
        if self._without_labels:
            log.info("the network has no classes: the labels of the data (%d classes) are not given to it", classes)
        elif classes is not None and classes != self.num_classes:
            raise ValueError(f"data of {classes} classes, but the network has {self.num_classes}")
        if self.evaluation is not None:
            self.evaluation.check(self)
        if stage == "predict":
            self.prepare_predict()
        self.to_device(self.trainer.strategy.root_device)  # Lightning moves this module itself, but later

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self._without_labels:
            batch = unlabelled(batch)
        check_batch(batch, self.state_shape, self.num_classes)
        return batch

    def on_train_start(self) -> None:
        state = None if self._resumed is None else own(self._resumed)
        if state is not None:
            _set_rng_state(state)
        elif self.global_rank > 0 or self._resumed is not None:  # else all ranks would draw the same noise
            torch.manual_seed(torch.initial_seed() + 7919 * self.global_rank + self.global_step)
        if self._resumed is not None and state is None and self.trainer.is_global_zero:
            W, before = self.trainer.world_size, len(self._resumed)
            ranks = f"{W} rank{'s' * (W > 1)}, before with {before}"
            log.info("the run goes on with %s: noise is drawn anew from here", ranks)
        self._resumed = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x1, given = batch
        losses = self.losses(x1, Conditions.of_batch(given), training=True)
        require_finite_losses(self, losses, x1)
        self.log("train/loss", losses["loss"], prog_bar=True)
        logged = getattr(self.trainer, "log_every_n_steps", 1)  # Lightning does not declare it
        if (self.global_step + 1) % logged == 0:  # the steps that the loggers take
            for name in (name for name in losses if name != "loss"):
                self.log(f"train/{name}", losses[name], prog_bar=name in ("reward", "mse"))
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # a scaler of float16 gradients leaves out such steps by itself
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            require_finite_gradients(self)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [p for p in self.parameters() if p.requires_grad]
        # under mixed precision Lightning refuses to clip the gradients of a fused optimiser
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return self.optimization.configure(trained, self.trainer.max_steps, fused=not mixed)

    # -- validation, test ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_losses("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_losses("test", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._evaluate(self.folder / "pictures" / f"step_{self.global_step:07d}", self.measures_at_validation)

    def on_test_epoch_end(self) -> None:
        self._evaluate(self.folder / "test", measure=True)

    @property
    def in_step(self) -> bool:
        """Whether ranks compute all together what is drawn and measured, for none has room for all weights."""
        return self.device_mesh is not None and bool(elsewhere(self.trained))

    @contextmanager
    def whole_weights(self, to_write: bool = False) -> Iterator[None]:
        """Within the context rank 0 holds an unsharded copy of what is trained, so that it can compute alone; entered
        by all ranks. Where they compute `in_step` nothing changes; `to_write`, all hold what is trained whole."""
        if self.device_mesh is None or (self.in_step and not to_write):
            yield
            return
        if self.in_step:
            with whole_parameters(self.trained):
                yield
            return
        trained = self.trained
        name = next(name for name, module in self._modules.items() if module is trained)
        copy = gathered(trained, self.trainer.is_global_zero)
        try:
            if copy is not None:
                self._modules[name] = copy
            yield
        finally:
            self._modules[name] = trained

    def _evaluate(self, folder: Path, measure: bool) -> None:
        if self.evaluation is None:
            return
        with own_gradients(), self.whole_weights(), TemporaryDirectory() as unread:
            if measure:
                self.evaluation.prepare(self, folder)
            if not self.trainer.is_global_zero:
                if not self.in_step:
                    return
                folder = Path(unread)
            with logged_pictures(self.trainer, folder, "test" if self.trainer.testing else "val"):
                if measure:
                    whole = partial(self.whole_weights, to_write=True) if self.in_step else nullcontext
                    with measured_on(self.exported, folder, whole) if self.trainer.testing else nullcontext():
                        self.evaluation.measure(self, folder)
                self.evaluation.draw(self, folder)

    def _log_losses(self, stage: str, batch: Batch, batch_idx: int) -> None:
        # the same noise each time, and training's is not touched
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), own_gradients():
            torch.default_generator.manual_seed(batch_idx)
            if devices:
                torch.cuda.manual_seed(batch_idx)
            x1, given = pytree.tree_map_only(Tensor, Tensor.clone, tuple(batch))
            losses = self.losses(x1, Conditions.of_batch(given), training=False)
        self.log_dict({f"{stage}/{k}": v for k, v in losses.items()}, sync_dist=True, batch_size=len(batch[0]))

    # -- predict: sample by sample -------------------------------------------------------------------------------------

    def predicted_settings(self) -> dict[str, Any]:
        """What samples of `predict` depend on besides weights, frozen parts and data."""
        return {}

    def predicts(self) -> bool:
        """Whether `predict` makes samples, and writes them to `predicted`."""
        return False

    def prepare_predict(self) -> None:
        """Find out what is there; called by all ranks.

        Raises:
            ValueError: if the folder has samples of other weights, settings or data.
        """
        self._predicted = None
        if not self.predicts():
            return
        path = self.trainer.ckpt_path
        weights = None
        if self.trainer.is_global_zero:
            weights = weights_fingerprint(self.exported) if path is None else checkpoint_identity(path)
        settings = {"weights": gather_ranks(weights)[0], "frozen": self.frozen, **self.predicted_settings()}
        self._predicted = PredictedSamples(
            self.trainer, self.folder / "predict", settings, in_step=self.device_mesh is not None
        )

    @property
    def predicted(self) -> PredictedSamples:
        """What `predict` makes; from its setup on."""
        return begun(self._predicted)

    def share(self, number: int) -> list[int]:
        """This rank's samples, of so many, that `predict` has not made yet."""
        if self._predicted is None:
            return list(range(self.global_rank, number, self.trainer.world_size))
        return self.predicted.share(number)

    def teardown(self, stage: str) -> None:
        if stage == "predict" and self._predicted is not None and self._predicted.finish():
            log.info("samples: %s", self._predicted.folder.path)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = gather_ranks(_get_rng_state())
        if (prefix := self.exported_part()) is not None:
            network = self.get_submodule(prefix)
            header = {**file_header(network, plain_class(network)), **self.file_metadata()}
            checkpoint[NETWORK] = said_of(header, prefix)
        checkpoint["frozen"] = self.frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._resumed = checkpoint.get("rng_state")
        self._check_weights(checkpoint.get("state_dict", {}))
        saved, ours = checkpoint.get("frozen", {}), self.frozen
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                raise CheckpointError(
                    f"this run was trained with {name} {saved.get(name)}, the config has {ours.get(name)}"
                )

    def _check_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError, with the file, if the weights of a checkpoint are of another architecture."""
        ours = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()} if saved else {}
        known = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        needed = ours if self.strict_loading else {}
        different = [n for n in known.keys() | needed.keys() if ours.get(n) != known.get(n)]
        if not different:
            return
        name = min(different)
        shapes = [str(shapes.get(name, "is missing")) for shapes in (known, ours)]
        raise CheckpointError(
            f"{self.trainer.ckpt_path} is of another network than the config's: {len(different)} of its {len(known)} "
            f"tensors differ, first {name}: {shapes[0]} in the file, {shapes[1]} in the network"
        )


@contextmanager
def own_gradients() -> Iterator[None]:
    """No graph, but code within may take gradients of its own, which Lightning's inference mode rules out."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_batch(batch: Any, state_shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse a batch that the model cannot be trained on.

    Raises:
        ValueError: if it is not `(x1 (B, *state_shape) float, label (B,) integers in 0..num_classes)`, or a dictionary
            of conditions in place of the label.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch must be (x1, label) or (x1, {{conditions}}), got {type(batch).__name__}")
    x1, given = batch
    if tuple(x1.shape[1:]) != tuple(state_shape) or not x1.is_floating_point():
        raise ValueError(
            f"batch of {x1.dtype} {tuple(x1.shape)}: expected float (B, {', '.join(map(str, state_shape))})"
        )
    label = Conditions.of_batch(given, len(x1)).label
    if label is None or not len(label):
        return
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > num_classes:
        raise ValueError(f"labels in {low}..{high}, outside 0..{num_classes} ({num_classes} is the null label)")


def _get_rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
