"""What a trained model is measured on and what is drawn from it; a config names one."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from mfm_lightning.alignment.target import Flow, LoadedTarget
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap

log = logging.getLogger(__name__)


class EvaluatedModule(Protocol):
    """What every evaluation may use of a LightningModule. Those of one kind of training use more, as they say."""

    @property
    def device(self) -> torch.device: ...

    @property
    def trainer(self) -> L.Trainer: ...

    @property
    def global_step(self) -> int: ...

    @property
    def folder(self) -> Path: ...

    state_shape: tuple[int, ...]
    num_classes: int

    def log(self, name: str, value: float, *, rank_zero_only: bool = False) -> None: ...

    def log_dict(self, dictionary: dict[str, float], *, rank_zero_only: bool = False) -> None: ...


class ModelModule(EvaluatedModule, Protocol):
    """With a Meta Flow Map, and the teacher that it was distilled from."""

    model: MetaFlowMap

    @property
    def teacher(self) -> Flow | None: ...


class TargetModule(EvaluatedModule, Protocol):
    """With a model and a reward."""

    target: LoadedTarget


class PolicyModule(TargetModule, Protocol):
    """With a policy that started as a copy of its base flow."""

    policy: MetaFlowMap

    @property
    def base(self) -> MetaFlowMap: ...

    def sample_base(self, noise: Tensor, conditions: Conditions | None, steps: int) -> Tensor: ...

    def sample_policy(self, noise: Tensor, conditions: Conditions | None, steps: int) -> Tensor: ...


class ArrayData(Protocol):
    """A DataModule whose data fit in memory: `(x, label)` by "train", "val" and "test"."""

    splits: dict[str, tuple[Tensor, Tensor]]

    @property
    def num_classes(self) -> int: ...

    def decode(self, x: Tensor) -> Tensor: ...


Module = TypeVar("Module", bound=EvaluatedModule, contravariant=True)


class Evaluation(ABC, Generic[Module]):
    """Base class. Methods take the LightningModule, and a folder to write to; `Module` says what they use of it.

    Attributes:
        needs_data: attributes that the run's DataModule must have, keys of `DATA`.
    """

    needs_data: tuple[str, ...] = ()

    def check(self, module: Module) -> None:
        """Raise ValueError, before any work, if the module's target or data cannot be evaluated so."""
        if self.needs_data:
            data_of(module, *self.needs_data, by=type(self).__name__)

    @abstractmethod
    def draw(self, module: Module, folder: Path) -> None:
        """Write pictures."""

    def prepare(self, module: Module, folder: Path) -> None:
        """What ranks share of the work of `measure`, which rank 0 does alone after it; called by all of them."""

    @abstractmethod
    def measure(self, module: Module, folder: Path) -> None:
        """Log metrics, print and write the tables."""

    def predict(self, module: Module, batch: Any) -> dict[str, Tensor]:
        """Samples and posterior draws for a batch, by name, each `(B, ...)`: what `mfm predict` writes.

        Args:
            batch: `(x1, {...})` with the samples' `index` among the conditions, by which they have noise of their own.
        """
        raise ValueError(f"{type(self).__name__} says nothing to predict (its method predict)")


def datamodule_of(trainer: L.Trainer) -> Any:
    """The DataModule of a run; None where there is none. (Lightning does not declare it.)"""
    return getattr(trainer, "datamodule", None)


@contextmanager
def all_test_batches(data: Any) -> Iterator[Iterable[Any]]:
    """Within the context, batches of all test samples of a run's DataModule, also where it deals them out to several
    processes; none where it has no `test_dataloader`."""
    if not is_overridden("test_dataloader", data):
        yield []
        return
    data.setup("test")

    def batches() -> Iterable[Any]:
        found = data.test_dataloader()
        return chain(*found) if isinstance(found, list | tuple) else found

    if hasattr(data, "alone"):
        with data.alone():
            yield batches()
        return
    if (processes := data.trainer.world_size) > 1:
        log.warning(
            "counted are the test samples that %s.test_dataloader gives to the first of %d processes: some are left "
            "out if it deals them out by itself", type(data).__name__, processes,
        )  # fmt: skip
    yield batches()


DATA = {  # what an evaluation may need of a DataModule, besides batches
    "splits": 'splits: data that fit in memory, {"train": (x, label), "val": ..., "test": ...}',
    "decode": "decode(x): images in [0, 1] of states",
    "num_classes": "num_classes: the number of labels",
    "oracle": "oracle: the exact distribution, such as mfm_lightning.GaussianMixture",
}


def data_of(module: EvaluatedModule, *needed: str, by: str = "this evaluation") -> Any:
    """The DataModule that an evaluation needs.

    Args:
        needed: attributes of it, keys of `DATA`.
        by: who needs them.

    Raises:
        ValueError: if the run has none, or one without them.
    """
    data = datamodule_of(module.trainer)
    if data is None:
        raise ValueError(f"{by} needs the run's DataModule: give the trainer one, not only data loaders")
    if missing := [name for name in needed if getattr(data, name, None) is None]:
        raise ValueError(
            f"{by} needs of {type(data).__name__} also {'; '.join(DATA[name] for name in missing)}. Give it that, or "
            "leave model.evaluation out: losses are logged without it"
        )
    return data
