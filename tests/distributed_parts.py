"""Training whose samples and noise depend on the step alone, so that any number of processes has one global batch."""

import os
import signal
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from mfm_lightning.callbacks import EMA
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.modules import MFMPretraining
from mfm_lightning.modules.execution import TrainingExecution
from mfm_lightning.objectives.objective import squared_error

GLOBAL_BATCH, SHAPE, CLASSES = 8, (1, 8, 8), 5


def global_batch(step: int):
    noise = torch.Generator().manual_seed(100 + step)
    return torch.randn(GLOBAL_BATCH, *SHAPE, generator=noise), torch.arange(GLOBAL_BATCH) % CLASSES


class StepData(ArrayDataModule):
    """Each rank's rows of the step's global batch; with accumulation, of the half that is due."""

    state_shape, num_classes = SHAPE, CLASSES

    def setup(self, stage=None):
        self.splits = {name: global_batch(-1) for name in ("train", "val", "test")}

    def train_batch(self, step):
        world, rank, parts = self.trainer.world_size, self.trainer.global_rank, self.trainer.accumulate_grad_batches
        rows = torch.arange(GLOBAL_BATCH).chunk(parts)[step % parts].chunk(world)[rank]
        x, label = global_batch(step // parts)
        return torch.cat([x[rows]]), label[rows]


class OddDigits(DigitsDataModule):
    """Two ranks cannot share its test images evenly."""

    def setup(self, stage=None):
        super().setup(stage)
        x, label = self.splits["test"]
        self.splits["test"] = x[:51], label[:51]


class StepPretraining(MFMPretraining):
    """The noise of each sample is that of its place in the global batch. "global_loss" is the loss of that batch."""

    def on_train_start(self):
        super().on_train_start()
        self.parts = []  # the losses of an accumulating step

    def losses(self, x1, conditions, training):
        step = self.global_step if training else -1
        everything, labels = global_batch(step)
        rows = torch.tensor([int((everything == x).flatten(1).all(1).nonzero()[0]) for x in x1.cpu()])
        with torch.random.fork_rng([]):
            torch.manual_seed(step % 1000)
            pair = self.objective.pairs.sample(everything, Conditions(label=labels), self.model.null_conditions)
            inner = pair.inner(*torch.rand(2, GLOBAL_BATCH).sort(dim=0).values)
        pair, inner, total = pair.take(rows), inner.take(rows), 0.0
        for term in self.objective.built_terms:
            total = (
                total + squared_error(self.objective.residual(term, self.model, self.teacher, pair, 0, inner)).mean()
            )
        if training:
            self.parts.append(total.detach())
            if len(self.parts) == self.trainer.accumulate_grad_batches:
                self.log("global_loss", torch.stack(self.parts).mean(), sync_dist=True)
                self.parts.clear()
        return {"loss": total}


class InterruptedPretraining(StepPretraining):
    """Ctrl-C on the last rank alone, within step 3."""

    def losses(self, x1, conditions, training):
        if training and self.global_step == 3 and not self.parts and self.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().losses(x1, conditions, training)


class CompiledPretraining(StepPretraining):
    """Sees to it that blocks are compiled where they are to be."""

    def __init__(self, *args: Any, execution: TrainingExecution | None = None, **kwargs: Any) -> None:
        super().__init__(*args, execution=execution, **kwargs)
        self.compiles = execution is not None and execution.compile

    def on_train_start(self):
        super().on_train_start()
        self.graphs = graphs_compiled()

    def on_train_end(self):
        assert (graphs_compiled() > self.graphs) == self.compiles


def graphs_compiled() -> int:
    """By this process, or the one that it was forked from."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class CheckedEMA(EMA):
    """Refuses to save sharded averages but by rank 0 alone, from its CPU's memory."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if any(isinstance(tensor, DTensor) for tensor in self.average.values()):
            writes = torch.distributed.get_rank() == 0
            assert state["average"].keys() == (self.average.keys() if writes else set())
            assert all(type(tensor) is torch.Tensor and tensor.is_cpu for tensor in state["average"].values())
        return state


class FailingPretraining(StepPretraining):
    """Fails on the last rank at step 2."""

    def losses(self, x1, conditions, training):
        if self.global_step == 2 and self.global_rank == self.trainer.world_size - 1:
            raise RuntimeError("this rank has died")
        return super().losses(x1, conditions, training)
