"""Values, steering, search and Best-of-N against closed forms, the release, and the formulas for NFE."""

import math

import pytest
import torch

from mfm_lightning.alignment import (
    BestOfN,
    DiamondGradient,
    FeynmanKac,
    NoiseOptimisation,
    Search,
    Steering,
    TimeGrid,
    TrajectoryTilting,
    TwistedSMC,
)
from mfm_lightning.alignment.posteriors import GlassPosterior, OraclePosterior, Posterior
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import (
    DPSGradient,
    DrawGradient,
    DrawGradientFree,
    DrawValue,
    effective_sample_size,
)
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.networks.decoders import PixelDecoder, VAEDecoder
from mfm_lightning.oracles import GaussianMixture
from mfm_lightning.samplers import sample_ode
from mfm_rewards import Reward, RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.latent_data import small_vae
from tests.noise import seeded

MIXTURE = GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)
LIKELIHOOD = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.2)


@pytest.fixture
def noise():
    return torch.randn(6, 2, generator=seeded())


class BlackBox(Reward):
    differentiable = False

    def forward(self, x):
        return x.detach()[:, 0].round()


class ExactGaussian(Posterior):
    """Draws from the posterior of one Gaussian N(m, c I), a differentiable function of x_t and the inner noise."""

    def __init__(self, mean, variance):
        self.mean, self.variance = torch.tensor(mean), variance

    def __call__(self, target, t, x_t, noise):
        t = torch.as_tensor(t).reshape(-1, 1)
        noisy = t**2 * self.variance + (1 - t) ** 2
        mean = self.mean + t * self.variance / noisy * (x_t - t * self.mean)
        return mean[:, None] + ((1 - t) ** 2 * self.variance / noisy).sqrt()[:, None] * noise


def test_gradients_converge_to_the_exact_one_at_the_monte_carlo_rate():
    """With exact draws: the error of 16 times the draws is about a quarter; at most half passes (64 states)."""
    x, t = torch.randn(64, 2, generator=seeded(1)), 0.5
    gaussian = GaussianMixture([[1.0, -1.0]], 0.5)
    likelihood = LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0)
    cases = [
        (gaussian, likelihood, lambda n: DrawGradient(n, ExactGaussian([1.0, -1.0], 0.5))),
        (gaussian, likelihood, lambda n: DrawGradientFree(n, ExactGaussian([1.0, -1.0], 0.5))),
        (
            MIXTURE,
            LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0),
            lambda n: DrawGradientFree(n, OraclePosterior(MIXTURE, seeded(2))),
        ),
    ]
    for oracle, reward, estimator in cases:
        exact = oracle.value_gradient(x, t, reward)
        error = {}
        for n in (1024, 16384):
            found = estimator(n)(Target(oracle, reward), t, x, seeded(3))
            error[n] = (found.gradient - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            torch.testing.assert_close(found.value, oracle.value(x, t, reward), rtol=0, atol=30 / math.sqrt(n))
        assert max(error[16384] / 0.05, 2 * error[16384] / error[1024]) < 1, error


def test_differentiated_glass_rollouts_reach_the_exact_gradient():
    """Their error falls with the step count of the rollout (first order), where Monte Carlo error is small."""
    reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 2.0)
    x, t = torch.randn(4, 2, generator=seeded(1)), 0.5
    exact = MIXTURE.value_gradient(x, t, reward)
    estimator = DrawGradient(4096, GlassPosterior(32, "heun"), antithetic=True)
    found = estimator(Target(MIXTURE, reward), t, x, seeded(3)).gradient
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", [DrawGradient, DrawGradientFree])
def test_chunks_and_constants_change_nothing(model, noise, kind):
    target = Target(model, LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0))
    whole = kind(8)(target, 0.4, noise, seeded())
    for max_rows in (1, 3, 8, 17):
        part = kind(8, max_rows=max_rows)(target, 0.4, noise, seeded())
        torch.testing.assert_close(part.gradient, whole.gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.value, whole.value)
        torch.testing.assert_close(part.ess, whole.ess)
    shifted = Target(model, lambda x: LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0)(x) + 5.0)
    moved = kind(8)(shifted, 0.4, noise, seeded())
    torch.testing.assert_close(moved.gradient, whole.gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.value, whole.value + 5.0)


def test_effective_sample_size():
    assert effective_sample_size(torch.zeros(1, 7)).item() == pytest.approx(7)
    assert effective_sample_size(torch.tensor([[100.0, 0.0, 0.0]])).item() == pytest.approx(1)


@pytest.mark.parametrize("dynamics", ["ode", "sde"])
def test_no_strength_and_no_reward_are_the_base_sampler(model, noise, dynamics):
    grid, reward = TimeGrid(5), LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0)
    base = Steering(DrawGradient(2), grid, dynamics, strength=0.0)(Target(model, reward), noise, seeded())
    assert base.nfe.total == 5 * len(noise)
    if dynamics == "ode":
        flat = Target(model, lambda x: x.flatten(1).sum(1) * 0 + 3.0)
        for estimator in (DrawGradient(2), DrawGradientFree(2), DPSGradient()):
            for renormalise in (False, True):
                found = Steering(estimator, grid, renormalise=renormalise)(flat, noise, seeded())
                torch.testing.assert_close(found.states, base.states)


def test_nfe_is_counted_as_in_the_paper(model, noise):
    target, K, N, B = Target(model, LIKELIHOOD), 5, 4, len(noise)
    grid = TimeGrid(K)
    assert Steering(DrawGradientFree(N), grid)(target, noise).nfe.total == B * (K + 2 * N * K)
    assert Steering(DrawGradient(N), grid)(target, noise).nfe.total == B * (K + 4 * N * K)
    assert Steering(DPSGradient(), grid)(target, noise).nfe.total == B * 4 * K
    assert Search(3, N, K)(target, noise).nfe.total == B * 2 * 3 * N * K
    assert BestOfN(N, K, max_rows=7)(target, noise).nfe.total == B * (K + 1) * N


def test_the_base_step_by_the_flow_map_is_exact_and_costs_the_same():
    """Of N(mu, c I): the map is u mu + S_u/S_s (x - s mu), S_s^2 = (1-s)^2 + c s^2. Steering adds the same term."""
    model, x0 = gaussian_model().double(), torch.randn(6, 2, generator=seeded(), dtype=torch.float64)
    target = Target(model, LinearGaussianLikelihood([1.2, -0.8], -1.0, 1.0).double())
    mean, (s, u) = torch.tensor(MEAN, dtype=torch.float64), (0.01, 1.0)
    deviation = {w: ((1 - w) ** 2 + VARIANCE * w**2) ** 0.5 for w in (s, u)}
    exact = u * mean + deviation[u] / deviation[s] * (x0 - s * mean)
    for steps in (1, 3):
        grid = TimeGrid(steps)
        base = Steering(DrawGradient(1), grid, strength=0.0, base_step="flow_map")(target, x0, seeded())
        torch.testing.assert_close(base.states, exact)
        assert base.nfe.total == steps * len(x0)
        euler = Steering(DrawGradient(1), grid, strength=0.0)(target, x0, seeded())
        assert (euler.states - exact).abs().max() > 0.05
    both = [
        Steering(DrawGradient(2), TimeGrid(1, 0.2), base_step=step)(target, x0, seeded())
        for step in ("flow_map", "euler")
    ]
    jump = model.flow_map(0.2, 1.0, x0, 0.0, torch.zeros_like(x0)) - (x0 + 0.8 * model.drift(0.2, x0))
    torch.testing.assert_close(both[0].states - both[1].states, jump.detach())
    assert both[0].nfe.total == both[1].nfe.total == len(x0) * (1 + 4 * 2)
    with pytest.raises(ValueError, match="the SDE's base dynamics have no flow map"):
        Steering(dynamics="sde", base_step="flow_map")
    with pytest.raises(ValueError, match="base_step"):
        Steering(base_step="heun")
    with pytest.raises(CheckpointError, match="Steering needs a flow map, and a GaussianMixture has none"):
        Steering(DPSGradient(), base_step="flow_map").check(LIKELIHOOD, MIXTURE)
    Steering(DPSGradient()).check(LIKELIHOOD, MIXTURE)


@pytest.mark.slow
def test_steering_reaches_the_tilted_mixture():
    """With exact gradients the steered ODE's mean is that of the tilted distribution, within 5 standard errors."""
    from mfm_lightning.alignment.values import ExactGradient

    reward = LinearGaussianLikelihood([1.2, -0.8], -1.0, 0.5)
    method = Steering(ExactGradient(MIXTURE), TimeGrid(400, 0.002), "sde", max_diffusion=500.0)
    x = method(Target(MIXTURE, reward), torch.randn(4096, 2, generator=seeded()), seeded(1)).states
    points = MIXTURE.sample(400_000, seeded(2))
    w = reward(points).softmax(0)
    mean, second = w @ points, (w[:, None] * points).T @ points
    spread = (second - mean[:, None] * mean).diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * spread / 64 + 0.03).all(), (x.mean(0), mean)
    assert ((x.std(0) / spread - 1).abs() < 0.08).all(), (x.std(0), spread)


def test_best_of_n_streams_and_keeps_the_best(model):
    target = Target(model, LIKELIHOOD)
    x0 = torch.randn(4, 2, generator=seeded(9))  # each sample's first candidate; the others are drawn
    result = BestOfN(16, 3, max_rows=9, keep_at=(4,))(target, x0, [seeded(i) for i in range(4)])
    others = torch.stack([torch.randn(2, generator=g) for g in [seeded(i) for i in range(4)] for _ in range(15)])
    x = torch.cat([x0[:, None], others.reshape(4, 15, 2)], dim=1).flatten(0, 1)
    rewards = LIKELIHOOD(sample_ode(lambda t, x: model.drift(t, x), x, 3)).reshape(4, 16)
    torch.testing.assert_close(result.rewards, rewards.max(dim=1).values)
    assert [step["candidates"] for step in result.trace] == [4, 16]
    for step in result.trace:
        best = rewards[:, : int(step["candidates"])].max(dim=1).values
        assert step["best_reward"] == pytest.approx(best.mean().item(), rel=1e-5)


@pytest.mark.parametrize("selection", ["overall", "per_particle"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_search_works_with_a_black_box(model, noise, selection, stochastic):
    search = Search(3, 4, 4, selection=selection, stochastic=stochastic)
    result = search(Target(model, BlackBox()), noise, seeded())
    first = Search(3, 4, 1)(Target(model, BlackBox()), noise, seeded())
    assert result.states.shape == (6, 2)
    assert (result.rewards >= first.rewards).all()  # it starts with the same draws
    assert result.trace[-1]["best_reward"] == pytest.approx(result.rewards.mean().item())


def test_black_boxes_and_failures_are_refused_clearly(model, noise):
    for estimator in (DrawGradient(), DrawGradient(posterior=GlassPosterior(1)), DPSGradient()):
        target = Target(model, BlackBox())
        with pytest.raises(RewardError, match="not differentiable"):
            Steering(estimator, TimeGrid(3))(target, noise)
        assert target.meter.total == 0
    assert Steering(DrawGradientFree(4), TimeGrid(3))(Target(model, BlackBox()), noise).rewards.shape == (6,)
    calls = []

    def fails_later(x):
        calls.append(len(x))
        return x[:, 0] * (float("nan") if len(calls) > 2 else 1.0)

    with pytest.raises(RewardError, match=r"step 3 of 4 .*'fails_later'.* indices 0, 1") as caught:
        Steering(DrawGradientFree(2), TimeGrid(4))(Target(model, fails_later), noise)
    assert caught.value.states.shape == noise.shape
    assert caught.value.states.isfinite().all()
    with pytest.raises(RewardError, match="needs prompts"):
        Target(model, lambda images, prompts: images)
    with pytest.raises(ValueError, match="at least 2"):
        DrawGradientFree(1)
    with pytest.raises(ValueError, match="power 0 must be above 0"):
        Search(power=0)
    with pytest.raises(ValueError, match="a time grid needs"):
        TimeGrid(0)


METHODS = [
    Steering(DrawGradient(2), TimeGrid(2)),
    Steering(DPSGradient(), TimeGrid(2), "sde"),
    Search(2, 2, 2),
    BestOfN(3, 2, max_rows=4),
    FeynmanKac(num_particles=2, grid=TimeGrid(2)),
    FeynmanKac(num_particles=2, grid=TimeGrid(2), transition="glass", keep="best"),
    TwistedSMC(num_particles=2, grid=TimeGrid(2)),
    Steering(DiamondGradient(2), TimeGrid(2), return_best=True),
    TrajectoryTilting(num_particles=2, grid=TimeGrid(2)),
    NoiseOptimisation(2, 2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_keep_each_samples_conditions(method):
    """The network and the reward see the label, prompt and scale of the sample that a state belongs to."""
    seen = []

    class Labelled(Reward):
        needs = ("images", "prompts", "labels")

        def forward(self, images, prompts, labels):
            seen.append((list(prompts), labels.tolist()))
            return images.sum(dim=1) * (1.0 + labels) + torch.tensor([float(len(p)) for p in prompts])

    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 8, 1, num_classes=3, guidance_scales=(2.5,)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    labels, prompts = [2, 3, 0], ["a", "bbb", "cc"]  # 3: the null label, which is not guided
    target = Target(model.requires_grad_(False), Labelled(), label=torch.tensor(labels), guidance=2.5, prompts=prompts)
    given = []
    model.network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[5]))
    result = method(target, torch.randn(3, 2, generator=seeded()), seeded(1))
    assert result.states.shape == (3, 2)
    own = result.states.sum(dim=1) * (1.0 + torch.tensor(labels)) + torch.tensor([1.0, 3.0, 2.0])
    torch.testing.assert_close(result.rewards, own)
    pairs = set(zip(labels, prompts, strict=True))
    assert {pair for texts, classes in seen for pair in zip(classes, texts, strict=True)} == pairs
    scales = {(a, b) for c in given for a, b in zip(c.label.tolist(), c.guidance.tolist(), strict=True)}
    assert scales == {(2, 2.5), (3, 1.0), (0, 2.5)}
    assert all(c.label.tolist() == sorted(c.label.tolist(), key=labels.index) for c in given)  # side by side


def test_value_estimate_and_decoder(model, noise):
    found = DrawValue(8, antithetic=True)(Target(model, lambda x: x[:, 0] * 0 + 2.0), 0.3, noise)
    torch.testing.assert_close(found.value, torch.full((6,), 2.0))
    torch.testing.assert_close(found.ess, torch.full((6,), 8.0))
    assert PixelDecoder()(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"), blocks=2)


def test_vae_decoder_in_parts_is_the_whole(vae_folder):
    """Images and gradients of parts are those of one batch, and parts keep fewer activations."""
    latents, found, kept = torch.randn(6, 4, 8, 8, generator=seeded()), {}, {}
    for max_rows in (6, 2):
        decoder, x, total = VAEDecoder(vae_folder, max_rows=max_rows), latents.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=total: s.append(t.numel()) or t, lambda t: t):
            images = decoder(x)
        (gradient,) = torch.autograd.grad(images.square().sum(), x)
        found[max_rows], kept[max_rows] = (images.detach(), gradient), sum(total)
    assert gradient.abs().sum() > 0
    for part, whole in zip(found[2], found[6], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)
    assert kept[2] < kept[6] / 10


def test_vae_decoder_keeps_its_precision_and_its_last_images(vae_folder):
    decoder, latents = VAEDecoder(vae_folder), torch.randn(2, 4, 8, 8, generator=seeded())
    calls = []
    decoder._load().decoder.register_forward_hook(lambda *_: calls.append(1))
    exact = decoder(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder(latents.clone()), exact)  # fp32 within bf16
    assert len(calls) == 2
    again = latents.clone()
    assert decoder(again) is decoder(again)
    assert len(calls) == 3
    again.add_(1.0)  # in place: not the same latents any more
    assert not torch.equal(decoder(again), exact)
    low = VAEDecoder(vae_folder, precision="bf16")(latents)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).abs().max() < 0.05
