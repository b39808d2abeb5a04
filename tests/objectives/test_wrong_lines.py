"""One-line errors that the other tests of objectives, pairs and fine-tuning let pass, each against a closed form.

`tests/mutations/objectives.json` has the errors. Deterministic where no docstring says otherwise.
"""

import math

import pytest
import torch
from torch import nn

from mfm_lightning.alignment.target import Target
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import expand
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules.finetuning import DiffusionSchedule
from mfm_lightning.objectives import TERMS, ConditionTimes, InnerTimes, Objective, Pair, PairSampler, WeightedTerm
from mfm_lightning.objectives.finetuning import (
    Tilt,
    control_cost,
    finetuning_target,
    tilt_by_reward_gradient,
    tilt_without_gradient,
)
from mfm_lightning.objectives.terms import guided_data_velocity
from mfm_lightning.objectives.value import amortised_value_loss
from tests.closed_form import gaussian_model, gaussian_teacher
from tests.objectives.test_objectives import EXACT, gaussian_pair


class ByLabel(nn.Module):
    """v = table[label] + slope u x, with null label 2."""

    state_shape, num_classes, guidance_scales = (2,), 2, (2.5,)
    null_conditions = Conditions(label=2, guidance=1.0)

    def __init__(self):
        super().__init__()
        table = torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.5]], dtype=torch.float64)
        self.table, self.slope = nn.Parameter(table), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, s, u, x, t, x_t, conditions):
        label = conditions.filled(self.null_conditions).expand(len(x), x.device).label
        return self.table[label] + self.slope * expand(u, x) * x


def labelled_pair(label: list[int], guidance: list[float]) -> Pair:
    torch.manual_seed(0)
    x1, x_t = torch.randn(2, len(label), 2, dtype=torch.float64)
    given = Conditions(label=torch.tensor(label), guidance=torch.tensor(guidance, dtype=torch.float64))
    return Pair(x1, torch.rand(len(label)).double(), x_t, given)


def test_model_guidance_is_one_minus_one_over_g_of_the_difference():
    """Eq. 69: x1 - eps + (1 - 1/g) (v_cond - v_uncond), where the slope cancels."""
    pair = labelled_pair([0, 1, 2, 0], [2.5, 4.0, 1.0, 1.0])
    inner = pair.inner(torch.rand(4).double())
    shift = torch.tensor([[0.6 * 2.0, 0.6 * -0.5], [0.75 * 1.0, 0.75 * 2.5], [0.0, 0.0], [0.0, 0.0]]).double()
    found = guided_data_velocity(MetaFlowMap(ByLabel()), pair, inner)
    torch.testing.assert_close(found, pair.x1 - inner.eps + shift, rtol=0, atol=1e-6)  # 1 - 1/g is float32


@pytest.mark.parametrize("name", ["data_diagonal", "mean_flow", "semigroup", "eulerian_self", "lagrangian_self"])
def test_targets_have_no_gradient(name):
    """The gradient of |v - sg(target)|^2 / 2 is residual dv, at the student's own side: dv/d slope = u x, and dv/d
    table[k] = 1 for each row of label k."""
    model, pair = MetaFlowMap(ByLabel()), labelled_pair([0, 1, 2, 0, 1], [2.5, 4.0, 1.0, 2.5, 2.5])
    s, u = torch.linspace(0.1, 0.5, 5).double(), torch.linspace(0.5, 0.9, 5).double()
    inner = pair.inner(s, s if name == "data_diagonal" else u)
    residual = TERMS[name]()(model, None, pair, inner)
    (residual.square().sum() / 2).backward()
    error = residual.detach()
    by_slope = (error * inner.u[:, None] * inner.x).sum()
    by_table = torch.zeros(3, 2).double().index_add_(0, pair.conditions.label, error)
    torch.testing.assert_close(model.network.slope.grad, by_slope, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.network.table.grad, by_table, rtol=1e-10, atol=1e-12)
    assert error.abs().max() > 1e-3  # else it says nothing


@pytest.mark.parametrize("name", EXACT)
def test_samples_with_equal_times_go_with_their_own_states(name):
    """Half of the samples have u = s, and all have other states: on the exact flow map no residual is left."""
    torch.manual_seed(0)
    objective, pair = Objective(inner_times=InnerTimes(equal_rate=0.5)), gaussian_pair(64)
    pair = Pair(pair.x1, pair.t.double(), pair.x_t, pair.conditions)
    assert objective.residual(TERMS[name](), gaussian_model(), gaussian_teacher(), pair).abs().max() < 1e-5
    with torch.no_grad():
        (model := gaussian_model()).network.one.fill_(1.1)
    wrong = objective.residual(TERMS[name](), model, gaussian_teacher(), pair).abs()
    assert wrong[32:].mean() > 1e-3
    assert (wrong[:32].mean() > 1e-3) == name.endswith("teacher")  # on the diagonal the others are trivial


def test_flow_matching_has_a_condition_that_says_nothing():
    """Conditions are at t = 0, and fresh noise: n = 40,000 products with the pair's data and noisy state, whose means
    are 0; z = mean / (std / n^0.5) of three numbers at 4.5: false-alarm rate 2e-5, were the seed not fixed."""
    torch.manual_seed(0)
    pair = gaussian_pair(40_000)
    own = TERMS["flow_matching"]().condition(pair)
    assert torch.equal(own.t, torch.zeros_like(pair.t))
    assert own.conditions is pair.conditions
    for other in (pair.x_t, pair.x1 - pair.x1.mean(dim=0), own.x_t.square() - 1):
        product = (own.x_t * other).sum(dim=1)
        assert product.mean().abs() < 4.5 * product.std() / len(product) ** 0.5


def kolmogorov(samples: torch.Tensor, cdf) -> float:
    """n^0.5 times the largest distance of the empirical distribution from `cdf`; above 2.6 with probability 2 e^{-2
    2.6^2} = 3e-6 whatever the distribution, if it is continuous."""
    ordered, n = samples.double().sort().values, len(samples)
    steps = torch.arange(n + 1).double() / n
    return (n**0.5 * torch.maximum((cdf(ordered) - steps[:-1]).max(), (steps[1:] - cdf(ordered)).max())).item()


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return (1 + torch.erf(x / 2**0.5)) / 2


def test_times_have_the_distributions_that_they_name():
    """Kolmogorov's statistic of n = 20,000 draws, six tests: false-alarm rate 1.6e-5 together, were the seed not
    fixed. P(U^2 < t) = t^0.5; the smaller of two uniforms has 1 - (1-s)^2, the larger u^2. Shifted by 3, sigma = 3 v /
    (1 + 2 v) of uniform v: below s are those with v above (1-s) / (3 - 2 (1-s))."""
    torch.manual_seed(0)
    n, cpu = 20_000, torch.device("cpu")
    assert kolmogorov(ConditionTimes(2.0, 0.0).sample(n, cpu), lambda t: t.sqrt()) < 2.6
    zero = ConditionTimes(2.0, 0.3).sample(n, cpu)
    assert kolmogorov(zero[zero > 0], lambda t: t.sqrt()) < 2.6
    s, u = InnerTimes().two(n, cpu)
    assert kolmogorov(s, lambda t: 1 - (1 - t) ** 2) < 2.6
    assert kolmogorov(u, lambda t: t**2) < 2.6
    logits = torch.logit(InnerTimes("logit_normal", mean=-0.4, std=0.5).one(n, cpu).double())
    assert kolmogorov(logits, lambda x: normal_cdf((x + 0.4) / 0.5)) < 2.6
    shifted = InnerTimes(shift=3.0).one(n, cpu)
    assert kolmogorov(shifted, lambda s: 1 - (1 - s) / (3 - 2 * (1 - s))) < 2.6
    with pytest.raises(ValueError, match="shift 0 must be positive"):
        InnerTimes(shift=0)


def test_equal_times_come_first_and_keep_the_smaller():
    times, torch_state = InnerTimes(equal_rate=0.25), torch.get_rng_state()
    s, u = times.two(16, torch.device("cpu"))
    torch.set_rng_state(torch_state)
    low, high = InnerTimes().two(16, torch.device("cpu"))
    assert torch.equal(s, low)
    assert torch.equal(u, torch.cat([low[:4], high[4:]]))
    annealed = InnerTimes(annealing_steps=8)
    torch.set_rng_state(torch_state)
    s, u = annealed.two(16, torch.device("cpu"), step=2)
    torch.testing.assert_close(u - s, (high - low) / 4)


def test_dropped_rows_lose_their_guidance_and_the_others_keep_it():
    torch.manual_seed(0)
    label = torch.arange(1000) % 3
    pair = PairSampler(class_dropout=0.4, guidance_scale=2.5).sample(
        torch.randn(1000, 2), Conditions(label=label), Conditions(label=3, guidance=1.0)
    )
    dropped = pair.conditions.label == 3
    assert torch.equal(pair.conditions.label[~dropped], label[~dropped])
    assert torch.equal(pair.conditions.guidance, torch.where(dropped, 1.0, 2.5))
    assert 200 < int(dropped.sum()) < 600  # 12 standard deviations


def test_a_sum_of_terms_has_their_weights():
    model, x1 = gaussian_model(), torch.randn(8, 2)
    terms = [WeightedTerm("data_diagonal", weight=0.5), WeightedTerm("semigroup", weight=3.0)]
    found = Objective(terms)(model, None, x1, Conditions())
    torch.testing.assert_close(found["loss"], 0.5 * found["data_diagonal"] + 3.0 * found["semigroup"])


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def draws_at(target, t, x, noise):
    """X = x / 2 + noise, a posterior with known derivative."""
    return x[:, None] / 2 + noise


def linear(x1: torch.Tensor) -> torch.Tensor:
    return x1 @ torch.tensor([0.4, -0.7], dtype=x1.dtype)


def tilted(num_draws: int, level: float = 0.3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, num_draws, 2, generator=generator, dtype=torch.float64)
    return t, x, noise, lambda rewards: torch.full((len(rewards),), level, dtype=torch.float64)


def test_several_draws_are_averaged():
    """X = x/2 + eps and r = a . X: the weight is the mean of e^{r-c}, its gradient the mean of e^{r-c} a / 2;
    without the reward's gradient (e^{r-c} - 1) t (X - D) / (1-t)^2."""
    t, x, noise, level = tilted(4)
    target, base, a = Target(gaussian_model(), linear), torch.randn(3, 2).double(), torch.tensor([0.4, -0.7]).double()
    draws = draws_at(None, t, x, noise)
    weight = (draws @ a - 0.3).exp()
    found = tilt_by_reward_gradient(target, t, x, noise, draws_at, level, base)
    torch.testing.assert_close(found.weight, weight.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient, weight.mean(dim=1)[:, None] * a / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.rewards.double(), draws @ a, rtol=1e-5, atol=1e-6)
    free = tilt_without_gradient(target, t, x, noise, draws_at, level, base)
    centred = draws - (x + (1 - t)[:, None] * base)[:, None]
    mean = ((weight - 1)[..., None] * centred).mean(dim=1)
    torch.testing.assert_close(free.gradient, (t / (1 - t) ** 2)[:, None] * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(free.weight, weight.mean(dim=1), rtol=1e-5, atol=1e-6)


def test_a_constant_reward_leaves_no_noise_without_gradient():
    """e^{r-c} - 1 is 0 there for each draw: that is what the control variate is for."""
    t, x, noise, level = tilted(1, 5.0)
    target = Target(gaussian_model(), lambda x1: torch.full((len(x1),), 5.0, dtype=torch.float64))
    found = tilt_without_gradient(target, t, x, noise, draws_at, level, torch.zeros_like(x))
    assert found.gradient.abs().max() < 1e-12
    assert torch.equal(found.weight, torch.ones(3).double())


def test_the_target_has_the_terms_of_eq_43_and_no_gradient():
    base, policy = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]], requires_grad=True)
    tilt = Tilt(torch.tensor([1.5]), torch.tensor([[0.2, 0.4]]), torch.zeros(1, 1), torch.tensor([[7.0, -7.0]]))
    terms = finetuning_target(base, policy, tilt, torch.tensor([4.0]))
    expected = ([[1.0, 2.0]], [[-0.5 * 2.0, -0.5 * -3.0]], [[4.0 * 0.2, 4.0 * 0.4]])
    for found, value in zip(terms, expected, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, torch.tensor(value))


def test_the_diffusion_schedule_is_eq_14():
    t = torch.tensor([0.1, 0.2, 0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(DiffusionSchedule(100.0)(t), torch.tensor([9.0, 4.0, 1.0, 0.25]).double())
    assert DiffusionSchedule(2.0)(t).max() == 2.0
    assert torch.equal(DiffusionSchedule(constant=3.0)(t), torch.full_like(t, 3.0))


def kl(mean: float, variance: float, of_mean: float, of_variance: float) -> float:
    """KL(N(mean, variance) || N(of_mean, of_variance))."""
    return (variance / of_variance + (mean - of_mean) ** 2 / of_variance - 1 - math.log(variance / of_variance)) / 2


@pytest.mark.parametrize("states", ["tilted", "data"])
def test_the_control_cost_is_a_divergence_in_the_direction_of_its_states(states):
    """Data N(m, c), r = -x^2 / 2 tau: the tilted distribution is N(m c'/c, c'), 1/c' = 1/c + 1/tau. The posterior is
    N(M, v), M = (m (1-t)^2 + c t x) / k, v = c (1-t)^2 / k, k = (1-t)^2 + c t^2, and V' = -M / (tau + v) c t / k. The
    mean of (sigma^2/2) V'^2 over noised samples of N(n, d), where M has mean (m (1-t)^2 + c t^2 n) / k and deviation (c
    t / k) ((1-t)^2 + t^2 d)^0.5, is integrated by midpoints: KL(tilted || data) over tilted states, KL(data || tilted)
    over data."""
    m, c, tau = 0.8, 0.6, 0.5
    tilted = (m * (1 / c) / (1 / c + 1 / tau), 1 / (1 / c + 1 / tau))
    n, d = tilted if states == "tilted" else (m, c)
    t = (torch.arange(20_000).double() + 0.5) / 20_000
    k = (1 - t) ** 2 + c * t**2
    M, deviation = (m * (1 - t) ** 2 + c * t**2 * n) / k, c * t / k * ((1 - t) ** 2 + t**2 * d).sqrt()
    scale, half = c * t / k / (tau + c * (1 - t) ** 2 / k), (1 - t) / t
    # two states for each time, at one deviation either side: they have the mean square of all
    slope = -torch.stack([M + deviation, M - deviation], dim=1) * scale[:, None]
    cost = control_cost(torch.zeros_like(slope), half[:, None] * slope, half) / 2
    late = half < 0.05  # counted at 0.05 there: half / 0.05 of what it is
    exact = torch.where(late, cost * 0.05 / half, cost).mean()
    direction = kl(*tilted, m, c) if states == "tilted" else kl(m, c, *tilted)
    assert exact.item() == pytest.approx(direction, rel=1e-4)
    assert cost.mean().item() == pytest.approx(direction, rel=0.02)
    assert abs(kl(*tilted, m, c) / kl(m, c, *tilted) - 1) > 0.2  # the two directions differ


# -- the amortised value -----------------------------------------------------------------------------------------------


def test_the_value_loss_goes_on_by_its_tangent():
    """d/dV of e^{r-V} + V is 1 - e^{r-V}, and 1 - e^10 where r - V is above 10; the loss is continuous there."""
    rewards = torch.tensor([[1.0], [9.9], [10.1], [500.0]], dtype=torch.float64)
    value = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = amortised_value_loss(value, rewards)
    loss.sum().backward()
    slopes = [1 - math.exp(1.0), 1 - math.exp(9.9), 1 - math.exp(10), 1 - math.exp(10)]
    torch.testing.assert_close(value.grad, torch.tensor(slopes).double())
    tangent = [math.exp(1.0), math.exp(9.9), math.exp(10) * 1.1, math.exp(10) * 491]
    torch.testing.assert_close(loss.detach(), torch.tensor(tangent).double())
    exact = torch.zeros(3, requires_grad=True)  # in float32: no rounding of e^10 in the gradients of small terms
    amortised_value_loss(exact, torch.tensor([[-12.0], [-3.0], [0.5]])).sum().backward()
    expected = torch.tensor([1 - math.exp(-12.0), 1 - math.exp(-3.0), 1 - math.exp(0.5)])
    torch.testing.assert_close(exact.grad, expected, rtol=0, atol=1e-6)
    several = amortised_value_loss(torch.zeros(1).double(), torch.tensor([[0.0, math.log(3.0)]]).double())
    torch.testing.assert_close(several, torch.tensor([2.0]).double())


@pytest.mark.parametrize(("deviation", "bias"), [(2.0, 0.0), (3.0, -0.019), (4.0, -0.296)])
def test_the_tangents_bias_is_what_the_docs_say(deviation, bias):
    """Rewards N(0, s^2), V = s^2 / 2. The minimiser v solves E[min(e^{r-v}, e^10)] = 1, that is
    e^{s^2/2 - v} Phi((v + 10)/s - s) + e^10 (1 - Phi((v + 10)/s)) = 1; by bisection; the loss is flat there."""

    def mean(v: float) -> float:
        z = (v + 10) / deviation
        tail = math.erfc(z / 2**0.5) / 2
        return math.exp(deviation**2 / 2 - v) * math.erfc((deviation - z) / 2**0.5) / 2 + math.exp(10) * tail

    low, high = 0.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > 1 else (low, middle)
    assert low - deviation**2 / 2 == pytest.approx(bias, abs=5e-4)
    r = deviation * torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-((r / deviation) ** 2) / 2)
    v = torch.full((len(r),), low, dtype=torch.float64, requires_grad=True)
    ((weight / weight.sum()) @ amortised_value_loss(v, r[:, None])).backward()
    assert abs(v.grad.sum().item()) < 1e-5
