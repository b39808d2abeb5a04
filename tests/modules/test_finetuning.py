"""Fine-tuning: its fixed point against a closed form, the normaliser, exact resume, adapters, and clear refusals."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch

from mfm_lightning.alignment.posteriors import FlowMapPosterior
from mfm_lightning.alignment.target import Target, TargetSettings
from mfm_lightning.callbacks import EMA
from mfm_lightning.checkpoints import CheckpointError, load_model, save_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import DigitsDataModule, GaussianMixtureDataModule, OffPolicyDataModule
from mfm_lightning.interpolant import diffusion
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import LogNormaliser, LowRank, Optimization, RewardFinetuning
from mfm_lightning.modules.finetuning import DiffusionSchedule
from mfm_lightning.networks import MLP, DiT
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_lightning.objectives import ConditionTimes
from mfm_lightning.objectives.finetuning import finetuning_target, tilt_by_reward_gradient, tilt_without_gradient
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards import RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model

GAUSSIAN = GaussianMixture([MEAN], VARIANCE)
REWARD = LinearGaussianLikelihood([1.2, -0.8], 0.5, 0.6)
MILD = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def residual_mean(gradient: str, optimal: bool, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard error of b_theta - target over 30,000 exact single draws at 8 states."""
    model, num = gaussian_model().requires_grad_(False).double(), 30_000
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64).repeat_interleave(num)
    x = torch.randn(8, 2, generator=seeded(), dtype=torch.float64).repeat_interleave(num, dim=0)
    base, half = GAUSSIAN.drift(t, x), diffusion(t)
    policy = base + half[:, None] * GAUSSIAN.value_gradient(x, t, REWARD) if optimal else base
    target = Target(model, lambda x1: REWARD(x1) + shift)
    noise = torch.randn(len(x), 1, 2, generator=seeded(1), dtype=torch.float64)

    def normaliser(rewards):
        return torch.full((len(rewards),), -1.0 + shift)

    tilted = tilt_by_reward_gradient if gradient == "reward" else tilt_without_gradient
    tilt = tilted(target, t, x, noise, FlowMapPosterior(), normaliser, base)
    residual = (policy - sum(finetuning_target(base, policy, tilt, half))).reshape(8, num, 2)
    return residual.mean(dim=1), residual.std(dim=1) / num**0.5


@pytest.mark.parametrize("gradient", ["reward", "free"])
def test_the_optimum_is_a_fixed_point_from_single_draws(gradient):
    # 16 z-tests at 4.5 standard errors: false-alarm rate 1e-4, were the seed not fixed
    mean, error = residual_mean(gradient, optimal=True)
    assert (mean.abs() < 4.5 * error + 1e-9).all(), mean / error
    elsewhere, error = residual_mean(gradient, optimal=False)  # the test has power
    assert (elsewhere.abs() > 10 * error).any(dim=1).sum() >= 6
    shifted, _ = residual_mean(gradient, optimal=False, shift=7.0)  # and the reward's level does not matter
    torch.testing.assert_close(shifted, elsewhere, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["reward", "free"])
def test_near_noise_the_fixed_point_needs_no_clamp(gradient):
    """At t = 0, 0.001, 0.01 and 0.5 too the optimum is b + (E'[x1] - E[x1]) / (1-t), from single exact draws.

    Data N(m, c I), reward log N(y; a x1, s^2): the posterior N(mu, v I) is moved by the gain v a / (s^2 + v a.a) times
    y - a.mu. The statistic is the mean residual in its standard errors, over 60,000 draws at 4 states, normal under the
    fixed point; all 8 coordinates within 5.2: false-alarm rate 8 * 2e-7.
    """
    num, model = 60_000, gaussian_model().requires_grad_(False).double()
    t = torch.tensor([0.0, 1e-3, 0.01, 0.5], dtype=torch.float64).repeat_interleave(num)
    x = torch.randn(4, 2, generator=seeded(), dtype=torch.float64).repeat_interleave(num, dim=0)
    time, m, a = t[:, None], torch.tensor(MEAN).double(), torch.tensor([1.2, -0.8]).double()
    k = (1 - time) ** 2 + VARIANCE * time**2
    mu, v = m + VARIANCE * time / k * (x - time * m), VARIANCE * (1 - time) ** 2 / k
    base = (mu - x) / (1 - time)
    shift = v * a / (0.6**2 + v * (a @ a)) * (0.5 - mu @ a)[:, None]
    policy, half = base + shift / (1 - time), diffusion(t)
    tilted = tilt_by_reward_gradient if gradient == "reward" else tilt_without_gradient
    noise = torch.randn(len(x), 1, 2, generator=seeded(1), dtype=torch.float64)
    arguments = (t, x, noise, FlowMapPosterior(), lambda rewards: torch.full((len(rewards),), -1.0), base)
    tilt = tilted(Target(model, REWARD), *arguments)
    for clamped, expected in ((DiffusionSchedule().clamped(t), True), (None, False)):
        residual = (policy - sum(finetuning_target(base, policy, tilt, half, clamped))).reshape(4, num, 2)
        z = (residual.mean(dim=1) / (residual.std(dim=1) / num**0.5)).abs()
        assert (z < 5.2).all() == expected, z
    assert (z[:2].amax(dim=1) > 20).all()  # what the clamp takes away is seen
    assert DiffusionSchedule().clamped(torch.tensor([0.0, 0.038, 0.039, 1.0])).tolist() == [True, True, False, False]
    assert not DiffusionSchedule(constant=100.0).clamped(t).any()


def test_a_training_step_at_noise_sees_the_reward(vectors):
    """All states at t = 0, where t/(1-t)^2 is 0: the third term is there, but for a constant sigma."""
    x1 = torch.randn(16, 2, generator=seeded())
    for schedule, seen in ((DiffusionSchedule(), True), (DiffusionSchedule(constant=1.0), False)):
        options = {"gradient": "free", "times": ConditionTimes(1.0, 1.0), "half_diffusion": schedule}
        found = vector_module(vectors, **options).losses(x1, Conditions(), training=False)
        assert (found["share/reward"] > 0.01) == seen


def test_the_normaliser_is_the_running_mean_in_the_log_domain():
    normaliser = LogNormaliser(3, rate=0.25)
    means = torch.zeros(4, dtype=torch.float64)
    for k in range(8):
        rewards, label = torch.randn(64, generator=seeded(k)) * 3, torch.randint(0, 3, (64,), generator=seeded(k + 9))
        normaliser.update(rewards, label)
        share = max(1 / (k + 1), 0.25)
        for c in range(3):
            means[c] = (1 - share) * means[c] + share * rewards[label == c].double().exp().mean()
    classes, other = torch.tensor([0, 1, 2]), torch.full((3,), 50.0)
    # what it is given now does not matter, but for a class that it has not seen: that has its batch's own
    torch.testing.assert_close(normaliser(other, classes).double(), means[:3].log(), rtol=1e-5, atol=1e-5)
    assert normaliser(other, torch.tensor([0, 1, 3]))[2].item() == pytest.approx(50.0)
    normaliser.update(torch.full((10,), 1e5), torch.zeros(10, dtype=torch.long))
    assert (1e5 - normaliser(other, classes)[0]).exp().item() <= 1 / 0.25 + 0.1
    with pytest.raises(ValueError, match="rate 0"):
        LogNormaliser(rate=0)


@pytest.fixture
def vectors(tmp_path):
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 16, 1))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return str(save_model(model, tmp_path / "vectors.safetensors"))


@pytest.fixture
def images(tmp_path):
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return str(save_model(model, tmp_path / "images.safetensors"))


class Save(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


def fit(folder, module, data, steps, resume=None, callbacks=()):
    trainer = L.Trainer(
        max_steps=steps, max_epochs=1, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", gradient_clip_val=1.0,
        limit_val_batches=0, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module


def vector_module(path, **options):
    torch.manual_seed(3)
    settings = TargetSettings(path, MILD, reward_scale=options.pop("scale", 1.0))
    return RewardFinetuning(settings, optimization=Optimization("adamw", 1e-3, warmup_steps=1), **options)


def mixture_data(share=0.5):
    return OffPolicyDataModule(GaussianMixtureDataModule(batch_size=32), share, 64, 4, 3)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, vectors):
    whole_ema, resumed_ema = EMA(0.9), EMA(0.9)
    # interrupted between two renewals of the policy's samples
    whole = fit(tmp_path, vector_module(vectors), mixture_data(), 10, callbacks=[whole_ema, Save(6)])
    resumed = fit(
        tmp_path, vector_module(vectors), mixture_data(), 10, tmp_path / "middle.ckpt", callbacks=[resumed_ema]
    )
    assert whole.normaliser.updates.item() == 10
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in whole_ema.average.items():
        assert torch.equal(tensor, resumed_ema.average[name]), name


def test_no_reward_leaves_the_base_and_a_huge_one_trains(tmp_path, vectors):
    for gradient in ("reward", "free"):
        still = fit(tmp_path, vector_module(vectors, scale=0.0, gradient=gradient), mixture_data(), 10)
        for name, tensor in load_model(vectors).state_dict().items():
            assert torch.equal(still.policy.state_dict()[name], tensor), name
        huge = fit(tmp_path, vector_module(vectors, scale=1e5, gradient=gradient), mixture_data(), 10)
        assert all(tensor.isfinite().all() for tensor in huge.state_dict().values())
        moved = [torch.equal(p, q) for p, q in zip(huge.policy.parameters(), huge.base.parameters(), strict=True)]
        assert not all(moved)


def test_adapters_are_all_that_is_trained_and_saved(tmp_path, images):
    def module():
        torch.manual_seed(1)
        settings = TargetSettings(images, "brightness", PixelDecoder(), 20.0)
        return RewardFinetuning(settings, adapters=LowRank(2), optimization=Optimization("adamw", 1e-2, warmup_steps=1))

    data = DigitsDataModule(batch_size=16)
    whole = fit(tmp_path, module(), data, 6, callbacks=[Save(3)])
    trained = [name for name, p in whole.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if not name.startswith("normaliser")} == set(trained)
    resumed = fit(tmp_path, module(), DigitsDataModule(batch_size=16), 6, tmp_path / "middle.ckpt")
    for name in trained:
        assert torch.equal(whole.state_dict()[name], resumed.state_dict()[name])
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    path = save_model(MetaFlowMap(whole.exported), tmp_path / "merged.safetensors")
    wanted = whole.policy.drift(t, x, label=3)
    torch.testing.assert_close(load_model(path).drift(t, x, label=3), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - whole.base.drift(t, x, label=3)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no linear layer of DiT ends in 'query'"):
        RewardFinetuning(TargetSettings(images, "brightness", PixelDecoder()), adapters=LowRank(modules=("query",)))


def test_what_does_not_fit_is_refused_before_training(tmp_path, images, vectors):
    black_box = TargetSettings(images, "jpeg_compressibility", PixelDecoder())
    with pytest.raises(RewardError, match="fine-tuning with gradient 'reward' differentiates the reward"):
        RewardFinetuning(black_box)
    assert RewardFinetuning(black_box, gradient="free").policy is not None
    with pytest.raises(ValueError, match=r"base flow has states \(2,\) and 0 classes"):
        RewardFinetuning(TargetSettings(images, "brightness", PixelDecoder()), base=vectors)
    base_only = save_model(load_model(images), tmp_path / "flow.safetensors", {"kind": "base_flow"})
    with pytest.raises(CheckpointError, match="is a base flow, which draws no posteriors"):
        RewardFinetuning(TargetSettings(str(base_only), "brightness", PixelDecoder()))
    with pytest.raises(ValueError, match="3 prompts for 10 classes"):
        RewardFinetuning(TargetSettings(images, "brightness", PixelDecoder(), prompts=["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"set target\.decoder"):
        RewardFinetuning(TargetSettings(images, "brightness"))
    with pytest.raises(ValueError, match="unknown gradient 'score'"):
        RewardFinetuning(TargetSettings(vectors, MILD), gradient="score")
    with pytest.raises(ValueError, match="policy_share 2"):
        OffPolicyDataModule(DigitsDataModule(), 2)
    assert math.isclose(diffusion(torch.tensor(0.5)).item(), 1.0)
