"""Batches of data and of the policy's own samples, whatever their conditions."""

from types import SimpleNamespace

import pytest
import torch

from mfm_lightning.conditions import Conditions
from mfm_lightning.data import OffPolicyDataModule
from mfm_lightning.data.base import StepDataModule


class Steps(StepDataModule):
    """States that say their step and row, and conditions made of them."""

    state_shape, num_classes = (2,), 5

    def __init__(self, batch_size, given):
        super().__init__(batch_size)
        self.given = given

    def train_batch(self, step):
        rows = torch.arange(self.batch_size)
        return torch.stack([torch.full_like(rows, step), rows], dim=1).float(), self.given(step, rows)


def labels(step, rows):
    return (rows + step) % 5


def captions(step, rows):
    return {"text": (rows + step)[:, None, None].float(), "prompts": [f"{step} {row}" for row in rows.tolist()]}


def nothing(step, rows):
    return {}


@pytest.mark.parametrize("given", [labels, captions, nothing])
@pytest.mark.parametrize(
    ("batch", "share", "buffer"), [(4, 0.5, 6), (4, 0.5, 1), (1, 1.0, 3), (4, 1.0, 9), (3, 0.3, 2)]
)
def test_each_state_keeps_its_conditions(given, batch, share, buffer):
    """The policy's samples here are 100 plus what they were made for, so that a mixed-up row is seen."""
    made = []

    def sample_policy(x0, conditions, steps):
        made.append(len(x0))
        conditions = conditions.expand(len(x0))
        value = {labels: conditions.label, captions: conditions.text, nothing: torch.zeros(len(x0))}[given]
        return 100 + value.float().reshape(-1, 1).expand(-1, 2)

    data = OffPolicyDataModule(Steps(batch, given), share, buffer, refresh_every=2, ode_steps=1)
    module = SimpleNamespace(sample_policy=sample_policy, device=torch.device("cpu"))
    data.trainer = SimpleNamespace(lightning_module=module, accumulate_grad_batches=1)
    for step in range(3):
        x, conditions = data.train_batch(step)
        conditions = Conditions.of_batch(conditions, None if given is nothing else batch)
        own = x[:, 0] >= 100
        assert len(x) == batch
        assert own.sum() == round(share * batch)
        told = {labels: conditions.label, captions: conditions.text, nothing: torch.zeros(batch)}[given].reshape(-1)
        assert torch.equal(x[own, 0] - 100, told[own].float())
        if given is labels:
            assert torch.equal((x[~own].sum(dim=1).long()) % 5, conditions.label[~own])
        if given is captions:
            assert [conditions.prompts[i] for i in (~own).nonzero().flatten()] == [
                f"{int(a)} {int(b)}" for a, b in x[~own].tolist()
            ]
    assert sum(made) == 2 * buffer  # renewed at steps 0 and 2


def test_a_policy_without_classes_gets_no_labels():
    given = []

    def sample_policy(x0, conditions, steps):
        given.append(conditions.label)
        return x0

    data = OffPolicyDataModule(Steps(4, labels), 0.5, 6, ode_steps=1)
    module = SimpleNamespace(sample_policy=sample_policy, device=torch.device("cpu"), num_classes=0)
    data.trainer = SimpleNamespace(lightning_module=module, accumulate_grad_batches=1)
    assert data.train_batch(0)[1] == {}
    assert set(given) == {None}
