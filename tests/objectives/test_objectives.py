"""Objectives on a flow map known in closed form, and at the ends of every time."""

from itertools import pairwise

import pytest
import torch

from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT, UNet
from mfm_lightning.objectives import (
    TERMS,
    ConditionTimes,
    InnerTimes,
    Objective,
    Pair,
    PairSampler,
    WeightedTerm,
    adaptive_loss,
    squared_error,
)
from mfm_lightning.objectives.teachers import ModelTeacher, teacher_velocity
from mfm_lightning.objectives.terms import Consistency, guided_data_velocity, least_alpha
from tests.closed_form import MEAN, VARIANCE, gaussian_model, gaussian_teacher

EXACT = ["semigroup", "lagrangian_self", "lagrangian_teacher", "eulerian_self", "eulerian_teacher"]
CONSISTENCY = [name for name, term in TERMS.items() if issubclass(term, Consistency)]


def gaussian_pair(num: int, dtype=torch.float64) -> Pair:
    x1 = torch.tensor(MEAN, dtype=dtype) + VARIANCE**0.5 * torch.randn(num, 2, dtype=dtype)
    t = torch.rand(num, dtype=dtype) * 0.95
    x_t = (1 - t)[:, None] * torch.randn_like(x1) + t[:, None] * x1
    return Pair(x1, t, x_t, Conditions(label=torch.zeros(num, dtype=torch.long), guidance=torch.ones(num, dtype=dtype)))


def residual_at(name, model, teacher, pair: Pair, s, u):
    inner = pair.inner(s, u)
    inner.teacher_velocity = teacher_velocity(teacher, s, inner.x, pair.t, pair.x_t, pair.conditions)
    return TERMS[name]().residual(model, teacher, pair, inner)


@pytest.mark.parametrize("name", EXACT)
def test_residual_vanishes_on_the_exact_flow_map(name):
    torch.manual_seed(0)
    pair = gaussian_pair(500)
    times = torch.rand(2, 500, dtype=torch.float64).sort(dim=0).values
    residual = residual_at(name, gaussian_model(), gaussian_teacher(), pair, *times)
    assert residual.abs().max() < 1e-9


def test_a_solved_teacher_is_the_exact_flow_map_to_second_order():
    """Heun's error falls by four where the steps are halved; on the last step to u = 1 it is of the same order. A flow
    map that is wrong by a tenth is seen. Each step asks the teacher twice, and u = s once."""
    torch.manual_seed(0)
    pair, model, teacher, asked = gaussian_pair(500), gaussian_model(), gaussian_teacher(), []
    times = torch.rand(2, 500, dtype=torch.float64).sort(dim=0).values
    for ends in (times, (torch.zeros_like(times[0]), torch.ones_like(times[1]))):
        inner = pair.inner(*ends)
        by_steps = [
            WeightedTerm("ode_teacher", options={"steps": n}).build("auto")(model, teacher, pair, inner).abs().mean()
            for n in (8, 16, 32, 64)
        ]
        assert by_steps[-1] < 1e-3
        assert all(3.3 < coarse / fine < 5 for coarse, fine in pairwise(by_steps)), by_steps
    term, drift = WeightedTerm("ode_teacher", options={"steps": 3}).build("auto"), teacher.drift
    teacher.drift = lambda *args: (asked.append(1), drift(*args))[1]
    term(model, teacher, pair, pair.inner(*times))
    assert len(asked) == term.teacher_evaluations == 6
    s = times[0]
    assert term(model, teacher, pair, pair.inner(s, s.clone(), num_equal=500)).abs().max() < 1e-9  # exact: no step
    assert len(asked) == 7
    with torch.no_grad():
        model.network.one.fill_(1.1)
    assert term(model, teacher, pair, inner).abs().mean() > 1e-2


def test_a_share_of_the_inner_times_is_the_step_of_a_draw():
    torch.manual_seed(0)
    s, u = InnerTimes(equal_rate=0.25, draw_rate=0.5).two(64, torch.device("cpu"))
    assert torch.equal(s[:16], u[:16])
    assert bool((s[16:32] < u[16:32]).all())
    assert bool((s[:32] > 0).all() and (u[:32] < 1).all())
    assert torch.equal(s[32:], torch.zeros(32))
    assert torch.equal(u[32:], torch.ones(32))
    s, u = InnerTimes(equal_rate=0.5, draw_rate=0.5).two(3, torch.device("cpu"))  # rates that do not divide the batch
    assert s.tolist()[2:] == [0.0]
    assert torch.equal(s[:2], u[:2])
    for equal, draw, said in (
        (0.6, 0.5, "more than 1 together"),
        (0.0, 1.5, "draw_rate 1.5"),
        (0.0, -1, "draw_rate -1"),
    ):
        with pytest.raises(ValueError, match=said):
            InnerTimes(equal_rate=equal, draw_rate=draw)


def alpha_term(alpha: float):
    """eulerian_teacher, whose alpha is the same at all steps."""
    term = WeightedTerm("eulerian_teacher", options={"alpha_steps": 1}).build("auto")
    term.alpha = lambda step, least: alpha
    return term


def test_a_difference_over_a_share_of_the_way_comes_to_the_derivative():
    """alpha-Flow (arXiv 2510.20771): on a flow map that is wrong, the residual with a difference is that with the
    derivative, to first order in alpha; at alpha = 1 it is v_{s,u} - v_s. Its gradient is that of v_{s,u} alone."""
    torch.manual_seed(0)
    pair, model, teacher = gaussian_pair(500), gaussian_model(), gaussian_teacher()
    with torch.no_grad():
        model.network.one.fill_(1.1)
    s, u = torch.rand(2, 500, dtype=torch.float64).sort(dim=0).values
    inner = pair.inner(s, u)
    inner.teacher_velocity = teacher_velocity(teacher, s, inner.x, pair.t, pair.x_t, pair.conditions)
    residuals = {a: alpha_term(a)(model, teacher, pair, inner) for a in (1.0, 1e-2, 5e-3, 2.5e-3, 0.0)}
    v = model(s, u, inner.x, pair.t, pair.x_t, pair.conditions)
    assert (residuals[1.0] - (v - inner.teacher_velocity)).abs().max() < 1e-12
    # the paper's loss regresses on alpha v_s + (1 - alpha) v_{w,u}(x_w), and divides by alpha
    w, x_w = s + 0.4 * (u - s), inner.x + (0.4 * (u - s))[:, None] * inner.teacher_velocity
    paper = v - (0.4 * inner.teacher_velocity + 0.6 * model(w, u, x_w, pair.t, pair.x_t, pair.conditions))
    assert (alpha_term(0.4)(model, teacher, pair, inner) - paper / 0.4).abs().max() < 1e-12
    errors = [(residuals[a] - residuals[0.0]).abs().mean().item() for a in (1e-2, 5e-3, 2.5e-3)]
    assert errors[0] < 0.02 * residuals[0.0].abs().mean()
    assert all(1.9 < coarse / fine < 2.1 for coarse, fine in pairwise(errors)), errors
    slope = [
        torch.autograd.grad(x.sum(), model.network.one, retain_graph=True)[0].item()
        for x in (v, residuals[1e-2], residuals[0.0])
    ]
    assert slope[1] == pytest.approx(slope[0], rel=1e-9)
    assert slope[2] == pytest.approx(slope[0], rel=1e-9)


def test_alpha_falls_by_a_sigmoid_and_the_objective_follows_it():
    term = WeightedTerm("eulerian_teacher", options={"alpha_steps": 1000}).build("auto")
    # 1 / (1 + e^(25 (k/1000 - 1/2))): 0.9241, 0.5, 0.0759; 0.9981 and 0.0019 are put to the ends
    expected = [1.0, 1.0, 0.9241418, 0.5, 0.0758582, 0.0, 0.0, 0.0]
    assert [term.alpha(k) for k in (0, 250, 400, 500, 600, 750, 1000, 10**9)] == pytest.approx(expected, abs=1e-7)
    assert (term.alpha(650), term.alpha(650, 0.05)) == (pytest.approx(0.0229774, abs=1e-7), 0.0)  # e^3.75 = 42.52
    assert WeightedTerm("mean_flow").build("auto").alpha(0) == 0.0
    with pytest.raises(ValueError, match="alpha_steps '400' must be a whole number that is not"):
        Objective([WeightedTerm("eulerian_teacher", options={"alpha_steps": "400"})])
    with pytest.raises(ValueError, match="alpha_steps -1 must be a whole number that is not negative"):
        Objective([WeightedTerm("eulerian_teacher", options={"alpha_steps": -1})])

    model, teacher = gaussian_model(), gaussian_teacher()
    with torch.no_grad():
        model.network.one.fill_(1.1)

    def loss(step: int, **options: int) -> float:
        torch.manual_seed(0)
        terms = [WeightedTerm("eulerian_teacher", p=0.0, options=options)]
        objective = Objective(terms, PairSampler(class_dropout=0.0), InnerTimes(equal_rate=0.25))
        return objective(model, teacher, torch.randn(64, 2).double(), Conditions(), step)["loss"].item()

    assert loss(0, alpha_steps=1000) == loss(200, alpha_steps=1000) != pytest.approx(loss(0))
    assert loss(1000, alpha_steps=1000) == loss(0)
    assert loss(400, alpha_steps=1000) not in (loss(0), loss(0, alpha_steps=1000))


def test_alpha_is_not_small_where_its_rounding_would_count():
    x = torch.zeros(1)
    assert least_alpha(x) == least_alpha(x.half()) == 0.005
    assert least_alpha(x.bfloat16()) == 0.05
    for dtype, least in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
        with torch.autocast("cpu", dtype):
            assert least_alpha(x) == least
    model, teacher, pair = gaussian_model(), gaussian_teacher(), gaussian_pair(10)
    inner = pair.inner(torch.full((10,), 0.2).double(), torch.full((10,), 0.6).double(), step=650)  # alpha = 0.023
    inner.teacher_velocity = teacher_velocity(teacher, inner.s, inner.x, pair.t, pair.x_t, pair.conditions)
    asked, term = [], WeightedTerm("eulerian_teacher", options={"alpha_steps": 1000}).build("auto")
    term._difference = lambda *args: (asked.append(args[-1]), inner.x)[1]
    term(model, teacher, pair, inner)
    with torch.autocast("cpu", torch.bfloat16):
        term(model, teacher, pair, inner)
    assert asked == [pytest.approx(0.0229774, abs=1e-7)]  # in bfloat16 it is the derivative already


def test_a_backend_that_the_network_cannot_take_is_refused_at_the_first_step():
    """Not where the derivative sets in, after alpha has fallen."""

    class Plain(torch.nn.Module):
        state_shape, num_classes, guidance_scales, null_conditions = (2,), 0, (), Conditions()

        def forward(self, s, u, x, t, x_t, conditions):
            return x

    for backend, network, said in (
        ("explicit", Plain(), "Plain does not propagate tangents itself"),
        ("functorch", DiT(8, 4, 1, 16, 2, 2, 1, num_classes=0), "checkpointed activations do not go with"),
    ):
        network.checkpoint_activations = True
        x = torch.randn(2, *(network.state_shape))
        pair, term = Pair(x, torch.zeros(2), x, Conditions()), TERMS["mean_flow"](backend, alpha_steps=100)
        with pytest.raises(ValueError, match=said):
            term.residual(MetaFlowMap(network), None, pair, pair.inner(torch.zeros(2), torch.ones(2)))


def test_options_of_a_term_are_its_own():
    for name, options, said in (
        ("ode_teacher", {"step": 8}, "'ode_teacher' has the options steps, got step"),
        ("ode_teacher", {"backend": "functorch"}, "has the options steps, got backend"),
        ("mean_flow", {"steps": 8}, "'mean_flow' has the options alpha_steps, got steps"),
        ("semigroup", {"steps": 8}, "'semigroup' has no options, got steps"),
        ("data_diagonal", {"steps": 8}, "'data_diagonal' has no options, got steps"),
    ):
        with pytest.raises(ValueError, match=said):
            WeightedTerm(name, options=options)
    with pytest.raises(ValueError, match="steps 0 of ode_teacher must be at least 1"):
        Objective([WeightedTerm("ode_teacher", options={"steps": 0})])


def test_residual_detects_a_wrong_flow_map():
    torch.manual_seed(0)
    pair, model = gaussian_pair(500), gaussian_model()
    with torch.no_grad():
        model.network.one.fill_(1.1)
    times = torch.rand(2, 500, dtype=torch.float64).sort(dim=0).values
    for name in EXACT:
        residual = residual_at(name, model, gaussian_teacher(), pair, *times)
        assert residual.abs().mean() > 1e-3, name


@pytest.mark.parametrize("name", ["data_diagonal", "flow_matching", "mean_flow", "distilled_diagonal"])
def test_residual_vanishes_on_average_given_the_state(name):
    # E[residual] = E[residual * x_t] = 0; 4 z-tests at 4.5 standard errors: false-alarm rate below 3e-5.
    torch.manual_seed(0)
    pair = gaussian_pair(100_000)
    residual = Objective().residual(TERMS[name](), gaussian_model(), gaussian_teacher(), pair).detach()
    # flow matching has a condition of its own, so pair.x_t tells about x1 there
    for weighted in (residual,) if name == "flow_matching" else (residual, residual * pair.x_t):
        z = weighted.mean(0) / (weighted.std(0) / len(weighted) ** 0.5 + 1e-9)
        assert z.abs().max() < 4.5, f"{name}: z = {z.tolist()}"


def perturbed(model: MetaFlowMap) -> MetaFlowMap:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", CONSISTENCY)
@pytest.mark.parametrize(("s", "u"), [(0.3, 0.3), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("t", [0.0, 0.5, 1 - 1e-6])
def test_gradient_is_finite_at_the_ends(name, s, u, t):
    torch.manual_seed(0)
    make = lambda: perturbed(MetaFlowMap(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=3, guidance_scales=(2.5,))))  # noqa: E731
    model, teacher, B = make(), ModelTeacher(make(), omega=0.6), 4
    x1 = torch.randn(B, 1, 4, 4)
    times = torch.full((B,), t)
    x_t = (1 - t) * torch.randn_like(x1) + t * x1
    given = Conditions(label=torch.tensor([0, 1, 2, 3]), guidance=torch.tensor([2.5, 2.5, 2.5, 1.0]))
    pair = Pair(x1, times, x_t, given)
    residual_at(name, model, teacher, pair, torch.full((B,), s), torch.full((B,), u)).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "network", [MLP(2, 32, 2), DiT(4, 2, 1, 16, 2, 2, 1, num_classes=3), UNet(4, 1, 8, (1, 2), 1, (), 2, 3, 4)]
)
def test_initialisation_ignores_the_condition(network):
    torch.manual_seed(0)
    for p in network.parameters():  # a network whose output layer is not zero any more
        if p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.1)
    network.reset_condition()
    model, x = MetaFlowMap(network), torch.randn(8, *network.state_shape)
    s, u = torch.rand(2, 8).sort(dim=0).values
    with torch.no_grad():
        reference = model.velocity(s, u, x, 0.0, torch.zeros_like(x))
        assert reference.abs().max() > 0
        assert torch.equal(model.velocity(s, u, x, torch.rand(8), torch.randn_like(x)), reference)


def test_pairs_are_pure_noise_at_time_zero_and_drop_classes():
    torch.manual_seed(0)
    sampler = PairSampler(ConditionTimes(power=2.0, zero_rate=0.1), class_dropout=0.2, guidance_scale=2.5)
    null = Conditions(label=3, guidance=1.0)
    pair = sampler.sample(torch.full((20_000, 1), 7.0), Conditions(label=0), null)
    assert abs((pair.t == 0).float().mean() - 0.1) < 4.5 * (0.09 / 20_000) ** 0.5
    assert abs(pair.x_t[pair.t == 0].mean()) < 4.5 / (0.1 * 20_000) ** 0.5 * 1.2
    label, guidance = pair.conditions.label, pair.conditions.guidance
    assert abs((label == 3).float().mean() - 0.2) < 4.5 * (0.16 / 20_000) ** 0.5
    assert torch.equal(guidance == 1, label == 3)
    assert torch.equal(guidance == 2.5, label == 0)
    unlabelled = PairSampler().sample(torch.zeros(4, 1), Conditions(), null).conditions
    assert unlabelled.guidance is None
    assert unlabelled.label.tolist() == [3] * 4


def test_guidance_of_the_data_calls_the_model_once_whatever_was_dropped():
    """Under FSDP a rank that left the call out, for all of its labels were dropped, would make the others hang."""
    torch.manual_seed(0)
    network, called = MLP(2, 16, 1, num_classes=3, guidance_scales=(2.5,)), []
    network.register_forward_hook(lambda *_: called.append(1))
    model, x = MetaFlowMap(network), torch.randn(6, 2)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    sampler = PairSampler(class_dropout=0.0, guidance_scale=2.5)
    for label, moved in ((torch.full((6,), 3), False), (torch.tensor([0, 3, 1, 3, 2, 3]), True)):
        pair = sampler.sample(x, Conditions(label=label), model.null_conditions)
        inner, plain = pair.inner(torch.rand(6)), label == 3
        target = guided_data_velocity(model, pair, inner)
        difference = (target - (pair.x1 - inner.eps)).abs().amax(dim=1)
        assert torch.equal(difference[plain], torch.zeros(int(plain.sum())))
        assert bool((difference[~plain] > 0).all())
        assert (len(called), bool((difference > 0).any())) == (1, moved)
        called.clear()
    pair = PairSampler().sample(x, Conditions(label=label), model.null_conditions)
    guided_data_velocity(model, pair, pair.inner(torch.rand(6)))
    assert not called


def test_annealing_and_start_step():
    assert torch.equal(*InnerTimes(annealing_steps=10).two(64, torch.device("cpu"), step=0))
    objective = Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow", start_step=5)])
    model, x = MetaFlowMap(MLP(2, 16, 1)), torch.randn(4, 2)
    assert "mean_flow" not in objective(model, None, x, Conditions(), step=4)
    assert "mean_flow" in objective(model, None, x, Conditions(), step=5)


@pytest.mark.parametrize("bad", [{"terms": []}, {"terms": [{"name": "eulerian"}]}, {"backend": "magic"}])
def test_unknown_names_are_refused(bad):
    if bad.get("terms"):
        with pytest.raises(
            ValueError,
            match=r"unknown objective 'eulerian': did you mean 'eulerian_\w+'\? expected one of .*eulerian_teacher",
        ):
            WeightedTerm(**bad["terms"][0])
    else:
        with pytest.raises(ValueError, match=r"at least one term|unknown tangent backend 'magic'"):
            Objective(**bad)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_clipped_term_has_the_gradient_of_the_clipped_residual(p):
    """sCM's clipped tangent: dL/dv = 2 clip(r) / (e + c)^p, where r = v - target; below the clip as without one."""
    target, c = torch.tensor([[0.0, 3.0, -5.0], [0.2, -0.4, 0.9]]), 0.01
    v = torch.zeros(2, 3, requires_grad=True)
    error = squared_error(v - target, clip=1.0)
    adaptive_loss(error, p, c).sum().backward()
    clipped = target.clamp(-1, 1)
    counted = torch.tensor([2 * 3.0 - 1 + 2 * 5.0 - 1, 0.04 + 0.16 + 0.81])  # 2 |r| - 1 above 1, r^2 below
    torch.testing.assert_close(error, counted)
    torch.testing.assert_close(v.grad, -2 * clipped / (counted[:, None] + c) ** p)
    torch.testing.assert_close(squared_error(v - target, clip=10.0), squared_error(v - target))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_is_not_positive_is_refused(clip):
    with pytest.raises(ValueError, match=f"clip {clip} of 'eulerian_teacher' must be positive"):
        WeightedTerm("eulerian_teacher", clip=clip)


def test_an_objective_clips_the_terms_that_say_so_and_logs_errors_without():
    torch.manual_seed(0)
    model, x1 = MetaFlowMap(MLP(dim=2, hidden_size=8, depth=1)), 100 * torch.ones(4, 2)
    losses = {}
    for clip in (None, 0.5):
        torch.manual_seed(1)
        objective = Objective([WeightedTerm("data_diagonal", clip=clip)])
        losses[clip] = objective(model, None, x1, Conditions())
    plain, clipped = losses[None], losses[0.5]
    torch.testing.assert_close(clipped["error/data_diagonal"], plain["error/data_diagonal"])
    assert clipped["loss"] < 0.02 * plain["loss"]  # residuals of 100 count as 2 * 0.5 * 100 - 0.25
