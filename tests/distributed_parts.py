"""Training whose samples and noise depend on the step alone, so that any number of processes has one global batch."""

import torch

from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.modules import MFMPretraining
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


class StepPretraining(MFMPretraining):
    """The noise of each sample is that of its place in the global batch."""

    def losses(self, x1, label, training):
        everything, labels = global_batch(self.global_step)
        rows = torch.tensor([int((everything == x).flatten(1).all(1).nonzero()[0]) for x in x1.cpu()])
        with torch.random.fork_rng([]):
            torch.manual_seed(self.global_step)
            pair = self.objective.pairs.sample(everything, labels, self.num_classes)
            inner = pair.inner(*torch.rand(2, GLOBAL_BATCH).sort(dim=0).values)
        pair, inner, total = pair.take(rows), inner.take(rows), 0.0
        for term in self.objective.built_terms:
            total = (
                total + squared_error(self.objective.residual(term, self.model, self.teacher, pair, 0, inner)).mean()
            )
        if training:
            self.log("global_loss", total, sync_dist=True)
        return {"loss": total}


class FailingPretraining(StepPretraining):
    """Fails on the last rank at step 2."""

    def losses(self, x1, label, training):
        if self.global_step == 2 and self.global_rank == self.trainer.world_size - 1:
            raise RuntimeError("this rank has died")
        return super().losses(x1, label, training)
