"""What an objective's minimiser is: adaptive weights on noisy targets, and terms that a constant map satisfies."""

from itertools import chain, combinations

import pytest
import torch
from torch import nn

from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import interpolate
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.objectives import (
    TERMS,
    ConditionTimes,
    InnerTimes,
    Objective,
    PairSampler,
    WeightedTerm,
    adaptive_loss,
    squared_error,
)
from mfm_lightning.objectives.pairs import InnerSample
from mfm_lightning.objectives.teachers import teacher_velocity
from tests.closed_form import MEAN, VARIANCE, gaussian_model, gaussian_teacher
from tests.objectives.test_objectives import gaussian_pair

DATA = ["flow_matching", "data_diagonal", "mean_flow"]
SELF = ["semigroup", "lagrangian_self", "eulerian_self"]
PINNING = ["data_diagonal", "distilled_diagonal", "mean_flow", "lagrangian_teacher", "eulerian_teacher", "ode_teacher"]


def slope(v: float, p: float, c: float) -> float:
    """Derivative in v of the expected adaptive loss, where the target is 0 with probability 0.8 and 3 with 0.2."""
    v = torch.tensor(v, dtype=torch.float64, requires_grad=True)
    probability, target = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.0, 3.0]).double()
    error = squared_error((v - target)[:, None]).double()  # its sum of squares is float32
    (probability @ adaptive_loss(error, p, c)).backward()
    return v.grad.item()


def test_an_adaptive_weight_moves_the_minimiser_off_the_mean_of_noisy_targets():
    """Targets 0 and 3 with probabilities 0.8 and 0.2, of mean 0.60. The minimiser v solves
    0.8 v / (v^2 + c)^p = 0.2 (3-v) / ((3-v)^2 + c)^p. With c = 0.1, and a = (3-v)^2 + c for short:
    p = 1: v a = (v^2 + c) (3-v) / 4, so v = 0.008 to leading order c / 12; p = 0.5: v^2 = c k / (1-k) with
    k = (3-v)^2 / (16 a), so v = 0.08, c^0.5 / 15^0.5 to leading order."""
    c, v_half, v_one = 0.1, (0.1 / 15) ** 0.5, 0.1 / 12
    for _ in range(50):  # the fixed points of both, to rounding
        k = (3 - v_half) ** 2 / (16 * ((3 - v_half) ** 2 + c))
        v_half = (c * k / (1 - k)) ** 0.5
        v_one = (v_one**2 + c) * (3 - v_one) / (4 * ((3 - v_one) ** 2 + c))
    assert (round(v_half, 2), round(v_one, 3)) == (0.08, 0.008)
    for p, minimiser in ((0.0, 0.6), (0.5, v_half), (1.0, v_one)):
        assert abs(slope(minimiser, p, c)) < 1e-6, p
        assert slope(minimiser - 1e-3, p, c) < -1e-5, p
        assert slope(minimiser + 1e-3, p, c) > 1e-5, p
    for name in TERMS:  # what a config without p gets
        assert WeightedTerm(name).power == (0.0 if name in DATA else 1.0), name
        assert WeightedTerm(name, p=0.5).power == 0.5
    assert abs(slope(0.6, WeightedTerm("data_diagonal").power, c)) < 1e-6


def test_the_objective_weighs_by_the_power_of_each_term():
    pair_of = PairSampler(ConditionTimes(2.0, 0.1), class_dropout=0.0)
    model, x1 = gaussian_model(), torch.tensor(MEAN) + VARIANCE**0.5 * torch.randn(64, 2)
    for p in (None, 0.0, 0.5):
        terms = [WeightedTerm("data_diagonal", p=p, c=0.3), WeightedTerm("mean_flow", p=p, c=0.3)]
        torch.manual_seed(0)
        found = Objective(terms, pair_of)(model, None, x1, Conditions())
        for name in ("data_diagonal", "mean_flow"):
            if not p:
                assert torch.equal(found[name], found[f"error/{name}"])
            else:
                assert found[name] < found[f"error/{name}"] ** 0.5  # error / (error + c)^0.5, of a mean above 1


@pytest.mark.parametrize("name", TERMS)
def test_noisy_targets_are_those_that_differ_at_the_same_states(name):
    """Data and noise are exchanged for others with the same inner interpolant x: a target that is a function of
    (s, u, x, t, x_t) stays, x1 - eps does not."""
    torch.manual_seed(0)
    model, teacher, pair = gaussian_model(), gaussian_teacher(), gaussian_pair(16)
    term, s, u = TERMS[name](), torch.full((16,), 0.25).double(), torch.full((16,), 0.75).double()
    inner = pair.inner(s, u)
    inner.teacher_velocity = teacher_velocity(teacher, s, inner.x, pair.t, pair.x_t, pair.conditions)
    other = InnerSample(s, u, inner.eps - 1, inner.x, 0, inner.teacher_velocity)
    moved = pair.__class__(pair.x1 + 3.0, pair.t, pair.x_t, pair.conditions)
    torch.testing.assert_close(interpolate(s, other.eps, moved.x1), inner.x)
    found = []
    for p, sample in ((pair, inner), (moved, other)):
        torch.manual_seed(1)  # semigroup's gamma
        found.append(term(model, teacher, p, sample).detach())
    change = (found[0] - found[1]).abs()
    assert TERMS[name].noisy_target == bool((change > 0.1).all()) == bool(change.max() > 1e-12)
    assert TERMS[name].noisy_target == (name in DATA)


class Constant(nn.Module):
    """v = a, whatever the times and states."""

    state_shape, num_classes, guidance_scales = (2,), 0, ()
    null_conditions = Conditions(label=0, guidance=1.0)

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, s, u, x, t, x_t, conditions):
        return self.value.expand(len(x), -1) + 0 * (x.sum() + s.sum() + u.sum())  # derivatives are there, and 0


@pytest.mark.parametrize("equal_rate", [0.0, 0.5, 1.0])
def test_a_constant_map_satisfies_the_terms_that_do_not_pin(equal_rate):
    """Semigroup: gamma a + (1-gamma) a = a; Lagrangian: v_{u,u} - (u-s) d/du v = a; Eulerian: v_s + (u-s) 0 = a.
    From data the residual is a - (x1 - eps), so the mean error is |a - mu|^2 + 2 (c + 1) for data N(mu, c I) in two
    dimensions. n = 40,000 errors; z-test at 4.5 standard errors, for 3 terms and 3 rates: false-alarm rate 6e-5."""
    torch.manual_seed(0)
    a, num = [0.7, -0.2], 40_000
    model, objective = MetaFlowMap(Constant(a)), Objective(inner_times=InnerTimes(equal_rate=equal_rate))
    pair = gaussian_pair(num)
    for name in SELF:
        residual = objective.residual(TERMS[name](), model, None, pair)
        assert residual.shape == (num, 2)
        assert residual.abs().max() < 1e-12, name
    for name in ("data_diagonal", "flow_matching", "mean_flow"):
        error = objective.residual(TERMS[name](), model, None, pair).square().sum(dim=1)
        expected = sum((p - q) ** 2 for p, q in zip(a, MEAN, strict=True)) + 2 * (VARIANCE + 1)
        assert abs(error.mean() - expected) < 4.5 * error.std() / num**0.5, name
    for name in ("distilled_diagonal", "lagrangian_teacher", "eulerian_teacher", "ode_teacher"):
        error = objective.residual(TERMS[name](), model, gaussian_teacher(), pair).square().sum(dim=1)
        assert error.mean() > 0.1, name


@pytest.mark.parametrize("equal_rate", [0.0, 0.5, 1.0])
def test_objectives_that_cannot_pin_the_diagonal_are_refused(equal_rate):
    times = InnerTimes(equal_rate=equal_rate)
    for names in chain.from_iterable(combinations(SELF, n) for n in (1, 2, 3)):
        terms = [WeightedTerm(name) for name in names]
        with pytest.raises(ValueError, match=f"nothing pins the diagonal.*{names[0]}.*add one of data_diagonal"):
            Objective(terms, inner_times=times)
        for term in PINNING:
            assert Objective([WeightedTerm(term), *terms], inner_times=times).terms
            with pytest.raises(ValueError, match="nothing pins"):
                Objective([*terms, WeightedTerm(term, weight=0.0)], inner_times=times)
            with pytest.raises(ValueError, match=r"nothing pins.*\(step 0\)"):
                Objective([*terms, WeightedTerm(term, start_step=1)], inner_times=times)
    for term in PINNING:
        assert Objective([WeightedTerm(term)], inner_times=times).terms


def test_a_diagonal_is_pinned_where_and_when_the_consistency_term_looks_at_it():
    flow, later = WeightedTerm("flow_matching"), WeightedTerm("semigroup", start_step=10)
    assert Objective([flow]).base_flow_only
    # flow matching is the diagonal at t = 0, and says nothing of other t
    with pytest.raises(ValueError, match="nothing pins"):
        Objective([flow, WeightedTerm("semigroup")])
    for always in (ConditionTimes(power=0.0), ConditionTimes(zero_rate=1.0)):
        assert not Objective([flow, WeightedTerm("semigroup")], PairSampler(always)).base_flow_only
    assert Objective([flow, later, WeightedTerm("data_diagonal", start_step=10)]).terms
    with pytest.raises(ValueError, match=r"nothing pins.*\(step 10\)"):
        Objective([flow, later, WeightedTerm("data_diagonal", start_step=11)])
    with pytest.raises(ValueError, match="no term trains at the first step"):
        Objective([WeightedTerm("data_diagonal", start_step=1)])
