"""(sigma^2/2) grad V = (E'[x1] - E[x1]) / (1-t), also near t = 0, against closed forms written here, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from mfm_lightning.alignment import Steering, TimeGrid
from mfm_lightning.alignment.posteriors import Posterior
from mfm_lightning.alignment.target import Target, TargetSettings
from mfm_lightning.alignment.values import DrawGradient, DrawGradientFree, ExactGradient
from mfm_lightning.evaluation import TiltedMixtureEvaluation, ValueEvaluation
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_lightning.oracles import EmpiricalDistribution, GaussianMixture
from mfm_rewards import Reward
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.noise import seeded

TIMES = (0.0, 1e-3, 0.01, 0.5)
MEAN, VARIANCE, TILT = torch.tensor([1.0, -0.5]).double(), 0.3, torch.tensor([1.5, -1.0]).double()
POINTS = torch.tensor([[-2.0, 0.5], [0.0, 1.0], [1.0, -1.0], [2.5, 0.0], [0.5, 0.5]]).double()


def states(num=4, *shape):
    return torch.randn(num, *(shape or (2,)), generator=seeded(1), dtype=torch.float64)


def of_finite_data(points, rewards, t, x):
    """V, grad V and the product for points `(M, *shape)` with rewards `(M,)`, at one state x: sums over the points."""
    flat = points.flatten(1)
    logits = -(x.flatten() - t * flat).square().sum(1) / (2 * (1 - t) ** 2)
    shift = ((logits + rewards).softmax(0) - logits.softmax(0)) @ flat
    value = (logits.log_softmax(0) + rewards).exp().sum().log()
    return value, (t / (1 - t) ** 2 * shift).reshape(x.shape), (shift / (1 - t)).reshape(x.shape)


class Labelled(Reward):
    needs = ("images", "prompts", "labels")

    def forward(self, images, prompts, labels):
        first, size = images[:, 0, 0, 0], torch.tensor([float(len(p)) for p in prompts])
        return images.flatten(1).sum(1) * (1.0 + labels) + size * first


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("t", TIMES)
def test_the_exact_gradient_reads_images_labels_prompts_and_scale(t, scale):
    """Finite data; a decoder that is not the identity, and a reward that reads the sample's own label and prompt."""
    points = 1.5 * torch.randn(12, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    data = EmpiricalDistribution(points, torch.arange(12) % 3, num_classes=3)
    labels, prompts = [2, 0, 3, 0, 2], ["a", "bbb", "cc", "bbb", "dd"]  # 3: no class
    x = states(5, 1, 2, 2)
    target = Target(data, Labelled(), PixelDecoder(), label=torch.tensor(labels), prompts=prompts, reward_scale=scale)
    found = ExactGradient(data)(target, t, x)
    images = ((points + 1) / 2).clamp(0, 1)
    for i, (label, prompt) in enumerate(zip(labels, prompts, strict=True)):
        mine = torch.arange(12) % 3 == label if label < 3 else torch.ones(12, dtype=torch.bool)
        rewards = scale * (images.flatten(1).sum(1) * (1 + label) + len(prompt) * images[:, 0, 0, 0])
        value, gradient, product = of_finite_data(points[mine], rewards[mine], t, x[i])
        assert found.value[i].item() == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(found.gradient[i], gradient, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.steering[i], product, rtol=1e-5, atol=1e-6)
    assert found.steering.abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("t", TIMES)
def test_the_exact_gradient_of_a_gaussian(t, scale):
    """Data N(m, c I), reward log N(y; a x1, s^2): the posterior is N(mu, v I), and e^(scale r) a measurement of it."""
    a, y, s = TILT, 0.7, 0.4
    reward = LinearGaussianLikelihood(a.tolist(), y, s)
    k = (1 - t) ** 2 + VARIANCE * t**2
    mu, v = MEAN + VARIANCE * t / k * (states() - t * MEAN), VARIANCE * (1 - t) ** 2 / k
    precision, residual = scale / s**2, y - mu @ a
    total = 1 + precision * v * a @ a
    value = -0.5 * torch.log(total) - precision * residual**2 / (2 * total) - scale / 2 * math.log(2 * math.pi * s**2)
    product = (v * precision / total * residual)[:, None] * a / (1 - t)
    oracle = GaussianMixture(MEAN[None], VARIANCE)
    found = ExactGradient(oracle)(Target(oracle, reward, reward_scale=scale), t, states())
    torch.testing.assert_close(found.value.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.gradient, t / (1 - t) * product, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.steering, product, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [*TIMES, 0.99])
def test_the_product_of_a_mixture_by_quadrature(t):
    means, variances, weights = (torch.tensor(v).double() for v in ([-2.0, 0.5, 3.0], [0.3, 0.05, 0.8], [1.0, 2, 3]))
    y, s, x = 0.9, 0.3, 0.4
    grid = torch.linspace(-10, 12, 400_001, dtype=torch.float64)
    log_density = weights.log() - (grid[:, None] - means) ** 2 / (2 * variances) - variances.log() / 2
    posterior = log_density.logsumexp(1) - (x - t * grid) ** 2 / (2 * (1 - t) ** 2)
    tilted = posterior - (y - grid) ** 2 / (2 * s**2)
    product = ((tilted.softmax(0) - posterior.softmax(0)) @ grid / (1 - t)).item()
    oracle = GaussianMixture(means[:, None], variances[:, None, None], weights)
    target = Target(oracle, LinearGaussianLikelihood([1.0], y, s))
    found = ExactGradient(oracle)(target, t, torch.tensor([[x]]).double())
    assert found.steering.item() == pytest.approx(product, rel=1e-5, abs=1e-6)
    assert found.gradient.item() == pytest.approx(t / (1 - t) * product, rel=1e-5, abs=1e-6)


def test_a_mixture_refuses_decoded_rewards_wherever_its_closed_form_is_used():
    oracle, reward = GaussianMixture(MEAN[None], VARIANCE), LinearGaussianLikelihood([1.0, 1.0], 0.0, 1.0)
    with pytest.raises(TypeError, match="PixelDecoder"):
        ExactGradient(oracle)(Target(oracle, reward, PixelDecoder()), 0.5, states())
    with pytest.raises(ValueError, match="reward_scale 0"):
        ExactGradient(oracle)(Target(oracle, reward, reward_scale=0.0), 0.5, states())
    with pytest.raises(TypeError, match="no closed form"):
        ExactGradient(oracle)(Target(oracle, lambda x1: x1[:, 0]), 0.5, states())
    trainer = SimpleNamespace(datamodule=SimpleNamespace(splits={}, oracle=oracle))
    for evaluation in (ValueEvaluation(), TiltedMixtureEvaluation()):
        for decoder, scale in ((PixelDecoder(), 1.0), (None, -1.0), (None, 2.0)):
            settings = TargetSettings("", "brightness", decoder, scale)
            target = SimpleNamespace(settings=settings, reward=reward, check_labels=lambda wanted: None)
            module = SimpleNamespace(trainer=trainer, target=target)
            if scale == 2:
                evaluation.check(module)
                continue
            with pytest.raises((TypeError, ValueError), match=r"PixelDecoder|reward_scale -1"):
                evaluation.check(module)


class ExactGaussian(Posterior):
    """Draws of the posterior of N(m, c I), a function of x_t and the inner noise."""

    def __call__(self, target, t, x_t, noise):
        t = t[:, None]
        k = (1 - t) ** 2 + VARIANCE * t**2
        mu, v = MEAN + VARIANCE * t / k * (x_t - t * MEAN), VARIANCE * (1 - t) ** 2 / k
        return mu[:, None] + v.sqrt()[:, None] * noise


def linear(x1):
    return (x1 @ TILT.to(x1)).to(x1)


@pytest.mark.parametrize("t", TIMES)
def test_mfm_gf_converges_to_the_product(t):
    """Data N(m, c I), reward a x1: the tilt moves the posterior's mean by v a, so the product is v a / (1-t).

    64 states with 16,384 draws each; the statistic is the mean error over states, in its standard errors (from the 64
    estimates): t with 63 degrees of freedom. All 8 (times, coordinates) within 5.6: false-alarm rate 8 * 5e-7.
    The bias of self-normalised weights, of order 1/N, is below a tenth of a standard error.
    """
    oracle = GaussianMixture(MEAN[None], VARIANCE)
    v = VARIANCE * (1 - t) ** 2 / ((1 - t) ** 2 + VARIANCE * t**2)
    found = DrawGradientFree(16_384, ExactGaussian())(Target(oracle, linear), t, states(64), seeded(2))
    for number, exact in ((found.steering, v * TILT / (1 - t)), (found.gradient, t * v * TILT / (1 - t) ** 2)):
        mean, error = number.mean(0) - exact, number.std(0) / 64**0.5
        assert (mean.abs() <= 5.6 * error).all(), mean / error
    assert ((found.steering.mean(0) - v * TILT).abs() > 20 * error).all() or t < 0.4  # there is power against 1-t


@pytest.mark.parametrize("max_rows", [None, 1, 3, 5, 8, 17])
def test_mfm_g_has_the_gradient_free_product_from_the_same_draws(max_rows):
    target = Target(GaussianMixture(MEAN[None], VARIANCE), lambda x1: 3 * linear(x1))
    for t in TIMES:
        k = (1 - t) ** 2 + VARIANCE * t**2
        mu, v = MEAN + VARIANCE * t / k * (states() - t * MEAN), VARIANCE * (1 - t) ** 2 / k
        draws = mu[:, None] + v**0.5 * torch.randn(4, 8, 2, generator=seeded(3), dtype=torch.float64)
        weights = (3 * draws @ TILT).softmax(1)
        product = (torch.einsum("bn,bnd->bd", weights, draws) - draws.mean(1)) / (1 - t)
        for kind in (DrawGradient, DrawGradientFree):
            found = kind(8, ExactGaussian(), max_rows=max_rows)(target, t, states(), seeded(3))
            torch.testing.assert_close(found.steering, product, rtol=1e-5, atol=1e-6)
    assert DrawGradient(1, ExactGaussian(), max_rows=max_rows)(target, 0.0, states()).steering is None


class AllPoints(Posterior):
    """The points themselves: at t = 0 the posterior gives each the same weight, and N = M of them are exact."""

    def __call__(self, target, t, x_t, noise):
        return POINTS + 0 * x_t[:, None]


def rewards_of(x1):
    return (4 * x1[:, 0] + x1[:, 1] ** 2).to(x1)


DATA = EmpiricalDistribution(POINTS)
EXACT_AT_0 = [ExactGradient(DATA), DrawGradientFree(5, AllPoints()), DrawGradient(5, AllPoints())]


@pytest.mark.parametrize("estimator", EXACT_AT_0, ids=lambda e: type(e).__name__)
def test_the_first_step_from_noise_is_steered_in_full(estimator):
    """At t = 0 the steered velocity is E'[x1] - x; the SDE's score, with sigma^2/2 clamped, is -x."""
    x, target = states(), Target(DATA, rewards_of)
    tilted = rewards_of(POINTS).softmax(0) @ POINTS
    grid, noise = TimeGrid(1, 0.0, 0.25), torch.randn(4, 2, generator=seeded(5), dtype=torch.float64)
    ode = Steering(estimator, grid)(target, x, seeded()).states
    torch.testing.assert_close(ode, x + 0.25 * (tilted - x), rtol=1e-5, atol=1e-5)
    half = Steering(estimator, grid, strength=0.5)(target, x).states
    torch.testing.assert_close(half, x + 0.25 * ((tilted + POINTS.mean(0)) / 2 - x), rtol=1e-5, atol=1e-5)
    # the estimators draw 5 noises a state first
    generator = seeded(5)
    if not isinstance(estimator, ExactGradient):
        generator = seeded(4)
        torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
        noise, generator = torch.randn(4, 2, generator=generator, dtype=torch.float64), seeded(4)
    sde = Steering(estimator, grid, "sde")(target, x, generator).states
    wanted = x + 0.25 * (tilted - x - 25 * x) + (2 * 25 * 0.25) ** 0.5 * noise
    torch.testing.assert_close(sde, wanted, rtol=1e-5, atol=1e-5)
    renormalised = Steering(estimator, grid, renormalise=True)(target, x).states
    base = POINTS.mean(0) - x
    direction = (tilted - POINTS.mean(0)) / (tilted - POINTS.mean(0)).norm()
    wanted = x + 0.25 * (base + base.norm(dim=1, keepdim=True) * direction)
    torch.testing.assert_close(renormalised, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [1e-3, 0.01, 0.03, 0.5])
def test_steps_on_finite_data_are_those_of_the_tilted_data(t):
    """The velocity of the ODE and the drift of the SDE are those of the tilted data's own flow: with E' its denoiser,
    (E' - x)/(1-t), and beside it sigma^2/2 (t E' - x)/(1-t)^2, sigma^2/2 clamped at 25."""
    x, target = states(), Target(DATA, rewards_of)
    logits = -(x[:, None] - t * POINTS).square().sum(2) / (2 * (1 - t) ** 2) + rewards_of(POINTS)
    denoised = logits.softmax(1) @ POINTS
    velocity, score = (denoised - x) / (1 - t), (t * denoised - x) / (1 - t) ** 2
    grid, sigma = TimeGrid(1, t, t + 0.1), min(25, (1 - t) / t)
    ode = Steering(ExactGradient(DATA), grid)(target, x).states
    torch.testing.assert_close(ode, x + 0.1 * velocity, rtol=1e-5, atol=1e-5)
    noise = torch.randn(4, 2, generator=seeded(5), dtype=torch.float64)
    sde = Steering(ExactGradient(DATA), grid, "sde")(target, x, seeded(5)).states
    wanted = x + 0.1 * (velocity + sigma * score) + (2 * sigma * 0.1) ** 0.5 * noise
    torch.testing.assert_close(sde, wanted, rtol=1e-5, atol=1e-5)


def test_a_single_draw_is_clamped_as_before():
    """MFM-G from one draw of N(m, c I): (sigma^2/2) grad r(x1), at t = 0.01 with 25 in place of 99."""
    t, x = 0.01, states()
    k = (1 - t) ** 2 + VARIANCE * t**2
    mu = MEAN + VARIANCE * t / k * (x - t * MEAN)
    target = Target(GaussianMixture(MEAN[None], VARIANCE), linear)
    found = Steering(DrawGradient(1, ExactGaussian()), TimeGrid(1, t, t + 0.1))(target, x, seeded()).states
    wanted = x + 0.1 * ((mu - x) / (1 - t) + 25 * VARIANCE * t / k * TILT)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
