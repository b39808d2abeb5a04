"""Tangents: the networks' own rules against torch.func in float64, finite differences, and training with them."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import TrainingExecution
from mfm_lightning.networks import MLP, DiT, UNet, attention_tangents, dual
from mfm_lightning.networks.dual import Dual
from mfm_lightning.objectives import Objective, PairSampler, WeightedTerm, adaptive_loss, squared_error
from mfm_lightning.objectives.teachers import ModelTeacher, teacher_velocity
from mfm_lightning.objectives.terms import TERMS, Consistency
from mfm_lightning.tangents import velocity_and_jvp
from tests.closed_form import gaussian_model

NETWORKS = {
    "DiT": lambda: DiT(8, 2, 2, 32, 3, 4, 2, num_classes=5, guidance_scales=(2.5,)),
    "DiT, QK-norm, flipped": lambda: DiT(8, 2, 2, 32, 3, 4, 2, 5, qk_norm=True, guidance_scales=(2.5,), flip_time=True),
    "UNet": lambda: UNet(5, 2, 8, (1, 2), 1, (5,), 2, num_classes=5, norm_groups=4, guidance_scales=(2.5,)),
    "MLP": lambda: MLP(3, 32, 2, num_classes=5, guidance_scales=(2.5,)),
}


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(0)
    model = MetaFlowMap(NETWORKS[request.param]())
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.double()


def inputs(model, B=6):
    s, u = torch.rand(2, B, dtype=torch.float64).sort(dim=0).values
    x, x_t, dx = (torch.randn(B, *model.state_shape, dtype=torch.float64) for _ in range(3))
    t, label = torch.rand(B, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 5, 5])
    given = Conditions(label=label, guidance=torch.tensor([2.5] * 4 + [1.0] * 2))
    return (s, u, x), (torch.rand_like(s), torch.rand_like(s), dx), (t, x_t, given)


RULES = {
    "add": lambda x, y, c, layers: dual.add(x, y),
    "concatenate": lambda x, y, c, layers: dual.concatenate(x, y),
    "linear": lambda x, y, c, layers: dual.linear(layers["linear"], x),
    "gelu": lambda x, y, c, layers: dual.gelu(x),
    "silu": lambda x, y, c, layers: dual.silu(x),
    "cos_sin": lambda x, y, c, layers: dual.cos_sin(c[0]),
    "layer_norm": lambda x, y, c, layers: dual.layer_norm(layers["norm"], x),
    "layer_norm, affine": lambda x, y, c, layers: dual.layer_norm(layers["affine"], x),
    "modulate": lambda x, y, c, layers: dual.modulate(x, c[0], c[1]),
    "add_gated": lambda x, y, c, layers: dual.add_gated(x, c[0], y),
    "attention": lambda x, y, c, layers: dual.attention(*[z.map(lambda z: z[:, None]) for z in (x, y, dual.add(x, y))]),
}


@pytest.mark.parametrize("moving", ["all", "tokens", "condition"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_equals_functorch(rule, moving):
    torch.manual_seed(0)
    layers = {
        "linear": torch.nn.Linear(8, 8).double(),
        "norm": torch.nn.LayerNorm(8, elementwise_affine=False).double(),
        "affine": torch.nn.LayerNorm(8).double(),
    }
    for p in layers["affine"].parameters():
        p.data.normal_()
    shapes = [(3, 5, 8), (3, 5, 8), (3, 8), (3, 8)]
    values = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    moves = [moving in ("all", "tokens")] * 2 + [moving in ("all", "condition")] * 2
    tangents = tuple(torch.randn_like(v) * m for v, m in zip(values, moves, strict=True))

    def apply(*arguments: Dual) -> Dual:
        x, y, *c = arguments
        return RULES[rule](x, y, c, layers)

    value, tangent = apply(*[Dual(v, d if m else None) for v, d, m in zip(values, tangents, moves, strict=True)])
    reference = torch.func.jvp(lambda *v: apply(*map(Dual, v)).value, values, tangents)
    torch.testing.assert_close(value, reference[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.zeros_like(value) if tangent is None else tangent, reference[1], rtol=1e-9, atol=1e-11
    )
    assert tangent is None or (tangent.shape == value.shape and not tangent.requires_grad)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.float64, 1e-7)])
def test_finite_differences_err_as_documented(model, dtype, tolerance):
    model = model.to(dtype)
    inner, tangents, condition = pytree.tree_map_only(
        torch.Tensor, lambda v: v.to(dtype) if v.is_floating_point() else v, inputs(model)
    )
    arguments = (model, *inner, *condition[:2], tangents, *condition[2:])
    value, found = velocity_and_jvp(*arguments, backend="finite_difference")
    exact = velocity_and_jvp(*arguments)[1]
    assert value.requires_grad
    assert not found.requires_grad
    assert (found - exact).norm() < tolerance * exact.norm()


def test_rules_equal_functorch(model):
    inner, tangents, (t, x_t, given) = inputs(model)
    found = {
        backend: velocity_and_jvp(model, *inner, t, x_t, tangents, given, backend)
        for backend in ("explicit", "functorch")
    }
    for ours, reference in zip(found["explicit"], found["functorch"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)
    assert found["explicit"][0].requires_grad
    assert not found["explicit"][1].requires_grad


@pytest.mark.parametrize("name", [name for name, term in TERMS.items() if issubclass(term, Consistency)])
def test_losses_and_gradients_equal_functorch(model, name):
    teacher = ModelTeacher(MetaFlowMap(type(model.network)(**model.network.config)).double())
    x1, label = torch.randn(8, *model.state_shape, dtype=torch.float64), torch.arange(8) % 5
    found = {}
    for backend in ("explicit", "functorch"):
        torch.manual_seed(1)
        terms = [WeightedTerm(name, p=1.0)]
        if not TERMS[name].pins_diagonal:
            terms.append(WeightedTerm("data_diagonal", p=1.0))
        objective = Objective(terms, PairSampler(guidance_scale=2.5), backend=backend)
        model.zero_grad()
        loss = objective(model, teacher, x1, Conditions(label=label))["loss"]
        loss.backward()
        found[backend] = [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    assert len(found["explicit"]) == len(found["functorch"]) > 5
    for ours, reference in zip(found["explicit"], found["functorch"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-9)  # the loss itself is float32


def test_attention_in_chunks(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (Dual(*torch.randn(2, 2, 3, 11, 4, dtype=torch.float64)) for _ in range(3))
    whole = dual.attention(q, k, v)
    for limit in (2 * 11 * 11, 3 * 11):  # some heads at a time, some queries of a head
        monkeypatch.setattr(attention_tangents, "MAX_WEIGHTS", {"cpu": limit, "cuda": limit})
        torch.testing.assert_close(dual.attention(q, k, v).tangent, whole.tangent)
    plain = lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v  # noqa: E731
    value, tangent = torch.func.jvp(plain, (q.value, k.value, v.value), (q.tangent, k.tangent, v.tangent))
    torch.testing.assert_close(whole.value, value)
    torch.testing.assert_close(whole.tangent, tangent)


@pytest.mark.parametrize("still", [(), (0,), (2,), (0, 1)])
def test_fused_attention_tangent_is_exact(still):
    """Against torch.func in float64; parts that do not move have no tangent."""
    torch.manual_seed(0)
    parts = [Dual(*torch.randn(2, 2, 3, 11, 4, dtype=torch.float64)) for _ in range(3)]
    q, k, v = (Dual(part.value) if i in still else part for i, part in enumerate(parts))
    tangents = tuple(torch.zeros_like(z.value) if z.tangent is None else z.tangent for z in (q, k, v))
    plain = lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v  # noqa: E731
    if still == (0, 1):  # nothing but the values moves
        q = Dual(q.value, torch.zeros_like(q.value))
    elif 0 in still:
        q = Dual(q.value, tangents[0])
    _, expected = torch.func.jvp(plain, (q.value, k.value, v.value), tangents)
    q.value.requires_grad_()  # as in training, where values have a graph and tangents none
    found = dual.attention(q, k, v, "fused").tangent
    assert found is not None
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_a_network_trains_alike_with_the_fused_tangent():
    torch.manual_seed(0)
    model = MetaFlowMap(NETWORKS["DiT, QK-norm, flipped"]()).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    objective = Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")], PairSampler(guidance_scale=2.5))
    expected = loss_and_gradients(model, objective)
    TrainingExecution(attention_tangent="fused").prepare(model.network)
    chunked, called = attention_tangents.chunked, []
    attention_tangents.chunked = lambda *a: called.append(1) or chunked(*a)
    try:
        found = loss_and_gradients(model, objective)
    finally:
        attention_tangents.chunked = chunked
    assert not called  # all layers take the other way
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-9)


def test_attention_tangents_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="'flash': expected one of auto, chunked, fused, triton"):
        TrainingExecution(attention_tangent="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MLP has no attention with explicit tangents"):
        TrainingExecution(attention_tangent="fused").prepare(MLP(2, 8, 1))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", None)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", None)
    with pytest.raises(ModuleNotFoundError, match="mfm-lightning\\[triton\\]"):
        TrainingExecution(attention_tangent="triton")


INTERPRETED = """
import torch
from mfm_lightning.networks.attention_tangents import by_triton
torch.manual_seed(0)
for size, tokens in ((64, 128), (72, 128), (8, 96)):
    q, k, v, dq, dk, dv = torch.randn(6, 1, 2, tokens, size)
    plain = lambda q, k, v: torch.softmax(q @ k.mT / size**0.5, -1) @ v
    _, expected = torch.func.jvp(plain, tuple(x.double() for x in (q, k, v)), tuple(x.double() for x in (dq, dk, dv)))
    found = by_triton(q, k, v, dq, dk, dv)
    assert found.shape == q.shape and not found.requires_grad
    print(float((found - expected).norm() / expected.norm()))
"""


INTERPRETED_NETWORK = """
import torch
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import TrainingExecution
from mfm_lightning.networks import DiT, attention_tangents
from mfm_lightning.objectives import Objective, PairSampler, WeightedTerm
from tests.core.test_tangents import loss_and_gradients
torch.manual_seed(0)
model = MetaFlowMap(DiT(8, 1, 2, 32, 2, 2, 1, num_classes=5, guidance_scales=(2.5,)))  # 64 tokens, heads of 16
for p in model.parameters():
    p.data.add_(0.1 * torch.randn_like(p))
objective = Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")], PairSampler(guidance_scale=2.5))
expected = loss_and_gradients(model.double(), objective)
TrainingExecution(attention_tangent="triton").prepare(model.network)
kernel, called = attention_tangents.by_triton, []
attention_tangents.by_triton = lambda *parts: called.append(1) or kernel(*(x.float() for x in parts)).double()
found = loss_and_gradients(model, objective)
assert called
for ours, reference in zip(found, expected, strict=True):
    print(float((ours - reference).norm() / reference.norm().clamp_min(1e-12)))
"""


def interpreted(code: str) -> list[float]:
    """The numbers that a script prints. The package's kernel on CPU, in a process of its own: the interpreter is chosen
    when Triton is imported."""
    pytest.importorskip("triton")
    pytest.importorskip("jvp_flash_attention")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return [float(line) for line in run.stdout.split()]


@pytest.mark.slow
def test_the_triton_kernel_by_its_interpreter():
    errors = interpreted(INTERPRETED)
    assert len(errors) == 3
    assert max(errors) < 1e-5, errors


@pytest.mark.slow
def test_a_network_trains_alike_with_the_triton_tangent():
    """A DiT in float64 but for the kernel, which has no float64; against products, loss and all gradients."""
    errors = interpreted(INTERPRETED_NETWORK)
    assert len(errors) > 20
    assert max(errors) < 1e-4, errors


def test_the_triton_kernel_says_what_it_takes():
    pytest.importorskip("triton")
    pytest.importorskip("jvp_flash_attention")
    for tokens in (9, 34, 48, 100):  # the kernel's blocks have 32, and it does not mask what is beyond the last token
        x = torch.zeros(1, 1, tokens, 4)
        with pytest.raises(ValueError, match=f"{tokens} tokens in heads of 4 .* takes a multiple of 32"):
            attention_tangents.by_triton(*[x] * 6)
    if os.environ.get("TRITON_INTERPRET") != "1":
        x = torch.zeros(1, 1, 64, 16)
        with pytest.raises(ValueError, match="runs on GPUs"):
            attention_tangents.by_triton(*[x] * 6)


def test_the_interpreter_takes_no_bf16(monkeypatch):
    """It computes garbage there, without a word: a tangent of norm 5e10 in place of 1."""
    pytest.importorskip("triton")
    pytest.importorskip("jvp_flash_attention")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 64, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="Triton's interpreter does not compute in bfloat16"):
        attention_tangents.by_triton(*[x] * 6)


def test_bf16_autocast_stays_near_float32(model):
    """3 % of the largest entry: bf16 has 8 bits, and errors of the layers add up."""
    model = model.float()
    inner, tangents, condition = pytree.tree_map_only(
        torch.Tensor, lambda v: v.float() if v.is_floating_point() else v, inputs(model)
    )
    exact = velocity_and_jvp(model, *inner, *condition[:2], tangents, *condition[2:])
    with torch.autocast("cpu", torch.bfloat16):
        found = velocity_and_jvp(model, *inner, *condition[:2], tangents, *condition[2:])
    for ours, reference in zip(found, exact, strict=True):
        assert (ours.float() - reference).abs().max() < 0.03 * reference.abs().max() + 0.01


def test_auto_falls_back_and_explicit_says_why():
    model, x = gaussian_model(), torch.randn(4, 2)
    arguments = (0.2, 0.7, x, 0.3, x, (1.0, 0.0, x))
    v, dv = velocity_and_jvp(model, *arguments)
    assert torch.equal(v, velocity_and_jvp(model, *arguments, backend="functorch")[0])
    assert dv.abs().sum() > 0
    with pytest.raises(ValueError, match="GaussianNetwork does not propagate tangents itself"):
        velocity_and_jvp(model, *arguments, backend="explicit")


def batch(model, B=8):
    generator = torch.Generator().manual_seed(3)
    x1 = torch.randn(B, *model.state_shape, generator=generator)
    return x1.to(next(model.parameters())), Conditions(label=torch.arange(B) % 5)


def loss_and_gradients(model, objective, teacher=None):
    model.zero_grad()
    torch.manual_seed(1)
    loss = objective(model, teacher, *batch(model))["loss"]
    loss.backward()
    return [loss.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


@pytest.mark.parametrize("omega", [0.0, 0.6])
def test_teacher_pairs_rows_only_where_guidance_needs_it(omega):
    torch.manual_seed(0)
    model = MetaFlowMap(NETWORKS["DiT"]()).double()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x, t = torch.randn(6, *model.state_shape, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 5, 5, 3])  # 5 is the null label
    guidance = torch.tensor([2.5, 1.0, 1 / (1 - omega), 1.0, 1.0, 4.0], dtype=torch.float64)
    scale = (guidance * (1 - omega))[:, None, None, None]
    conditional, unconditional = model.drift(t, x, label=label), model.drift(t, x)
    rows = []
    model.network.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found = ModelTeacher(model, omega).drift(t, x, Conditions(label=label, guidance=guidance))
    torch.testing.assert_close(found, unconditional + scale * (conditional - unconditional))
    assert rows == [6 + 2]  # of scales 2.5 and 4; or, where 2.5 (1 - omega) is 1, of 1 and 4


def test_shared_sample_has_one_teacher_evaluation_and_the_same_gradients(model):
    """The reference: each term by itself on that sample, with the teacher's velocity computed for each."""
    teacher = ModelTeacher(MetaFlowMap(type(model.network)(**model.network.config)).double())
    for p in teacher.model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    evaluations = []
    teacher.model.network.register_forward_hook(lambda *_: evaluations.append(1))
    terms = [WeightedTerm("distilled_diagonal", p=0.5), WeightedTerm("eulerian_teacher", weight=2.0)]
    shared = Objective(terms, PairSampler(guidance_scale=2.5), share_inner=True)
    ours = loss_and_gradients(model, shared, teacher)
    assert len(evaluations) == 1

    model.zero_grad()
    torch.manual_seed(1)
    x1, given = batch(model)
    pair = shared.pairs.sample(x1, given, model.null_conditions)
    inner = pair.inner(*shared.inner_times.two(len(x1), x1.device))
    loss = 0.0
    for settings, term in zip(terms, (TERMS[t.name]() for t in terms), strict=True):
        inner.teacher_velocity = teacher_velocity(teacher, inner.s, inner.x, pair.t, pair.x_t, pair.conditions)
        term.backend = "functorch"
        error = squared_error(term(model, teacher, pair, inner))
        loss = loss + settings.weight * adaptive_loss(error, settings.power, settings.c).mean()
    loss.backward()
    reference = [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    assert len(ours) == len(reference)
    for found, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["checkpoint_activations", "both"])
def test_execution_leaves_losses_and_gradients(setting):
    if setting == "both" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    torch.manual_seed(0)
    model = MetaFlowMap(NETWORKS["DiT, QK-norm, flipped"]())
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    objective = Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")], PairSampler(guidance_scale=2.5))
    kept = saved_bytes(lambda: loss_and_gradients(model, objective))
    expected = loss_and_gradients(model, objective)
    names = list(model.state_dict())
    TrainingExecution(compile=setting == "both", checkpoint_activations=True).prepare(model.network)
    found = loss_and_gradients(model, objective)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    if setting == "checkpoint_activations":
        assert saved_bytes(lambda: loss_and_gradients(model, objective)) < kept


def saved_bytes(step) -> int:
    """What the graph of a step keeps of activations."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return total


def test_checkpointing_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match="MLP has no blocks to checkpoint"):
        TrainingExecution(checkpoint_activations=True).prepare(MLP(2, 8, 1))
