"""What the LightningModules have in common: exact resume, frozen parts by reference, checks with clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.modules.optimization import Optimization


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training stops before the step is taken."""


class TrainingModule(L.LightningModule):
    """Base class: trains the parameters that require a gradient, and stores nothing else.

    A subclass calls `check_data` in `setup`, sets `state_shape`, `num_classes` and `exported` (the network that is
    written to a file of its own), and names its frozen parts in `frozen`.

    Args:
        optimization: the optimiser and its learning rate.
        evaluation: what `validate` draws and `test` measures.
    """

    state_shape: tuple[int, ...]
    num_classes: int

    def __init__(self, optimization: Optimization | None = None, evaluation: Evaluation | None = None) -> None:
        super().__init__()
        self.optimization, self.evaluation = optimization or Optimization(), evaluation
        self._rng_state: dict[str, Tensor] | None = None

    @property
    def exported(self) -> nn.Module:
        """The trained network."""
        raise TypeError(f"{type(self).__name__} must say what it exports")

    @property
    def frozen(self) -> dict[str, Any]:
        """By name, the identity of each frozen part; a run cannot be resumed with another one."""
        return {}

    @property
    def folder(self) -> Path:
        """Where this run writes: the trainer's `default_root_dir`."""
        return Path(self.trainer.default_root_dir)

    def check_data(self) -> None:
        """Raise ValueError if the DataModule's states or classes are not the network's."""
        data = self.trainer.datamodule
        if data is not None and tuple(data.state_shape) != self.state_shape:
            raise ValueError(f"data of shape {tuple(data.state_shape)}, but the network takes {self.state_shape}")
        if data is not None and data.num_classes != self.num_classes:
            raise ValueError(f"data of {data.num_classes} classes, but the network has {self.num_classes}")

    def check_loss(self, losses: dict[str, Tensor], x1: Tensor) -> None:
        """Raise NonFiniteLossError, with step, term and statistics of the batch, unless `losses["loss"]` is finite."""
        if not torch.isfinite(losses["loss"]):
            raise NonFiniteLossError(_describe(self.global_step, losses, x1))

    def log_training(self, losses: dict[str, Tensor], *shown: str) -> None:
        """Log the loss, and on the steps that the loggers take the rest; `shown` are in the progress bar, too."""
        self.log("train/loss", losses["loss"], prog_bar=True)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            for name in (name for name in losses if name != "loss"):
                self.log(f"train/{name}", losses[name], prog_bar=name in shown)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check_batch(batch, self.state_shape, self.num_classes)
        return batch

    def on_train_start(self) -> None:
        if self._rng_state is not None:
            _set_rng_state(self._rng_state)
            self._rng_state = None

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optimization.configure([p for p in self.parameters() if p.requires_grad], self.trainer.max_steps)

    def on_validation_epoch_end(self) -> None:
        if self.evaluation is not None and not self.trainer.sanity_checking and self.trainer.is_global_zero:
            self.evaluation.draw(self, self.folder / "pictures" / f"step_{self.global_step:07d}")

    def on_test_epoch_end(self) -> None:
        if self.evaluation is not None and self.trainer.is_global_zero:
            with torch.inference_mode(False), torch.no_grad():  # steering takes gradients of its own
                self.evaluation.measure(self, self.folder / "test")
                self.evaluation.draw(self, self.folder / "test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = _get_rng_state()
        checkpoint["frozen"] = self.frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint.get("rng_state")
        saved, ours = checkpoint.get("frozen", {}), self.frozen
        for name in sorted(saved.keys() | ours.keys()):
            if saved.get(name) != ours.get(name):
                raise CheckpointError(
                    f"this run was trained with {name} {saved.get(name)}, the config has {ours.get(name)}"
                )


def check_batch(batch: Any, state_shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse a batch that the model cannot be trained on.

    Raises:
        ValueError: if it is not `(x1 (B, *state_shape) float, label (B,) integers in 0..num_classes)`.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"a batch must be (x1, label), got {type(batch).__name__}")
    x1, label = batch
    if tuple(x1.shape[1:]) != tuple(state_shape) or not x1.is_floating_point():
        raise ValueError(
            f"batch of {x1.dtype} {tuple(x1.shape)}: expected float (B, {', '.join(map(str, state_shape))})"
        )
    if label.shape != (len(x1),) or label.is_floating_point():
        raise ValueError(f"labels of {label.dtype} {tuple(label.shape)}: expected integers ({len(x1)},)")
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > num_classes:
        raise ValueError(f"labels in {low}..{high}, outside 0..{num_classes} ({num_classes} is the null label)")


def _describe(step: int, losses: dict[str, Tensor], x1: Tensor) -> str:
    terms = {k: v.item() for k, v in losses.items() if k != "loss" and not k.startswith("error/")}
    bad = [k for k, v in terms.items() if not torch.isfinite(torch.tensor(v))] or list(terms)
    x = x1.float()
    return (
        f"non-finite loss at step {step} in {', '.join(bad)} ({terms}); batch of {len(x)}: mean {x.mean():.4g}, "
        f"std {x.std():.4g}, min {x.min():.4g}, max {x.max():.4g}. The last checkpoint is intact."
    )


def _get_rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
