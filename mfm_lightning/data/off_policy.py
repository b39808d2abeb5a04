"""Training states for fine-tuning: data, samples of the current policy, or a mix."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mfm_lightning.conditions import Conditions, unlabelled
from mfm_lightning.data.base import StepDataModule, generator, trainer_of
from mfm_lightning.data.stream import BatchStream
from mfm_lightning.utils.distributed import gather_ranks, own


class OffPolicyDataModule(L.LightningDataModule):
    """Batches of another DataModule, a share of each replaced by samples of the policy that is being trained.

    The objective holds at any state, so where its states come from is free: data are cheap, the policy's own samples
    are where it will be used. The samples are kept in a buffer (and in the checkpoint), renewed every so many steps.

    Args:
        data: the other DataModule.
        policy_share: share of a batch from the policy, in [0, 1]; 0: data alone.
        buffer_size: samples in the buffer of each device.
        refresh_every: optimiser steps between two renewals.
        ode_steps: Euler steps of the policy's samples.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        data: StepDataModule,
        policy_share: float = 0.5,
        buffer_size: int = 1024,
        refresh_every: int = 250,
        ode_steps: int = 25,
    ) -> None:
        super().__init__()
        if not 0 <= policy_share <= 1 or min(buffer_size, refresh_every, ode_steps) < 1:
            raise ValueError(
                f"policy_share {policy_share} must be in [0, 1], buffer_size {buffer_size}, refresh_every "
                f"{refresh_every} and ode_steps {ode_steps} at least 1"
            )
        self.data, self.policy_share, self.buffer_size = data, policy_share, buffer_size
        self.refresh_every, self.ode_steps = refresh_every, ode_steps
        self._buffer: tuple[Tensor, Conditions] | None = None

    def __getattr__(self, name: str) -> Any:
        """Splits, decoding, captions and an oracle are the other DataModule's."""
        if name in ("splits", "decode", "oracle", "origin", "captions", "embedded"):
            return getattr(self.data, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The other DataModule's, which may know it from its setup on."""
        return tuple(self.data.state_shape)

    @property
    def num_classes(self) -> int:
        """The other DataModule's."""
        return self.data.num_classes

    @property
    def latents(self) -> dict[str, Any]:
        """How the data's latents become states, where they say so."""
        return getattr(self.data, "latents", {})

    def setup(self, stage: str | None = None) -> None:
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

    def train_dataloader(self) -> BatchStream:
        stream = self.data.train_dataloader()
        return BatchStream(self.train_batch, stream.length, stream.start, stream.where)

    def train_batch(self, step: int) -> tuple[Tensor, Any]:
        """The training batch of a step; renews the buffer where it is due."""
        x, given = self._data_batch(step)
        k = round(self.policy_share * len(x))
        if not k:
            return x, given
        seed = self.data.rank_seed() * 1_000_003 + step
        refresh_every = self.refresh_every * trainer_of(self).accumulate_grad_batches
        buffer = self._buffer
        if buffer is None or step % refresh_every == 0:
            self._buffer = buffer = self._sample(step, generator(seed))
        pick = torch.randint(self.buffer_size, (k,), generator=generator(seed + 1))
        samples, made_for = buffer
        others = Conditions.of_batch(given).expand(len(x)).take(slice(k, None)).expand(len(x) - k)
        mixed = made_for.take(pick).expand(k).cat(others)
        return torch.cat([samples[pick], x[k:]]), mixed.as_batch()

    def val_dataloader(self) -> DataLoader | list:
        return self.data.val_dataloader()

    def test_dataloader(self) -> DataLoader | list:
        return self.data.test_dataloader()

    def predict_dataloader(self) -> DataLoader | list:
        return self.data.predict_dataloader()

    @property
    def samples_identity(self) -> dict[str, Any] | None:
        """The other DataModule's, where it says it."""
        return getattr(self.data, "samples_identity", None)

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """The other DataModule's, where it says it."""
        return getattr(self.data, "fingerprint", None)

    def state_dict(self) -> dict[str, Any]:
        # the order of `train_batch`, which this process reads, does not depend on workers
        data = {key: value for key, value in self.data.state_dict().items() if key != "num_workers"}
        buffer = self._buffer and (self._buffer[0], self._buffer[1].as_batch())  # plain tensors, for the checkpoint
        return {"buffers": gather_ranks(buffer), "data": data}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        buffer = own(state_dict["buffers"])
        self._buffer = buffer and (buffer[0], Conditions.of_batch(buffer[1]))
        self.data.load_state_dict(state_dict.get("data", {}))  # older checkpoints have none

    def _data_batch(self, step: int) -> tuple[Tensor, Any]:
        """The other DataModule's, without labels where the policy has no classes."""
        batch = self.data.train_batch(step)
        module = getattr(getattr(self, "trainer", None), "lightning_module", None)
        classes = getattr(module, "num_classes", None)
        return unlabelled(batch) if classes == 0 and self.num_classes else batch

    def _sample(self, step: int, noise: torch.Generator) -> tuple[Tensor, Conditions]:
        module = trainer_of(self).lightning_module
        sample_policy = getattr(module, "sample_policy", None)
        if sample_policy is None:
            raise ValueError(f"{type(module).__name__} has no policy to sample: set policy_share to 0")
        given, num = Conditions(), 0
        while num < self.buffer_size:  # classes as frequent as in the data's batches
            x, more = self._data_batch(step)
            more = Conditions.of_batch(more).expand(len(x))
            given, num, step = given.cat(more) if num else more, num + len(x), step + 1
        given = given.take(slice(self.buffer_size)).expand(self.buffer_size)
        x0 = torch.randn(self.buffer_size, *self.state_shape, generator=noise)
        samples = [  # in batches of the size that training takes
            sample_policy(x0[rows].to(module.device), given.take(rows).to(module.device), self.ode_steps)
            for rows in torch.arange(self.buffer_size).split(self.data.batch_size)
        ]
        return torch.cat([x.float().cpu() for x in samples]), given
