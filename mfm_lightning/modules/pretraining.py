"""Training of a Meta Flow Map: any network, any objective, an optional frozen teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.objectives import Objective
from mfm_lightning.teachers import Teacher

OPTIMIZERS = {"radam": torch.optim.RAdam, "adamw": torch.optim.AdamW}


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training stops before the step is taken."""


class MFMPretraining(L.LightningModule):
    """Trains `model = MetaFlowMap(network)` on an objective (Eq. 33). Defaults are the paper's (Table 5).

    Args:
        network: a network of `mfm_lightning.networks`.
        objective: the terms, and how their samples are drawn.
        teacher: frozen base drift for the distilled terms. It is in neither the checkpoint nor the optimiser: the
            checkpoint names it by its `identity`, and resuming with another one is refused.
        initial: a `model.safetensors` to start from; must have this network's architecture.
        optimizer: "radam" or "adamw".
        learning_rate, betas, weight_decay: of the optimiser.
        warmup_steps: linear warm-up of the learning rate.
        final_learning_rate: reached at the last step by a cosine; None: constant after the warm-up, as the paper.
        evaluation: what `validate` draws and `test` measures.

    Raises:
        ValueError: for an unknown optimiser, or a distilled term without a teacher, or a teacher of another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        teacher: Teacher | None = None,
        initial: str | None = None,
        optimizer: str = "radam",
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 2000,
        final_learning_rate: float | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"objective {objective.needs_teacher[0]!r} needs a teacher: set model.teacher")
        self.model = MetaFlowMap(network)
        if teacher is not None and tuple(teacher.state_shape) != self.model.state_shape:
            raise ValueError(
                f"the teacher's states have shape {tuple(teacher.state_shape)}, the network's {self.model.state_shape}"
            )
        if initial is not None:
            _initialise(self.model, initial)
        self.objective, self.teacher, self.evaluation = objective, teacher, evaluation
        self.optimizer_name, self.learning_rate = optimizer, learning_rate
        self.betas, self.weight_decay, self.warmup_steps = tuple(betas), weight_decay, warmup_steps
        self.final_learning_rate = learning_rate if final_learning_rate is None else final_learning_rate
        self._rng_state: dict[str, Tensor] | None = None

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is not None and tuple(data.state_shape) != self.model.state_shape:
            raise ValueError(f"data of shape {tuple(data.state_shape)}, but the network takes {self.model.state_shape}")
        if data is not None and data.num_classes != self.model.num_classes:
            raise ValueError(f"data of {data.num_classes} classes, but the network has {self.model.num_classes}")
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check_batch(batch, self.model.state_shape, self.model.num_classes)
        return batch

    def on_train_start(self) -> None:
        if self._rng_state is not None:
            _set_rng_state(self._rng_state)
            self._rng_state = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x1, label = batch
        losses = self.objective(self.model, self.teacher, x1, label, self.global_step)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise NonFiniteLossError(_describe(self.global_step, losses, x1))
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{k}": v for k, v in losses.items() if k != "loss"})
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[self.optimizer_name](
            trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        final, progress = self.final_learning_rate / self.learning_rate, min(1.0, step / max(1, self.trainer.max_steps))
        return warmup * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)

    # -- validation, test, predict -------------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_loss("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_loss("test", batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if self.evaluation is not None and not self.trainer.sanity_checking and self.trainer.is_global_zero:
            self.evaluation.draw(self, self.folder / "pictures" / f"step_{self.global_step:07d}")

    def on_test_epoch_end(self) -> None:
        if self.evaluation is not None and self.trainer.is_global_zero:
            self.evaluation.measure(self, self.folder / "test")
            self.evaluation.draw(self, self.folder / "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.evaluation is None:
            raise ValueError("predict needs model.evaluation, which says what to draw")
        self.evaluation.predict(self, batch, batch_idx, self.folder / "predict")

    @property
    def folder(self) -> Path:
        """Where this run writes: the trainer's `default_root_dir`."""
        return Path(self.trainer.default_root_dir)

    def _log_loss(self, stage: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        with torch.random.fork_rng():  # the same noise at each validation, and training's is not touched
            torch.manual_seed(batch_idx)
            losses = self.objective(self.model, self.teacher, *batch, self.global_step)
        self.log_dict({f"{stage}/{k}": v for k, v in losses.items()}, sync_dist=True, batch_size=len(batch[0]))

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = _get_rng_state()
        checkpoint["teacher"] = self.teacher.identity if self.teacher is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint.get("rng_state")
        saved, ours = checkpoint.get("teacher"), self.teacher.identity if self.teacher is not None else None
        if saved != ours:
            raise CheckpointError(f"this run was trained with teacher {saved}, the config has {ours}")


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


def _initialise(model: MetaFlowMap, path: str) -> None:
    start = load_model(path)
    ours, theirs = model.state_dict(), start.state_dict()
    different = [k for k in sorted(ours.keys() | theirs.keys()) if k not in ours or k not in theirs]
    different += [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape]
    if different:
        raise CheckpointError(f"{path} has another architecture than model.network: they differ in {different[0]}")
    model.load_state_dict(theirs)


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
