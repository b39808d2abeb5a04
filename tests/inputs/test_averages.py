"""Running means are float32, whatever the type of the weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mfm_lightning.callbacks import EMA
from mfm_lightning.modules.normaliser import LogNormaliser
from tests.inputs.tiny_runs import fit, job, last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("decay", [0.99, 0.9999])
def test_an_average_of_half_precision_weights_moves(dtype, decay):
    """Against the same recursion in float64."""
    module = nn.Linear(4, 4).to(dtype)
    ema = EMA(decay)
    ema.start(module)
    expected = module.weight.detach().double()
    for step in range(1, 400):
        with torch.no_grad():
            module.weight += 2**-6
        ema.update(module, step)
        share = 1 - min(decay, (1 + step) / (10 + step))
        expected += share * (module.weight.detach().double() - expected)
    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"].double(), expected, rtol=1e-5, atol=1e-5)
    # saved and restored so
    other = EMA(decay)
    other.load_state_dict(ema.state_dict())
    other.start(module)
    assert torch.equal(other.average["weight"], ema.average["weight"])


def test_a_double_stays_a_double():
    module = nn.Linear(2, 2).double()
    ema = EMA()
    ema.start(module)
    assert ema.average["weight"].dtype == torch.float64


def test_a_run_in_bf16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slow = ["--trainer.precision=bf16-true", "--ema.decay=0.999"]
    fit("run", 4, *slow)
    first = last("run")["callbacks"]["EMA"]["average"]
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert {tensor.dtype for tensor in last("run")["state_dict"].values()} == {torch.bfloat16}
    fit("run", 8, *slow, "--ckpt_path=last")
    second = last("run")["callbacks"]["EMA"]["average"]
    assert all(not torch.equal(first[name], second[name]) for name in first if "final" in name)
    exported = load_file("run/model.safetensors")
    for name, tensor in exported.items():
        kept = second.get(f"model.network.{name}")
        if kept is not None:
            assert torch.equal(tensor, kept.to(tensor.dtype))


def test_a_checkpoint_of_before_has_a_bf16_average():
    module = nn.Linear(2, 2).bfloat16()
    ema = EMA()
    ema.load_state_dict({"average": {n: p.detach().clone() for n, p in module.named_parameters()}, "num_updates": 3})
    ema.start(module)
    assert ema.average["bias"].dtype == torch.float32


@pytest.mark.parametrize("rate", [0.02, 0.002])
def test_the_normaliser_of_a_bf16_module(rate):
    plain, half = LogNormaliser(2, rate), nn.ModuleDict({"n": LogNormaliser(2, rate)}).to(torch.bfloat16)["n"]
    assert {b.dtype for b in half.buffers()} == {torch.float32, torch.int64}
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        rewards, label = torch.randn(8, generator=generator) + step / 100, torch.arange(8) % 3
        plain.update(rewards, label)
        half.update(rewards, label)
    assert torch.equal(plain.value, half.value)
    assert half.to("meta").value.device.type == "meta"


def test_a_logged_mean_of_bf16_losses(tmp_path, monkeypatch):
    """The mean over many batches of a loss that bfloat16 cannot add up."""
    from mfm_lightning.modules import MFMPretraining
    from tests.inputs.test_logs import rows

    monkeypatch.chdir(tmp_path)
    losses = MFMPretraining.losses
    values = iter([256.0, *[1.0] * 11])

    def given(self, x1, conditions, training):
        found = losses(self, x1, conditions, training)
        return found if training else {"loss": torch.tensor(next(values), dtype=torch.bfloat16)}

    fit("run", 1, "--trainer.precision=bf16-true")
    monkeypatch.setattr(MFMPretraining, "losses", given)
    options = ["--trainer.limit_val_batches=11", "--data.init_args.batch_size=16"]
    job("validate", "run", "--trainer.precision=bf16-true", *options)
    (row,) = rows("run/logs/csv_validate/metrics.csv")
    assert float(row["val/loss"]) == pytest.approx((256 + 10) / 11, rel=1e-6)
