"""Fine-tuning methods of the benchmark, on a Gaussian with a linear reward, where the tilted flow is a closed form."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from mfm_benchmarks.finetuning import (
    Checkpoint,
    DiffusionNFT,
    DRaFT,
    FlowGRPO,
    MFMFineTuning,
    Problem,
    ReFL,
    Training,
    train,
)
from mfm_benchmarks.finetuning.diffusion_nft import contrast, optimality
from mfm_benchmarks.finetuning.evaluation import path_divergence
from mfm_benchmarks.finetuning.flow_grpo import log_probability
from mfm_benchmarks.finetuning.groups import advantages
from mfm_benchmarks.finetuning.problem import move_towards, weights_of, with_weights
from mfm_lightning.alignment import Target
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import as_times, expand
from tests.closed_form import MEAN, VARIANCE, gaussian_model

REWARD = torch.tensor([1.0, -2.0])  # r(x) = <REWARD, x>: the tilted distribution is N(mean + c REWARD, c)


def shape_of_shift(t):
    """g(t): a shift m of the mean of N(mean, c) adds m g(t) to its drift; g = (1-t) / ((1-t)^2 + c t^2)."""
    return (1 - t) / ((1 - t) ** 2 + VARIANCE * t**2)


class Shifted(nn.Module):
    """The exact flow of N(mean + shift, c), and a second parameter by which trajectories bend."""

    state_shape, num_classes = (2,), 0

    def __init__(self, shift=(0.0, 0.0), bend=0.0):
        super().__init__()
        self.flow = gaussian_model().requires_grad_(False)
        self.shift, self.bend = nn.Parameter(torch.tensor(shift)), nn.Parameter(torch.tensor(bend))

    def drift(self, t, x, conditions=None):
        more = self.shift.to(x) * expand(shape_of_shift(as_times(t, x)), x) + self.bend.to(x) * x.tanh()
        return self.flow.drift(t, x, conditions) + more


def linear(x):
    return x @ REWARD.to(x)


def data(num):
    return torch.tensor(MEAN) + VARIANCE**0.5 * torch.randn(num, 2), Conditions()


def problem(policy, scale=1.0, reward=linear, trained=("shift",), data=data):
    model = gaussian_model().requires_grad_(False)
    for name, p in policy.named_parameters():
        p.requires_grad_(name in trained)
    return Problem(
        policy, list(policy.parameters()), lambda c: Target(model, reward, conditions=c, reward_scale=scale),
        lambda num: Conditions(), data,
    )  # fmt: skip


def gradient(method, given, seed=0):
    torch.manual_seed(seed)
    loss = next(method.losses(given))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, given.parameters)])


def trained(method, given, evaluations=100_000, rate=0.02, average=0.95):
    found = []
    settings = Training(evaluations, [1.0], average=average)
    train(method, given, settings, rate, 0, lambda now: found.append(weights_of(given.parameters)))
    return found[-1][0]


# reward backpropagated


@pytest.mark.parametrize("last", [1, 3, 5])
def test_drafts_gradient_is_that_of_the_last_steps_by_finite_differences(last):
    """Reference: Euler steps written out in float64, the first ones with the parameters held."""
    policy, steps = Shifted((0.3, -0.2), 0.4).double(), 5
    given = problem(policy, trained=("shift", "bend"), reward=lambda x: (x @ REWARD.to(x)).sin())
    x0 = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given.noise = lambda num: x0
    held = copy.deepcopy(policy)

    @torch.no_grad()
    def mean_reward():
        x = x0
        for k in range(steps):
            x = x + (policy if k >= steps - last else held).drift(k / steps, x) / steps
        return float((x @ REWARD.double()).sin().mean())

    expected = []
    for p in given.parameters:
        for flat in range(p.numel()):
            ends = []
            for sign in (1, -1):
                p.data.view(-1)[flat] += sign * 1e-5
                ends.append(mean_reward())
                p.data.view(-1)[flat] -= sign * 1e-5
            expected.append((ends[0] - ends[1]) / 2e-5)
    found = gradient(DRaFT(last, steps, 32), given)
    torch.testing.assert_close(-found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_refl_at_the_last_step_without_pretraining_is_draft_of_one_step():
    given = problem(Shifted((0.3, -0.2), 0.4), trained=("shift", "bend"))
    ours = gradient(ReFL(steps=6, earliest=5, batch_size=32, pretraining=0.0), given)
    torch.testing.assert_close(ours, gradient(DRaFT(1, 6, 32), given))


def test_refl_chooses_each_late_step_and_no_other():
    """By evaluations: one for each step before, one with its gradient after."""
    given, found = problem(Shifted()), set()
    losses = ReFL(steps=6, earliest=3, batch_size=4, pretraining=0.0).losses(given)
    torch.manual_seed(0)
    for _ in range(60):
        before = given.meter.network
        next(losses).backward()
        found.add((given.meter.network - before) // 4 - 2)
    assert found == {3, 4, 5}


def test_refls_pretraining_has_the_base_flow_as_its_minimum():
    """E |b + m g - (x1 - x0)|^2 has the gradient 2 m E g(t)^2 in the shift m."""
    shift = torch.tensor([0.5, -1.0])
    given = problem(Shifted(tuple(shift.tolist())), reward=lambda x: 0 * x[:, 0])
    found = torch.stack([gradient(ReFL(2, 1, 2000), given, seed) for seed in range(30)])
    t = (torch.arange(20000) + 0.5) / 20000
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - 2 * shift * shape_of_shift(t).square().mean()).abs() < 4 * error).all()
    assert (error < 0.05).all()


# policy gradients


def test_flow_grpos_step_is_theirs_in_their_time():
    """x + [v + sigma^2 / (2t) (x + (1-t) v)] dt + sigma sqrt|dt| eps, noise at t = 1, sigma = a sqrt(t / (1-t))."""
    policy, a, x = Shifted((0.3, -0.2), 0.4), 0.7, torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    method, given = FlowGRPO(steps=10, noise_level=a), problem(policy)
    for k in range(1, 9):
        t, dt = 1 - k / 10, -0.1
        v, sigma = -policy.drift(k / 10, x), a * math.sqrt(t / (1 - t))
        step = method.distribution(given.on_policy(Conditions()), k / 10, (k + 1) / 10, x)
        torch.testing.assert_close(step.mean, x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt)
        torch.testing.assert_close(step.stddev, torch.full_like(x, sigma * math.sqrt(-dt)))
        noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(k))
        expected = -(noise.square().sum(1) / 2) - 2 * math.log(sigma * math.sqrt(-dt)) - math.log(2 * math.pi)
        torch.testing.assert_close(log_probability(step, step.mean + step.stddev * noise), expected)


def test_flow_grpos_rollout_remembers_its_own_probabilities_and_leaves_the_noiseless_step_out():
    policy, method = Shifted((0.3, -0.2), 0.4), FlowGRPO(steps=5)
    target = problem(policy).on_policy(Conditions())
    rollout, x1 = method.rollout(target, torch.randn(8, 2))
    assert [round(step.now, 6) for step in rollout] == [0.0, 0.2, 0.4, 0.6]
    for step, then in itertools.pairwise(rollout):
        assert torch.equal(step.x_next, then.x)
    for step in rollout:
        again = method.distribution(target, step.now, step.then, step.x)
        torch.testing.assert_close(log_probability(again, step.x_next), step.log_probability)
    last = rollout[-1].x_next
    torch.testing.assert_close(x1, last + 0.2 * policy.drift(0.8, last))  # the denoiser


def test_flow_grpos_first_gradient_is_advantage_times_score():
    """REINFORCE written out by the gradient of log N(x'; mean, s^2) in the mean, with the KL's closed form."""
    policy = Shifted((0.3, -0.2))
    given, method = problem(policy), FlowGRPO(steps=4, group_size=4, batch_size=8, kl_weight=0.3)
    found = gradient(method, given)
    torch.manual_seed(0)
    rollout, x1 = method.rollout(given.on_policy(Conditions()), given.noise(8))
    A, expected = advantages(linear(x1).detach(), 4), torch.zeros(2)
    for step in rollout:
        of = method.distribution(given.on_policy(Conditions()), step.now, step.then, step.x)
        # d mean / d shift: b enters b + h (t b - x) / (1-t), and the shift b as g(t)
        half = method.half_diffusion(step.now, step.x)[0]
        slope = (step.then - step.now) * (1 + half * step.now / (1 - step.now)) * shape_of_shift(torch.tensor(step.now))
        score = (step.x_next - of.mean) / of.variance * slope
        kl = (slope**2 * policy.shift / of.variance[0]).detach()
        expected += (-(A[:, None] * score).mean(dim=0) + 0.3 * kl).detach() / len(rollout)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_flow_grpo_has_no_gradient_where_the_ratio_is_clipped():
    policy, method = Shifted((0.1, 0.0)), FlowGRPO(steps=3, clip=0.2)
    given = problem(policy)
    target, base = given.on_policy(Conditions()), given.target(Conditions())
    (step, *_), _ = method.rollout(target, torch.randn(4, 2))
    for ratio, sign, moves in ((2.0, 1, False), (2.0, -1, True), (0.5, 1, True), (0.5, -1, False), (1.1, 1, True)):
        old = step._replace(log_probability=step.log_probability - math.log(ratio))
        loss = method._loss(old, sign * torch.ones(4), target, base)
        (slope,) = torch.autograd.grad(loss, policy.shift)
        assert bool(slope.abs().sum() > 0) is moves
        allowed = min(ratio, 1.2) if sign > 0 else max(ratio, 0.8)
        torch.testing.assert_close(loss.detach(), torch.tensor(-sign * allowed))


def test_advantages_are_relative_to_their_group():
    rewards = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 10.0, -1.0, 0.0, 1.0])
    grouped = advantages(rewards, 3).reshape(3, 3)
    torch.testing.assert_close(grouped.mean(dim=1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(grouped.std(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(advantages(rewards, 3, False)[:3], torch.tensor([-2.0, -1.0, 3.0]))
    with pytest.raises(ValueError, match="9 rewards are no whole groups of 2"):
        advantages(rewards, 2)


# the tilted distribution


@pytest.mark.parametrize("gradient", ["reward", "free"])
def test_mfm_ft_reaches_the_tilted_flow(gradient):
    method = MFMFineTuning(gradient, batch_size=128, buffer_size=256)
    given = problem(Shifted(), scale=0.5)
    torch.testing.assert_close(trained(method, given), 0.5 * VARIANCE * REWARD, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["reward", "free"])
def test_mfm_fts_gradient_away_from_the_base_flow_is_that_of_eq_43(kind):
    """By draws of the closed posterior, written out: with w = e^r / E e^r, a policy b + tanh(x) has the gradient
    2 E w tanh(x) . (tanh(x) - (sigma^2/2) grad r), grad r = scale c t / k REWARD."""
    scale, N, generator = 0.5, 400_000, torch.Generator().manual_seed(0)
    t, mean = torch.rand(N, 1, generator=generator), torch.tensor(MEAN)
    x1, x0, noise = torch.randn(3, N, 2, generator=generator)
    x = (1 - t) * x0 + t * (mean + VARIANCE**0.5 * x1)
    k = (1 - t) ** 2 + VARIANCE * t**2
    draw = (mean * (1 - t) ** 2 + VARIANCE * t * x + VARIANCE**0.5 * (1 - t) * k.sqrt() * noise) / k
    r = scale * linear(draw)
    w = (r - r.logsumexp(0) + math.log(N)).exp()
    aim = scale * VARIANCE * (1 - t) / k * REWARD
    expected = 2 * w * (x.tanh() * (x.tanh() - aim)).sum(dim=1)
    without = expected + 2 * (1 - w) * x.tanh().square().sum(dim=1)  # w = 1 on the policy's own change

    given = problem(Shifted(bend=1.0), scale, trained=("bend",))
    method = MFMFineTuning(kind, batch_size=4000, policy_share=0.0)
    found = torch.cat([gradient(method, given, seed) for seed in range(25)])
    error = math.hypot(float(found.std()) / 5, float(expected.std()) / N**0.5)
    assert abs(float(found.mean() - expected.mean())) < 4 * error
    assert abs(float(without.mean() - expected.mean())) > 10 * error


def test_flow_grpo_reaches_the_tilted_flow_where_its_sde_forgets_its_start():
    method = FlowGRPO(20, math.sqrt(2), 64, 64, kl_weight=1.0, normalised=False)
    found = trained(method, problem(Shifted(), scale=0.5), 250_000, average=0.95)
    torch.testing.assert_close(found, 0.5 * VARIANCE * REWARD, atol=0.06, rtol=0)


# DiffusionNFT


def test_nfts_first_gradient_is_positive_minus_negative():
    """At v = v_old: 2 beta (p - (1 - p)) (v_old - (x1 - x0)) by sample."""
    generator = torch.Generator().manual_seed(0)
    v_old, velocity = torch.randn(2, 6, 3, generator=generator)
    p, v = torch.rand(6, generator=generator), v_old.clone().requires_grad_()
    contrast(v, v_old, velocity, p, 0.7).backward()
    torch.testing.assert_close(v.grad, 2 * 0.7 * (2 * p - 1)[:, None] * (v_old - velocity) / 6)


def test_nfts_least_loss_is_their_closed_form():
    """Of one state that is met with velocities u_i and p_i: v = v_old + (2 / beta) mean((p - 1/2) (u - v_old))."""
    generator = torch.Generator().manual_seed(1)
    u, p, v_old = torch.randn(5, 2, generator=generator), torch.rand(5, generator=generator), torch.tensor([0.3, -1.0])
    v = (v_old + 2 / 0.7 * ((p - 0.5)[:, None] * (u - v_old)).mean(dim=0)).requires_grad_()
    contrast(v.expand(5, 2), v_old.expand(5, 2), u, p, 0.7).backward()
    torch.testing.assert_close(v.grad, torch.zeros(2), atol=1e-5, rtol=0)


def test_optimality_is_a_probability_by_group():
    found = optimality(torch.tensor([0.0, 0.0, 0.0, 10.0, 5.0, 5.0, 5.0, 5.0]), 4)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 0.25, 1.0, 0.5, 0.5, 0.5, 0.5]))


def test_nft_moves_along_the_reward():
    """By symmetry the shift's gradient goes along the reward's; a step against it raises the reward."""
    given = problem(Shifted())
    step = -sum(gradient(DiffusionNFT(steps=20, group_size=64, batch_size=512), given, seed) for seed in range(20))
    assert step @ REWARD / (step.norm() * REWARD.norm()) > 0.97


def test_nfts_old_policy_follows_as_they_say():
    """eta = min(rate step, largest), old <- eta old + (1 - eta) new; samples are the old policy's."""
    given, sampled = problem(Shifted()), []
    given.sample = lambda c, num, steps: (sampled.append(given.policy.shift.data.clone()), torch.randn(num, 2))[1]
    losses = DiffusionNFT(decay_rate=0.3, max_decay=0.5).losses(given)
    old = torch.zeros(2)
    for step, new in enumerate(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [4.0, 4.0]])):
        next(losses)
        torch.testing.assert_close(sampled[-1], old)
        given.policy.shift.data = new.clone()
        eta = min(0.3 * (step + 1), 0.5)
        old = eta * old + (1 - eta) * new


# drift, weights, training


def test_path_divergence_of_the_tilted_flow_is_the_divergence_of_the_tilted_distribution():
    """KL(N(mean + m, c) || N(mean, c)) = |m|^2 / (2c)."""
    shift, x0 = (0.4, -0.3), torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    base = gaussian_model()
    with torch.no_grad():
        found = path_divergence(Shifted(shift).drift, base.drift, x0, 400, torch.Generator().manual_seed(1))
    assert found.shape == (64,)
    assert float(found.mean()) == pytest.approx(0.25 / (2 * VARIANCE), rel=0.03)
    assert not path_divergence(base.drift, base.drift, x0, 5).any()


def test_weights_are_other_ones_inside_and_their_own_after_an_error():
    policy = Shifted((1.0, 2.0))
    with with_weights([policy.shift], [torch.tensor([5.0, 6.0])]):
        assert policy.shift.tolist() == [5.0, 6.0]
    with pytest.raises(ZeroDivisionError), with_weights([policy.shift], [torch.tensor([5.0, 6.0])]):
        _ = 1 / 0
    assert policy.shift.tolist() == [1.0, 2.0]
    average = [torch.zeros(2)]
    move_towards(average, [policy.shift], 0.25)
    assert average[0].tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    ("method", "network", "reward"),
    [
        (DRaFT(2, 5, 8), 8 * (5 + 2), 8 * 2),
        (ReFL(6, 5, 8), 8 * (6 + 1) + 8 * 2, 8 * 2),
        (FlowGRPO(5, group_size=4, batch_size=8), 8 * (5 + 4 * 2), 8),
        (FlowGRPO(5, group_size=4, batch_size=8, kl_weight=0.1), 8 * (5 + 4 * 3), 8),
        (DiffusionNFT(steps=5, group_size=4, batch_size=8), 8 * (5 + 1 + 2), 8),
        (MFMFineTuning(batch_size=8, policy_share=0.0, num_draws=3), 8 * (1 + 3 * 2 + 2), 8 * 3 * 2),
        (MFMFineTuning("free", batch_size=8, policy_share=0.0, num_draws=3), 8 * (1 + 3 + 2), 8 * 3),
        (MFMFineTuning("free", batch_size=8, buffer_size=10, ode_steps=7), 70 + 8 * (1 + 1 + 2), 8),
    ],
)
def test_a_steps_evaluations_are_counted_with_its_gradients(method, network, reward):
    given = problem(Shifted())
    next(method.losses(given)).backward()
    assert (given.meter.network, given.meter.reward) == (network, reward)


def run(evaluations=500, checkpoints=(0.5, 1.0), **options):
    given, found = problem(Shifted(), **options), []

    def measure(now: Checkpoint):
        found.append((now.step, now.meter.total, given.policy.shift.tolist()))
        torch.rand(7)  # what measuring draws is no part of the training

    train(DRaFT(1, 4, 8), given, Training(evaluations, list(checkpoints), average=0.9), 0.05, 3, measure)
    return given, found


def test_training_ends_with_its_evaluations_and_is_the_same_again():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    given, found = run()
    assert torch.equal(torch.rand(3), expected)  # the global state is kept
    # 8 samples of 4 steps, one with its gradient, and the reward with its own: 56 a step
    assert [(step, total) for step, total, _ in found] == [(0, 0), (5, 280), (9, 504)]
    assert run()[1] == found
    assert run(checkpoints=(0.1, 0.5, 0.55, 1.0))[1][-1] == found[-1]  # measuring more often changes nothing
    assert len(run(checkpoints=(0.98, 0.99, 1.0))[1]) == 2  # all in one step
    average = found[-1][2]
    assert given.policy.shift.tolist() != average  # measured is the average, which lags behind
    assert abs(average[1]) < abs(given.policy.shift[1].item())


def test_a_loss_that_is_not_finite_ends_the_training():
    given = problem(Shifted((float("nan"), 0.0)))
    given.on_policy = lambda conditions: _Lenient(given.policy)
    with pytest.raises(FloatingPointError, match=r"DRaFT: the loss is nan at step 0 with learning rate 0.05"):
        train(DRaFT(1, 4, 8), given, Training(100), 0.05, 0, lambda now: None)


class _Lenient:
    """A target that scores what is not finite."""

    def __init__(self, policy):
        self.drift = policy.drift

    def expand(self, x):
        return self

    def rewards(self, x):
        return linear(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRaFT(6, 5), "last 6 of 5 steps"),
        (lambda: ReFL(5, 5), r"earliest 5 must be one of the steps 0\.\.4"),
        (lambda: FlowGRPO(batch_size=10, group_size=4), "batch_size 10 must be whole groups of group_size 4"),
        (lambda: FlowGRPO(steps=1), "steps 1 must be at least 2"),
        (lambda: DiffusionNFT(beta=0.0), "beta 0.0 must be above 0"),
        (lambda: MFMFineTuning("none"), "unknown gradient 'none'"),
        (lambda: MFMFineTuning(policy_share=1.5), r"policy_share 1.5 must be in \[0, 1\]"),
        (lambda: Training(checkpoints=[1.0, 0.5]), r"checkpoints \[1.0, 0.5\] must increase"),
        (lambda: problem(Shifted(), trained=()), "Shifted has no parameter to train"),
        (lambda: ReFL().check(Target(gaussian_model(), linear).reward, False), "ReFL trains on clean states"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_without_data_all_states_are_the_policys():
    given = problem(Shifted(), data=None)
    method = MFMFineTuning("free", batch_size=8, buffer_size=16, policy_share=0.0, ode_steps=3)
    next(method.losses(given))
    assert given.meter.network == 16 * 3 + 8 * 3
