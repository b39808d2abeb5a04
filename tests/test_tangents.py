"""The networks' own tangent rules against torch.func in float64; gradients of the loss with either."""

import pytest
import torch

from mfm_lightning.models import MetaFlowMap, velocity_and_jvp
from mfm_lightning.networks import MLP, DiT, dual
from mfm_lightning.networks.dual import Dual
from mfm_lightning.objectives import Objective, PairSampler, WeightedTerm
from mfm_lightning.objectives.terms import TERMS, Consistency
from mfm_lightning.teachers import ModelTeacher
from tests.closed_form import gaussian_model

NETWORKS = {
    "DiT": lambda: DiT(8, 2, 2, 32, 3, 4, 2, num_classes=5, guidance_scales=(2.5,)),
    "DiT, QK-norm, flipped": lambda: DiT(8, 2, 2, 32, 3, 4, 2, 5, qk_norm=True, guidance_scales=(2.5,), flip_time=True),
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
    return (s, u, x), (torch.rand_like(s), torch.rand_like(s), dx), (t, x_t, label, torch.tensor([2.5] * 4 + [1.0] * 2))


def test_rules_equal_functorch(model):
    inner, tangents, (t, x_t, label, guidance) = inputs(model)
    found = {
        backend: velocity_and_jvp(model, *inner, t, x_t, tangents, label, guidance, backend)
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
        objective = Objective([WeightedTerm(name)], PairSampler(guidance_scale=2.5), backend=backend)
        model.zero_grad()
        loss = objective(model, teacher, x1, label)["loss"]
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
        monkeypatch.setattr(dual, "MAX_WEIGHTS", {"cpu": limit, "cuda": limit})
        torch.testing.assert_close(dual.attention(q, k, v).tangent, whole.tangent)
    plain = lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v  # noqa: E731
    value, tangent = torch.func.jvp(plain, (q.value, k.value, v.value), (q.tangent, k.tangent, v.tangent))
    torch.testing.assert_close(whole.value, value)
    torch.testing.assert_close(whole.tangent, tangent)


def test_bf16_autocast_stays_near_float32(model):
    """3 % of the largest entry: bf16 has 8 bits, and errors of the layers add up."""
    model = model.float()
    inner, tangents, condition = (
        tuple(v.float() if v.is_floating_point() else v for v in part) for part in inputs(model)
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
