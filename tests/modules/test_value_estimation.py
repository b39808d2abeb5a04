"""The amortised value against the exact one, rollouts against the exact posterior, and the evaluation's account."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from mfm_lightning.alignment.posteriors import OraclePosterior, RolloutPosterior
from mfm_lightning.alignment.target import LoadedTarget, Target, TargetSettings
from mfm_lightning.alignment.values import NetworkGradient
from mfm_lightning.checkpoints import CheckpointError, load_model, load_value, save_model, save_network
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import GaussianMixtureDataModule
from mfm_lightning.evaluation import ValueEvaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import Optimization, ValueEstimation
from mfm_lightning.networks import MLP, DiT, ValueDiT, ValueMLP
from mfm_lightning.objectives import ConditionTimes
from mfm_lightning.objectives.value import amortised_value_loss
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded

MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)
MILD = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}


def test_the_loss_is_least_at_the_exact_value():
    """A posterior of five points: the expected loss, and its gradient, summed instead of sampled."""
    weights, rewards = torch.rand(5, generator=seeded()).double().softmax(0), torch.tensor([0.0, -2.0, 3.0, 1.0, -7.0])
    exact = (weights.log() + rewards).logsumexp(0)
    value = exact.clone().requires_grad_()
    each = torch.stack([amortised_value_loss(value[None], r.double().reshape(1, 1))[0] for r in rewards])
    (weights @ each).backward()
    assert abs(value.grad) < 1e-12
    for shift in (-1.0, 1.0):
        other = [amortised_value_loss((exact + shift)[None], r.double().reshape(1, 1))[0] for r in rewards]
        assert weights @ torch.stack(other) > (weights @ each).item() + 0.1
    far = torch.zeros(1, requires_grad=True)  # far too low: no overflow
    loss = amortised_value_loss(far, torch.full((1, 1), 1e4))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert far.grad.isfinite().all()


def test_rollouts_draw_from_the_posterior():
    # mean and covariance of 5,000 rollouts; 4.5 standard errors and 5 % for the Euler steps
    t, x_t = 0.3, torch.tensor([[0.6, 0.2]])
    draws = RolloutPosterior(100, generator=seeded())(Target(MIXTURE, sum), t, x_t, torch.empty(1, 5000, 2))[0]
    exact = MIXTURE.sample_posterior(x_t, t, 100_000, generator=seeded(1))[0]
    error = 4.5 * exact.std(0) / 5000**0.5
    assert ((draws.mean(0) - exact.mean(0)).abs() < error + 0.05 * exact.std(0)).all()
    torch.testing.assert_close(draws.T.cov(), exact.T.cov(), rtol=0.12, atol=0.06)
    with pytest.raises(ValueError, match="one t for all states"):
        RolloutPosterior(2)(Target(MIXTURE, sum), torch.tensor([0.1, 0.2]), torch.zeros(2, 2), torch.empty(2, 1, 2))


@pytest.fixture
def model_file(tmp_path):
    return str(save_model(MetaFlowMap(MLP(2, 16, 1)), tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_the_network_learns_the_exact_value_from_single_draws(tmp_path, model_file):
    torch.manual_seed(0)
    module = ValueEstimation(
        ValueMLP(2, 64, 2), TargetSettings(model_file, MILD), ConditionTimes(1.0, 0.05), 0.0,
        posterior=OraclePosterior(MIXTURE), optimization=Optimization("adamw", 3e-3, (0.9, 0.95), 0.0, 50, 1e-5),
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=800, max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", gradient_clip_val=1.0,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, GaussianMixtureDataModule(batch_size=256))
    assert not [name for name in module.state_dict() if not name.startswith("network.")]
    reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0)
    x1, estimator = MIXTURE.sample(512, seeded(1)), NetworkGradient(module.network)
    for t in (0.2, 0.5):
        x = (1 - t) * torch.randn(512, 2, generator=seeded(2)) + t * x1
        exact, exact_gradient = MIXTURE.value(x, t, reward), MIXTURE.value_gradient(x, t, reward)
        found = estimator(Target(load_model(model_file), reward), t, x)
        assert (found.value - exact).square().mean().sqrt() < 0.15 * exact.std() + 0.05, t
        cosine = torch.cosine_similarity(found.gradient.flatten(), exact_gradient.flatten(), dim=0)
        assert cosine > 0.95, (t, cosine)


def test_networks_are_saved_and_told_apart(tmp_path, model_file):
    network = ValueDiT(8, 4, 1, 16, 2, 2, num_classes=10)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = save_network(network, tmp_path / "value.safetensors")
    x, t = torch.randn(3, 1, 8, 8), torch.rand(3)
    assert torch.equal(load_value(path)(t, x), network(t, x, Conditions(label=torch.full((3,), 10))))
    assert not torch.equal(network(t, x), network(t, x, Conditions(label=torch.tensor([1, 2, 3]))))
    with pytest.raises(CheckpointError, match=r"holds a ValueDiT: expected one of DiT, MLP"):
        load_model(path)
    with pytest.raises(CheckpointError, match="holds a MLP"):
        NetworkGradient(model_file)


@pytest.mark.parametrize("flip_time", [False, True])
def test_a_value_network_starts_from_a_flow(flip_time, tmp_path):
    """With the mean of the flow's last rows for its own last layer it is the mean pixel of the flow's velocity."""
    sizes = {"hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 4, "encoder_depth": 2}
    flow = DiT(8, 4, 1, **sizes, guidance_scales=[], flip_time=flip_time)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=seeded(1))
    path = str(save_model(MetaFlowMap(flow), tmp_path / "flow.safetensors"))
    target = TargetSettings(path, {"name": "brightness"})
    module = ValueEstimation(ValueDiT(8, 4, 1, **sizes, flip_time=flip_time), target, initial=path)
    network = module.network
    x, t, label = torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5)
    assert torch.equal(network(t, x), torch.zeros(5))
    network.set_level(-2.0)
    assert torch.equal(network(t, x), torch.full((5,), -2.0))
    last = network.last_layer()
    with torch.no_grad():
        last.weight.copy_(flow.final_layer.linear.weight.mean(0, keepdim=True))
        last.bias.copy_(flow.final_layer.linear.bias.mean(0, keepdim=True))
    expected = load_model(path).drift(t, x, label=label).mean(dim=(1, 2, 3))
    sign = -1 if flip_time else 1  # such a flow's velocity has the other sign
    torch.testing.assert_close(sign * network(t, x, Conditions(label=label)), expected)
    network(t, x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # else DDP waits for them


def test_a_start_that_does_not_fit_is_refused(tmp_path, model_file):
    flow = DiT(8, 4, 1, 16, 2, 2, encoder_depth=1, num_classes=4, guidance_scales=[])
    path = str(save_model(MetaFlowMap(flow), tmp_path / "flow.safetensors"))
    target = TargetSettings(path, {"name": "brightness"})
    with pytest.raises(CheckpointError, match="another architecture than the network's: depth 2 there, 1 here"):
        ValueEstimation(ValueDiT(8, 4, 1, 16, 1, 2, num_classes=4, encoder_depth=1), target, initial=path)
    with pytest.raises(ValueError, match="a ValueMLP cannot start from a flow, a ValueDiT can"):
        ValueEstimation(ValueMLP(2), TargetSettings(model_file, MILD), initial=model_file)
    with pytest.raises(CheckpointError, match="a DiT starts from a DiT, not from a MLP"):
        ValueEstimation(ValueDiT(8, 4, 1, 16, 2, 2, num_classes=4), target, initial=model_file)


def test_what_does_not_fit_is_refused(tmp_path, model_file):
    with pytest.raises(ValueError, match=r"the value network takes \(3,\) with 0 classes"):
        ValueEstimation(ValueMLP(3), TargetSettings(model_file, MILD))
    with pytest.raises(FileNotFoundError, match="fit it first"):
        ValueEstimation(ValueMLP(2), TargetSettings(str(tmp_path / "none.safetensors"), MILD))
    with pytest.raises(ValueError, match="unknown reward"):
        ValueEstimation(ValueMLP(2), TargetSettings(model_file, "linear_gausian"))
    with pytest.raises(ValueError, match="unknown reference 'truth'"):
        ValueEvaluation(reference="truth")


@pytest.mark.slow
def test_the_evaluation_finds_exact_draws_to_be_exact(tmp_path):
    """One Gaussian, whose flow map is exact: values from its draws are the closed form's, up to Monte Carlo."""
    oracle = GaussianMixture([MEAN], VARIANCE)
    reward = LinearGaussianLikelihood([1.0, 0.5], 0.3, 0.8)
    data = SimpleNamespace(oracle=oracle, splits={"test": (oracle.sample(200, seeded()), torch.zeros(200).long())})
    logged = {}
    module = SimpleNamespace(
        trainer=SimpleNamespace(datamodule=data, ckpt_path=None, precision="32-true"), device="cpu", global_step=0,
        target=LoadedTarget(TargetSettings("", ""), gaussian_model().requires_grad_(False), reward),
        log=lambda name, value, **_: logged.__setitem__(name, value),
    )  # fmt: skip
    evaluation = ValueEvaluation(
        times=[0.3, 0.6], num_states=64, num_draws=2000, num_repeats=2, model_steps=[1, 4], glass_steps=[1, 8],
        rollout_steps=20, max_rows=200_000,
    )  # fmt: skip
    evaluation.measure(module, tmp_path)
    rows = {(row["t"], row["estimator"]): row for row in json.loads((tmp_path / "value_estimates.json").read_text())}
    for t in (0.3, 0.6):
        one, four = rows[t, "MFM 1"], rows[t, "MFM 4"]
        assert one["r"] > 0.97
        assert one["r low"] <= one["r"] <= one["r high"] <= 1
        assert abs(one["bias"]) < 0.03
        assert one["variance"] < 0.02
        # the flow map is exact, so that four steps give the same draws from the same noise
        assert four["RMSE"] == pytest.approx(one["RMSE"], abs=1e-4)
        assert abs(one["bias"]) < abs(rows[t, "DPS point estimate"]["bias"])
        assert rows[t, "GLASS 8"]["RMSE"] < rows[t, "GLASS 1"]["RMSE"]
        assert (one["NFE"], rows[t, "GLASS 8"]["NFE"], rows[t, "DPS point estimate"]["NFE"]) == (4000, 18000, 2)
    assert logged["test/pearson_r/MFM 1/t=0.3"] == rows[0.3, "MFM 1"]["r"]
    evaluation.draw(module, tmp_path)
    assert {"scatter.png", "scatter.svg", "r_against_nfe.png", "r_against_nfe.svg"} <= {
        p.name for p in tmp_path.iterdir()
    }
