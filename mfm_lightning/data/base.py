"""What every DataModule here has."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from mfm_lightning.conditions import INDEX, Batch
from mfm_lightning.data.class_folders import shortened
from mfm_lightning.data.stream import BatchStream, StepLoader
from mfm_lightning.utils.digests import digest, digest_of
from mfm_lightning.utils.distributed import is_first_rank

log = logging.getLogger(__name__)


class StepDataModule(L.LightningDataModule, ABC):
    """Training is counted in steps; batches are `(x1 (B, *shape), label (B,))`, or `(x1, {...})` with other conditions.

    A subclass says `state_shape` and `num_classes`, and implements `train_batch(step)`, which must depend on the step,
    the seed and the rank alone.

    Args:
        batch_size: training batch on each device.
        seed: of order and draws.
    """

    _alone = False

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.batch_size, self.seed = batch_size, seed

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Of one state."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels; `num_classes` is the null label."""

    @abstractmethod
    def train_batch(self, step: int) -> Batch:
        """The training batch of a step."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data; all of it where `stage` is None, else what Lightning's stage needs."""

    def steps(self) -> tuple[int, int]:
        """The first batch of this run, above 0 where it is resumed, and the number of batches in all."""
        trainer = trainer_of(self)
        if trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must be set: training here is counted in steps, not epochs")
        return self.position(), trainer.max_steps * trainer.accumulate_grad_batches

    def position(self) -> int:
        """The batch that the trainer takes next: what it has trained on so far, epoch after epoch; with
        `trainer.overfit_batches` the same few again in each epoch."""
        trainer: Any = trainer_of(self)  # Lightning does not declare what its loops count
        if not hasattr(trainer, "fit_loop"):  # one that counts steps alone
            return trainer.global_step * trainer.accumulate_grad_batches
        progress, few = trainer.fit_loop.epoch_loop.batch_progress, trainer.overfit_batches
        if not few:
            return progress.total.processed
        length = trainer.max_steps * trainer.accumulate_grad_batches
        few = few if isinstance(few, int) else max(1, int(few * length))
        return progress.current.processed % min(few, length)

    def train_dataloader(self) -> StepLoader:
        start, length = self.steps()
        return BatchStream(self.train_batch, length, start, self.position)

    def origin(self, step: int) -> str:
        """Where the training batch of a step is from, for an error; nothing where that is not known."""
        return ""

    def decode(self, x: Tensor) -> Tensor:
        """Model states to what one looks at (images in [0, 1])."""
        return x

    def label_counts(self) -> dict[str, np.ndarray]:
        """Samples of each label `(num_classes,)` by the name of a split; nothing where that is not known."""
        return {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells the data from others in a run's hyperparameters, by split: numbers of samples, and digests of what
        can be told without reading all of a large set. Asked for after `setup`; here the labels' numbers."""
        counts = {name: count.tolist() for name, count in self.label_counts().items()}
        return {name: {"samples": sum(count), "labels": digest_of(count)} for name, count in counts.items()}

    @property
    def trains(self) -> bool:
        """Whether the trainer fits, or there is none; else it evaluates or predicts."""
        state = getattr(self.trainer, "state", None)
        return state is None or state.fn == TrainerFn.FITTING

    def rank(self) -> tuple[int, int]:
        """This process's rank, and how many there are; without a trainer it is alone."""
        if self.trainer is None or self._alone:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context this process has all samples, as if it were the only one."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def rank_seed(self) -> int:
        """A seed of this rank's own."""
        return self.seed + 7919 * self.rank()[0]


class ArrayDataModule(StepDataModule):
    """Data that fits in memory.

    A subclass sets `splits`, a dictionary of `(x, label)` by "train", "val" and "test", in `setup`.
    """

    splits: dict[str, tuple[Tensor, Tensor]]

    def label_counts(self) -> dict[str, np.ndarray]:
        return {name: counted(label.numpy(), self.num_classes) for name, (_, label) in self.splits.items()}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The number of samples and the SHA-256 of each split."""
        return {name: {"samples": len(x), "sha256": digest(x, label)} for name, (x, label) in self.splits.items()}

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    @property
    def samples_identity(self) -> dict[str, str]:
        """What tells the samples of `mfm predict` from others: the SHA-256 of the test split."""
        return {"test": digest(*self.splits["test"])}

    def predict_dataloader(self) -> DataLoader:
        x, label = self.splits["test"]
        samples = NumberedSamples(len(x), lambda i: (x[i], label[i]))
        return DataLoader(samples, batch_size=self.batch_size, sampler=share_of(self, samples))

    def _loader(self, split: str) -> DataLoader:
        return DataLoader(TensorDataset(*self.splits[split]), batch_size=self.batch_size)


class NumberedSamples(Dataset):
    """Samples with their index, for `mfm predict`: a batch is `(x (B, *shape), {label (B,), index (B,)})`, so that what
    is drawn for a sample can depend on its index, and not on its batch. `share_of` is the sampler that goes with them.

    Args:
        num: how many.
        sample: x of a sample, and its label or a dictionary of its conditions.
    """

    def __init__(self, num: int, sample: Callable[[int], tuple[Tensor, Any]]) -> None:
        self.num, self.sample = num, sample

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Any]]:
        x, given = self.sample(i)
        return x, {**(given if isinstance(given, Mapping) else {"label": given}), INDEX: i}


class Share(DistributedSampler):
    """The samples of one rank by their index, in order; Lightning deals out again what has no sampler of that kind."""

    def __init__(self, samples: Dataset, indices: Sequence[int]) -> None:
        super().__init__(samples, num_replicas=1, rank=0, shuffle=False)
        self.indices = list(indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def share_of(data: L.LightningDataModule, samples: NumberedSamples) -> Share | None:
    """Which of its samples a rank of `mfm predict` makes: what the module says (`share`), which knows what is there
    already; None, all of them in turn, of a module that does not, or without a trainer."""
    module: Any = None if data.trainer is None else data.trainer.lightning_module
    share = getattr(module, "share", None)
    return None if share is None else Share(samples, share(len(samples)))


def trainer_of(data: L.LightningDataModule) -> L.Trainer:
    """The trainer that runs a DataModule.

    Raises:
        RuntimeError: if there is none yet.
    """
    if data.trainer is None:
        raise RuntimeError(f"{type(data).__name__} has no trainer yet: give it to one, whose steps it counts")
    return data.trainer


IDENTITY = ("class_names", "contents", "rows")  # of a DataModule's state: which data; the rest is of their order


def say_changed_order(
    saved: Mapping[str, Any], ours: Mapping[str, Any], one_line: bool = False, drawn: str | None = None
) -> None:
    """Warn where a resumed run has another order of batches.

    Args:
        saved: state of the DataModule in the run before. Older runs say less.
        ours: its state in this run; `IDENTITY` is passed over.
        one_line: all ranks take their batches from one line in turn (`batch_order`), so that ranks and batch size may
            change where their product stays: each step has the same samples.
        drawn: what is drawn for each sample by rank, such as "mirrored", and is another draw then.
    """
    ours = {key: value for key, value in ours.items() if key not in IDENTITY}
    split = {key: saved[key] for key in ("world_size", "batch_size") if key in saved}
    if one_line and len(split) == 2 and split != {key: ours[key] for key in split}:
        W, B = ours["world_size"], ours["batch_size"]
        if (together := split["world_size"] * split["batch_size"]) == W * B:
            more = f"; which of them are {drawn} is another draw" if drawn else ""
            log.log(
                logging.WARNING if drawn else logging.INFO,
                "the order of batches goes on exactly: %d samples a step, "
                "by %d ranks with %d each, before by %d with %d%s", together, W, B, *split.values(), more,
            )  # fmt: skip
            ours = {key: value for key, value in ours.items() if key not in split}
    changed = [f"{key} {saved[key]} to {value}" for key, value in ours.items() if saved.get(key, value) != value]
    if changed:
        log.warning("the order of batches is another one than before, for it went from %s", ", ".join(changed))


def check_same_data(saved: Mapping[str, Any], ours: Mapping[str, Any], trains: bool = True) -> None:
    """Where a run goes on: refuse labels that mean other classes, warn of other names and of replaced samples.

    Args:
        saved: state of the DataModule in the run before, of which `class_names`, `contents` (what tells the training
            files) and `rows` (which are held out) are compared; older runs do not say all of them.
        ours: its state in this run.
        trains: it is trained on; else what was refused is a warning, and other samples are nothing to speak of.

    Raises:
        ValueError: where a class has another label than before.
    """
    say = log.warning if is_first_rank() else log.debug
    before, now = (list(each.get("class_names") or []) for each in (saved, ours))
    if before and now and before != now:
        moved = next((name for i, name in enumerate(before) if name in now and now.index(name) != i), None)
        if moved is not None:
            what = f"{moved!r} had the label {before.index(moved)}, and has {now.index(moved)} now"
            if trains:
                raise ValueError(f"the run before had other classes: {what}; give the same ones, or begin a new run")
            say("the model was trained on other classes: %s", what)
        else:
            old, new = (" ".join(shortened(names)) for names in (before, now))
            say("classes have other names than in the run before: %s, before %s", new, old)
    if not trains:  # to evaluate on other data is nothing to be warned of
        return
    known = {key for key in ("contents", "rows") if None not in (saved.get(key), ours.get(key))}
    if "contents" in known and saved["contents"] != ours["contents"]:
        say(
            "the training files are not as in the run before: some were added, removed or replaced, or all copied "
            "(sizes, times or captions differ)"
        )
    elif "rows" in known and saved["rows"] != ours["rows"]:
        say("other samples are held out than in the run before, which trained on some of them")


def counted(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each label is there, `(num_classes,)`."""
    return np.bincount(labels, minlength=num_classes)[:num_classes]


def generator(seed: int) -> torch.Generator:
    """A CPU generator with that seed."""
    return torch.Generator().manual_seed(seed)
