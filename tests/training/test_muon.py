"""Muon for matrices and AdamW for the rest, against each by itself."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mfm_lightning.training import muon
from mfm_lightning.training.muon import Float32Muon, MuonAdamW, orthogonalised


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def train(model: nn.Module, optimizers: list, steps: range, schedules: list | None = None) -> None:
    for k in steps:
        x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(k))
        model.zero_grad()
        (model(x) - x.mean(dim=(1, 2, 3))[:, None]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules or []:
            schedule.step()


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)


@pytest.fixture(params=[True, False], ids=["bf16", "float32"])
def in_bf16(request, monkeypatch):
    """Whether this CPU is one that multiplies bf16."""
    monkeypatch.setattr(muon, "cpu_multiplies_bf16", lambda: request.param)
    return request.param


def test_a_step_is_that_of_each_by_itself_and_the_schedule_is_for_both(in_bf16, monkeypatch):
    """To the bit in bfloat16. In float32 it is torch's with products in float32 in the place of its own."""
    if not in_bf16:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonalised)
    one, two = network(), network()
    ours = MuonAdamW(one.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    matrices = [p for p in two.parameters() if p.ndim == 2]
    rest = [p for p in two.parameters() if p.ndim != 2]
    theirs = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9)),
    ]
    assert (len(matrices), len(rest)) == (2, 6)
    train(one, [ours], range(4), [halving(ours)])
    train(two, theirs, range(4), [halving(t) for t in theirs])
    assert isinstance(ours.parts[0], Float32Muon) != in_bf16
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if in_bf16 else 1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (20, 5), (5, 20)])
def test_singular_values_go_near_one_and_vectors_stay(shape):
    """By the singular value decomposition in float64: x -> a x + b x^3 + c x^5 of the values, over their norm."""
    a, b, c = coefficients = (3.4445, -4.7750, 2.0315)
    torch.manual_seed(0)
    update = torch.randn(shape)
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert 0.5 < values.min() < values.max() < 1.3
    expected = left @ values.diag() @ right
    torch.testing.assert_close(orthogonalised(update, coefficients, 5, 1e-7).double(), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_one_machine_goes_on_at_the_other(monkeypatch):
    model = network()
    monkeypatch.setattr(muon, "cpu_multiplies_bf16", lambda: True)
    first = MuonAdamW(model.parameters(), lr=0.02)
    train(model, [first], range(3))
    monkeypatch.setattr(muon, "cpu_multiplies_bf16", lambda: False)
    second = MuonAdamW(model.parameters(), lr=0.5)
    second.load_state_dict(first.state_dict())
    assert isinstance(second.parts[0], Float32Muon)
    assert second.param_groups[0]["lr"] == 0.02
    for p in (p for p in model.parameters() if p.ndim == 2):
        assert torch.equal(second.state[p]["momentum_buffer"], first.state[p]["momentum_buffer"])
    train(model, [second], range(3, 5))


def test_a_checkpoint_goes_on_as_if_it_had_not_stopped(tmp_path, in_bf16):
    whole, part = network(), network()
    optimizer = MuonAdamW(whole.parameters(), lr=0.02)
    train(whole, [optimizer], range(6))
    first = MuonAdamW(part.parameters(), lr=0.02)
    train(part, [first], range(3))
    torch.save(first.state_dict(), tmp_path / "a.pt")
    again = MuonAdamW(part.parameters(), lr=0.02)
    again.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    train(part, [again], range(3, 6))
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_without_matrices_is_refused():
    with pytest.raises(ValueError, match=r"no parameter has two dimensions.*torch\.optim\.AdamW"):
        MuonAdamW(nn.Conv2d(1, 2, 3).parameters())


def test_sharded_matrices_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(DTensor.from_local(torch.zeros(4, 4), mesh))
        with pytest.raises(ValueError, match="muon needs whole matrices, and FSDP2 shards them"):
            MuonAdamW([sharded])
    finally:
        torch.distributed.destroy_process_group()
