"""Flow Map Trajectory Tilting and noise optimisation, on the exact flow map of a Gaussian, against closed forms."""

import math

import pytest
import torch
from torch import nn

from mfm_lightning.alignment import (
    FlowMapGradient,
    NoiseOptimisation,
    Steering,
    Target,
    TimeGrid,
    TrajectoryTilting,
)
from mfm_lightning.alignment.particles import top_indices
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.oracles import GaussianMixture
from mfm_rewards import Reward, RewardError
from mfm_rewards.linear_gaussian import LinearGaussianLikelihood
from tests.closed_form import MEAN, VARIANCE, gaussian_model
from tests.noise import seeded

A, Y, STD = torch.tensor([1.2, -0.8]), -1.0, 0.5
REWARD = LinearGaussianLikelihood(A.tolist(), Y, STD)
M = torch.tensor(MEAN)


def target(reward=REWARD, **options):
    return Target(gaussian_model().requires_grad_(False), reward, **options)


def tilted():
    """Mean and covariance of N(m, c I) after the measurement, and its evidence, log N(y; a m, s^2 + c |a|^2)."""
    variance = STD**2 + VARIANCE * float(A @ A)
    gain = VARIANCE * A / variance
    log_evidence = -0.5 * (Y - float(A @ M)) ** 2 / variance - 0.5 * math.log(math.tau * variance)
    return M + gain * (Y - A @ M), VARIANCE * (torch.eye(2) - torch.outer(gain, A)), log_evidence


def along_the_flow(t, x):
    """X_{t,1}(x) = m + sqrt(c)/S_t (x - t m), S_t^2 = (1-t)^2 + c t^2; and its derivative."""
    slope = math.sqrt(VARIANCE / ((1 - t) ** 2 + VARIANCE * t**2))
    return M + slope * (x - t * M), slope


def test_the_flow_maps_gradient_is_that_of_its_end():
    x, t = torch.randn(5, 2, generator=seeded()), 0.4
    found = FlowMapGradient(max_rows=2)(target(), t, x)
    end, slope = along_the_flow(t, x)
    residual = Y - end @ A
    torch.testing.assert_close(found.value, -residual.square() / (2 * STD**2) - math.log(math.tau * STD**2) / 2)
    torch.testing.assert_close(found.gradient, slope * residual[:, None] / STD**2 * A, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.best.states, end)


@pytest.mark.parametrize("ess_threshold", [0.5, 0.0])
def test_the_normaliser_and_the_particles_are_the_tilted_ones(ess_threshold):
    """16 populations of 256: the normaliser's mean over the exact one within 4 standard errors and 5 % for the Euler
    steps, the errors below 10 %; the mean of particles kept by weight within 5 standard errors of its 16 populations
    and 0.03, and their covariance within 12 %."""
    method = TrajectoryTilting(num_particles=256, grid=TimeGrid(150), keep="all", ess_threshold=ess_threshold)
    result = method(target(), torch.randn(16, 2, generator=seeded(2)), seeded(3))
    mean, covariance, log_evidence = tilted()
    ratio = (result.log_normaliser - log_evidence).exp()
    error = ratio.std() / 4
    assert (ratio.mean() - 1).abs() < 4 * error + 0.05, (ratio.mean(), error)
    assert error < 0.1
    populations = result.states.reshape(16, 256, 2).mean(1)
    assert ((populations.mean(0) - mean).abs() < 5 * populations.std(0) / 4 + 0.03).all()
    found = result.states.T.cov()
    assert (found - covariance).abs().max() < 0.12 * covariance.abs().max(), (found, covariance)
    plain = M - mean  # there is power: the base is elsewhere
    assert plain.abs().max() > 0.4
    if ess_threshold:
        assert any(step["resampled"] > 0 for step in result.trace)
    else:
        assert all(step["resampled"] == 0 for step in result.trace)


def test_one_step_weighs_the_flow_maps_samples():
    """From t = 0 in one step: samples of the base, weighted by e^r."""
    method = TrajectoryTilting(num_particles=64, grid=TimeGrid(1, 0.0), keep="best")
    x0 = torch.randn(3, 2, generator=seeded())
    result = method(target(), x0, seeded(1))
    noise = torch.cat([x0[:, None], torch.randn(3, 63, 2, generator=seeded(1))], dim=1)
    ends = along_the_flow(0.0, noise)[0]
    r = REWARD(ends.flatten(0, 1)).reshape(3, 64)
    torch.testing.assert_close(result.log_normaliser, r.logsumexp(1) - math.log(64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.rewards, r.amax(1), rtol=1e-4, atol=1e-4)


class MixtureNetwork(nn.Module):
    """The flow map of a Gaussian mixture at t = 0: 12 steps of Heun's method along the oracle's exact drift."""

    state_shape, num_classes, guidance_scales = (2,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self, oracle):
        super().__init__()
        self.oracle, self.one = oracle, nn.Parameter(torch.ones(()))

    def forward(self, s, u, x, t, x_t, conditions):
        s, u = s.expand(len(x)), u.expand(len(x))
        if bool((u == s).all()):
            return self.one * self.oracle.drift(s, x)
        y, h = x, (u - s) / 12
        for k in range(12):
            now = s + k * h
            slope = self.oracle.drift(now, y)
            then = self.oracle.drift((now + h).clamp_max(1.0), y + h[:, None] * slope)
            y = y + h[:, None] * (slope + then) / 2
        return self.one * (y - x) / (u - s)[:, None]


def test_keeping_the_top_raises_the_reward_on_an_exact_mixture():
    """Two modes, one of them good and rare. The reward of the kept particle rises from no selection over the better
    half to the best one alone, each by over 3 standard errors of 192 paired samples; best ones are of the rare mode."""
    oracle = GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], 0.05, weights=[0.9, 0.1])
    of_mixture = Target(MetaFlowMap(MixtureNetwork(oracle)).requires_grad_(False), lambda x: x[:, 0])
    x0 = torch.randn(192, 2, generator=seeded(5))
    found = {}
    for top in (8, 4, 1):
        method = TrajectoryTilting(num_particles=8, grid=TimeGrid(8), ess_threshold=1.0, keep_top=top)
        found[top] = method(of_mixture, x0, seeded(6))
    for more, fewer in ((8, 4), (4, 1)):
        gain = found[fewer].rewards - found[more].rewards
        assert gain.mean() > 3 * gain.std() / 192**0.5, (more, fewer, gain.mean())
        assert found[more].nfe == found[fewer].nfe
    assert (found[1].states[:, 0] > 1).float().mean() > (found[8].states[:, 0] > 1).float().mean() + 0.3
    assert found[1].log_normaliser is None
    assert found[8].log_normaliser is not None


def test_keeping_all_is_no_selection():
    x0 = torch.randn(5, 2, generator=seeded())
    settings = {"num_particles": 6, "grid": TimeGrid(10), "keep": "all"}
    none = TrajectoryTilting(**settings, ess_threshold=0.0)(target(), x0, seeded(1))
    everything = TrajectoryTilting(**settings, ess_threshold=1.0, keep_top=6)(target(), x0, seeded(1))
    assert torch.equal(none.states, everything.states)
    assert torch.equal(none.log_normaliser, everything.log_normaliser)
    half = TrajectoryTilting(**settings, ess_threshold=1.0, keep_top=3)(target(), x0, seeded(1))
    assert not torch.equal(none.states, half.states)


def test_the_top_of_each_poor_sample_goes_on():
    rewards = torch.tensor([[0.1, 3.0, 2.0, -1.0], [9.0, 8.0, 7.0, 6.0]])
    found = top_indices(rewards, torch.tensor([True, False]), 2)
    assert sorted(found[:4].tolist()) == [1, 1, 2, 2]
    assert found[4:].tolist() == [4, 5, 6, 7]


def test_a_constant_reward_tilts_nothing():
    result = TrajectoryTilting(num_particles=8, grid=TimeGrid(7))(
        target(lambda x: 0 * x[:, 0] + 1.5), torch.randn(4, 2, generator=seeded()), seeded(1)
    )
    torch.testing.assert_close(result.log_normaliser, torch.full((4,), 1.5))
    assert all(step["ess"] == pytest.approx(8, rel=1e-5) for step in result.trace)


@pytest.mark.parametrize("K", [1, 2, 6])
def test_evaluations_of_tilting_are_those_of_the_formula(K):
    method = TrajectoryTilting(num_particles=4, grid=TimeGrid(K), max_rows=3)
    result = method(target(), torch.randn(3, 2, generator=seeded()), seeded(1))
    assert result.nfe.network == 12 * (3 * (K - 1) + 1)
    assert result.nfe.reward == 12 * (2 * (K - 1) + 1)
    assert result.nfe.total == 12 * (5 * K - 3)
    steered = Steering(FlowMapGradient(), TimeGrid(K))(target(), torch.randn(3, 2, generator=seeded()))
    assert steered.nfe.total == 3 * 5 * K


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("norm_penalty", [0.0, 0.3])
def test_ascent_on_the_noise_is_that_of_torchs_optimiser(clip, norm_penalty):
    """torch.optim.SGD with Nesterov's momentum on the objective with the closed-form flow map, m + sqrt(c) x0; each
    sample's gradient clipped by torch."""
    x0 = torch.randn(4, 2, generator=seeded())
    method = NoiseOptimisation(
        12, 3, learning_rate=0.05, momentum=0.8, clip=clip, norm_penalty=norm_penalty, max_rows=3
    )
    result = method(target(reward_scale=2.0), x0)
    for i in range(4):
        state, seen = x0[i].clone().requires_grad_(), []
        optimiser = torch.optim.SGD([state], lr=0.05, momentum=0.8, nesterov=True, maximize=True)
        for _ in range(13):
            optimiser.zero_grad()
            x1 = M + math.sqrt(VARIANCE) * state
            r = -((Y - A @ x1) ** 2) / (2 * STD**2) - math.log(math.tau * STD**2) / 2
            seen.append((r.item(), x1.detach().clone()))
            (2 * r + norm_penalty * (state.norm().log() - state.square().sum() / 2)).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([state], clip)
            optimiser.step()
        best = max(seen, key=lambda one: one[0])
        torch.testing.assert_close(result.states[i], best[1], rtol=1e-4, atol=1e-4)
        assert result.rewards[i].item() == pytest.approx(best[0], rel=1e-4, abs=1e-4)
    assert [step["iteration"] for step in result.trace] == list(range(13))
    assert torch.equal(result.best_states, result.states)
    assert result.trace[0]["reward"] < result.rewards.mean()


def test_the_norm_penalty_keeps_the_noise_at_the_norm_of_noise():
    """With no reward, ascent ends where (d-1)/|x| = |x|: at sqrt(d-1)."""
    x0 = torch.tensor([[0.1, 0.0], [0.0, 3.0]])
    flat = target(lambda x: 0 * x[:, 0])
    trace = NoiseOptimisation(200, learning_rate=0.1, clip=None, norm_penalty=1.0)(flat, x0).trace
    assert trace[0]["norm"] == pytest.approx(1.55)
    assert trace[-1]["norm"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("T", "K"), [(1, 1), (4, 3)])
def test_evaluations_of_noise_optimisation_are_those_of_the_formula(T, K):
    result = NoiseOptimisation(T, K)(target(), torch.randn(3, 2, generator=seeded()))
    assert result.nfe.network == 3 * (2 * K * T + K)
    assert result.nfe.reward == 3 * (2 * T + 1)
    assert result.nfe.total == 3 * (T * (2 * K + 2) + K + 1)


def test_what_does_not_fit_is_refused():
    class BlackBox(Reward):
        differentiable = False

        def forward(self, x):
            return x.detach()[:, 0].round()

    x0 = torch.zeros(2, 2)
    for method in (TrajectoryTilting(), NoiseOptimisation(), Steering(FlowMapGradient())):
        black_box = target(BlackBox())
        with pytest.raises(RewardError, match="not differentiable"):
            method(black_box, x0)
        assert black_box.meter.total == 0
        with pytest.raises(TypeError, match="a GaussianMixture has no flow map"):
            method(Target(GaussianMixture([MEAN], VARIANCE), REWARD), x0)
    for make, message in (
        (lambda: NoiseOptimisation(0), "iterations 0"),
        (lambda: NoiseOptimisation(steps=0), "steps 0"),
        (lambda: NoiseOptimisation(momentum=1.0), r"momentum 1.0 must be in \[0, 1\)"),
        (lambda: NoiseOptimisation(learning_rate=0.0), "learning_rate 0.0 and clip 0.1 must be above 0"),
        (lambda: NoiseOptimisation(norm_penalty=-1.0), "norm_penalty -1.0"),
        (lambda: TrajectoryTilting(max_rows=0), "max_rows 0"),
        (
            lambda: TrajectoryTilting(num_particles=8, keep_top=3),
            "keep_top 3 must be at least 1 and divide num_particles 8",
        ),
        (lambda: TrajectoryTilting(keep_top=0), "keep_top 0"),
        (lambda: TrajectoryTilting(grid=TimeGrid(2, 0.1, 0.5)), "end at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
