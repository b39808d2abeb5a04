"""Fine-tuning: its fixed point against a closed form, the normaliser, exact resume, adapters, and clear refusals."""

import json
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
from mfm_lightning.networks.decoders import PixelDecoder, VAEDecoder
from mfm_lightning.objectives import ConditionTimes, noised
from mfm_lightning.objectives.finetuning import finetuning_target, tilt_by_reward_gradient, tilt_without_gradient
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards import RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded

GAUSSIAN = GaussianMixture([MEAN], VARIANCE)
REWARD = LinearGaussianLikelihood([1.2, -0.8], 0.5, 0.6)
MILD = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}


def residual_mean(
    gradient: str, optimal: bool, shift: float = 0.0, normaliser=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard error of b_theta - target over 30,000 exact single draws at 8 states."""
    model, num = gaussian_model().requires_grad_(False).double(), 30_000
    t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64).repeat_interleave(num)
    x = torch.randn(8, 2, generator=seeded(), dtype=torch.float64).repeat_interleave(num, dim=0)
    base, half = GAUSSIAN.drift(t, x), diffusion(t)
    policy = base + half[:, None] * GAUSSIAN.value_gradient(x, t, REWARD) if optimal else base
    target = Target(model, lambda x1: REWARD(x1) + shift)
    noise = torch.randn(len(x), 1, 2, generator=seeded(1), dtype=torch.float64)

    def constant(rewards):
        return torch.full((len(rewards),), -1.0 + shift)

    tilted = tilt_by_reward_gradient if gradient == "reward" else tilt_without_gradient
    tilt = tilted(target, t, x, noise, FlowMapPosterior(), normaliser or constant, base)
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
def test_the_running_normaliser_leaves_the_fixed_point(gradient):
    """The second half of the states are of a class with a c of its own, the first of one whose c is pooled; neither
    looks at the draws that it normalises. 16 z-tests at 4.5 standard errors: false-alarm rate 1e-4, were the seed not
    fixed."""
    running, generator = LogNormaliser(1), seeded(5)
    running.update(torch.randn(200, generator=generator) - 1, torch.ones(200, dtype=torch.long))
    running.update(torch.tensor([0.5, -2.0]), torch.zeros(2, dtype=torch.long))
    own = running.concentration[:-1] * running.enough <= 1
    assert own.tolist() == [False, True]

    def normaliser(rewards):
        c = running(rewards, torch.arange(2).repeat_interleave(len(rewards) // 2))
        assert torch.equal(c, running(rewards * 0 + 9, torch.arange(2).repeat_interleave(len(rewards) // 2)))
        assert len(c.unique()) == 2
        return c

    mean, error = residual_mean(gradient, optimal=True, normaliser=normaliser)
    assert (mean.abs() < 4.5 * error + 1e-9).all(), mean / error


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
    normaliser = LogNormaliser(3, rate=0.25, enough=1)
    means = torch.zeros(4, dtype=torch.float64)
    for k in range(8):
        rewards, label = torch.randn(64, generator=seeded(k)) * 3, torch.randint(0, 3, (64,), generator=seeded(k + 9))
        normaliser.update(rewards, label)
        share = max(1 / (k + 1), 0.25)
        for c in range(3):
            means[c] = (1 - share) * means[c] + share * rewards[label == c].double().exp().mean()
    classes, other = torch.tensor([0, 1, 2]), torch.full((3,), 50.0)
    # what it is given now does not matter, also for a class that it has not seen
    torch.testing.assert_close(normaliser(other, classes).double(), means[:3].log(), rtol=1e-5, atol=1e-5)
    unseen = normaliser(other, torch.tensor([0, 1, 3]))[2].item()
    assert means[:3].log().min() - 2 < unseen < means[:3].log().max() + 2
    normaliser.update(torch.full((10,), 1e5), torch.zeros(10, dtype=torch.long))
    assert (1e5 - normaliser(other, classes)[0]).exp().item() <= 1 / 0.25 + 0.1
    with pytest.raises(ValueError, match="rate 0"):
        LogNormaliser(rate=0)


def gaussian_rewards(normaliser, levels, spread, batches, size=256, generator=None):
    """Feeds batches of rewards N(levels[label], spread^2); rewards, labels and c of each, before it was taken in."""
    for _ in range(batches):
        label = torch.randint(len(levels), (size,), generator=generator)
        rewards = levels[label] + spread * torch.randn(size, generator=generator)
        yield rewards, label, normaliser(rewards[:, None], label)
        normaliser.update(rewards, label)


def test_the_first_weights_of_many_classes_are_bounded():
    """1,000 classes, rewards N(0, 25), 40 batches of 256: one draw a class in four batches. The bound: as long as
    shares are equal (1/rate = 50 batches), a weight above n, the number of draws before, is of a draw that exceeds the
    sum of all before, so a record of r - level; and P(weight > K) <= 1/K + 1/(n+1). At K = 1,000 from the 11th batch on
    that is at most 0.0014 of 7,680 draws on average, 11 draws. In 600 simulations of other seeds there were 2.1 on
    average and 7 at most: more than 20 has a false-alarm rate far below 1e-4. A c from single draws has weights e^{r -
    r'}, r - r' ~ N(0, 50): 16 % above 1,000."""
    generator, record, n, above = seeded(), -torch.inf, 0, 0
    normaliser = LogNormaliser(1000)
    for rewards, label, c in gaussian_rewards(normaliser, torch.zeros(1000), 5.0, 40, generator=generator):
        residual = rewards - normaliser._levels()[label] if n else rewards
        weights = (rewards - c).double().exp()
        if n == 0:
            assert weights.max() <= 256 * (1 + 1e-5)  # its own mean
        else:
            assert (residual[weights > n] > record).all()
        above += int((weights > 1000).sum()) if n >= 2560 else 0
        record, n = max(record, residual.max().item()), n + len(rewards)
    assert above <= 20
    assert sum(buffer.numel() for buffer in normaliser.buffers()) == 4 * 1002


def test_each_class_gets_its_own_log_mean_of_exp():
    """40 classes of levels -20 to 20 with rewards of deviation 1, 300 batches: each ends at the running mean of its own
    draws, level + 1/2 in expectation. Its variance is about (e - 1) / 630, of 6.4 draws a batch for 100 batches, so
    that 40 z-tests at 6 standard errors of the mean of e^r have a false-alarm rate below 1e-4, were the seed not
    fixed."""
    levels, generator, normaliser = torch.linspace(-20, 20, 40), seeded(), LogNormaliser(41)
    means = torch.zeros(40, dtype=torch.float64)
    seen = torch.zeros(40)
    for rewards, label, _ in gaussian_rewards(normaliser, levels, 1.0, 300, generator=generator):
        count = torch.bincount(label, minlength=40)
        mean = torch.zeros_like(means).index_add_(0, label, rewards.double().exp()) / count.clamp_min(1)
        share = (1 / (seen + 1)).clamp_min(0.02) * (count > 0)
        means, seen = means + share * (mean - means), seen + (count > 0)
    c = normaliser(torch.full((42, 1), 99.0), torch.arange(42))
    torch.testing.assert_close(c[:40].double(), means.log(), rtol=0, atol=1e-4)
    assert (c[:40] - levels - 0.5).abs().max() < 6 * ((math.e - 1) / 630) ** 0.5
    # classes without draws of their own: the level of all, and what the draws of all exceed their levels by
    assert torch.equal(c[40], c[41])
    assert -3 < c[40] < 40


def test_heavy_classes_of_different_levels_are_not_starved():
    """Rewards N(level, 25) of 1,000 classes whose levels are N(0, 25): hardly a class has enough effective draws, and
    each c is within 5 of log E e^r = level + 12.5 after 400 batches, where the levels rest on 100 draws. One c for all
    would be off by 15 for some. Deterministic: the seeds are fixed."""
    levels, generator = 5 * torch.randn(1000, generator=seeded(1)), seeded()
    normaliser = LogNormaliser(1000)
    for _ in gaussian_rewards(normaliser, levels, 5.0, 400, generator=generator):
        pass
    error = normaliser(torch.zeros(1000, 1), torch.arange(1000)) - levels - 12.5
    assert error.abs().max() < 5
    assert error.abs().mean() < 2
    assert (normaliser.concentration[:-1] > 1 / 16).sum() > 950


def test_a_mean_on_few_draws_does_not_count():
    """Effective draws (sum e^r)^2 / sum e^{2r}: 20 equal rewards are 20, and one that is far above them leaves 1."""
    normaliser = LogNormaliser(2, rate=0.1)
    normaliser.update(torch.zeros(20), torch.zeros(20, dtype=torch.long))
    normaliser.update(torch.full((12,), -7.0), torch.ones(12, dtype=torch.long))
    effective = 1 / normaliser.concentration
    torch.testing.assert_close(effective[:2], torch.tensor([20.0, 12.0]))
    normaliser.update(torch.tensor([0.0, math.log(3.0)]), torch.zeros(2, dtype=torch.long))
    # shares 1/2 of e^0 and 1/2 of the mean 2: 20 draws of 1/60 each, then 1/6 and 1/2
    assert normaliser.concentration[0].item() == pytest.approx(20 / 60**2 + 1 / 36 + 1 / 4)
    assert normaliser.value[0].item() == pytest.approx(math.log(1.5))
    c = normaliser(torch.zeros(2, 1), torch.tensor([0, 1]))
    assert c[0].item() != pytest.approx(math.log(1.5), abs=1e-3)  # 3.4 effective draws are too few


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


@pytest.mark.parametrize("gradient", ["reward", "free"])
def test_the_loss_is_that_of_eq_43(vectors, gradient):
    """|b_theta - b + (w - 1) (b_theta - b) - sigma^2/2 g|^2 with draws X = x/2 + eps of the same random numbers, for
    sigma^2/2 = 3: w and g are the mean over draws of e^{r-c} and of e^{r-c} r'(X) / 2, or of (e^{r-c} - 1) t (X - D) /
    (1-t)^2; c is log mean e^r of the batch, the first one. r = -(a . X - y)^2 / 2 up to a constant."""

    def half_way(target, t, x, noise):
        return x[:, None] / 2 + noise

    schedule = DiffusionSchedule(constant=3.0)
    module = vector_module(vectors, gradient=gradient, posterior=half_way, num_draws=3, half_diffusion=schedule)
    with torch.no_grad():
        for p in module.policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x1 = torch.randn(16, 2)
    torch.manual_seed(0)
    found = module.losses(x1, Conditions(), training=False)
    torch.manual_seed(0)
    pair = noised(x1, Conditions(), module.times, 0.0, module.base.null_conditions)
    t, x, noise = pair.t[:, None], pair.x_t, torch.randn(16, 3, 2)
    base, policy = module.base.drift(pair.t, x), module.policy.drift(pair.t, x)
    X, a, y = x[:, None] / 2 + noise, torch.tensor(MILD["operator"]), MILD["observation"]
    r = -((X @ a - y) ** 2) / 2
    w = (r - (r.flatten().logsumexp(0) - math.log(48))).exp()
    if gradient == "reward":
        g = (w * -(X @ a - y))[..., None] * a / 2
    else:
        g = ((w - 1)[..., None] * (X - (x + (1 - t) * base)[:, None])) * (t / (1 - t) ** 2)[..., None]
    target = base - (w.mean(dim=1) - 1)[:, None] * (policy - base) + 3.0 * g.mean(dim=1)
    torch.testing.assert_close(found["loss"], (policy - target).square().sum(dim=1).mean(), rtol=1e-4, atol=1e-5)
    change = (policy - base).square().sum(dim=1)
    torch.testing.assert_close(found["control_cost"], (change / 3.0).mean().detach(), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, vectors):
    whole_ema, resumed_ema = EMA(0.9), EMA(0.9)
    # interrupted between two renewals of the policy's samples
    whole = fit(tmp_path, vector_module(vectors), mixture_data(), 10, callbacks=[whole_ema, Save(6)])
    resumed = fit(
        tmp_path, vector_module(vectors), mixture_data(), 10, tmp_path / "middle.ckpt", callbacks=[resumed_ema]
    )
    assert whole.normaliser.updates.tolist() == [10, 10]  # the one class there is, and what is pooled
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


def test_latents_by_channel_are_decoded_as_the_models_file_says(tmp_path, images):
    """As steering, values and fine-tuning load a target: by numbers, or not at all; a file made of it says the same."""
    said = {"latents": json.dumps({"scale": [0.5], "shift": [3.0]})}
    file = str(save_model(load_model(images), tmp_path / "latents.safetensors", said))
    for given in ({}, {"scale": 0.5}, {"shift": 3.0}):
        with pytest.raises(ValueError, match=r"was trained on latents that are shifted .*\[0.5\] and \[3.0\] if"):
            TargetSettings(file, "brightness", VAEDecoder("none", **given)).load()
    module = RewardFinetuning(TargetSettings(file, "brightness", VAEDecoder("none", scale=0.5, shift=3.0)))
    assert module.exported_metadata() == said
    plain = str(save_model(load_model(images), tmp_path / "a.safetensors", {"latents": '{"scale": 0.2, "shift": 0.0}'}))
    assert TargetSettings(plain, "brightness", VAEDecoder("none")).load().model.metadata


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
