"""The released implementation's tensors, reproduced to 1e-5."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfm_lightning.alignment import Steering, TimeGrid
from mfm_lightning.alignment.target import Target
from mfm_lightning.alignment.values import DPSGradient
from mfm_lightning.checkpoints import import_checkpoint, to_released_names
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT, architecture
from mfm_lightning.tangents import velocity_and_jvp
from tests.parity import ARCHITECTURE, DATA, released_architecture


@pytest.fixture(scope="module")
def mfm(tmp_path_factory):
    tensors = load_file(DATA / "official_mfm.safetensors")
    path = tmp_path_factory.mktemp("mfm") / "mfm.safetensors"
    save_file({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, path)
    with safe_open(DATA / "official_mfm.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = import_checkpoint(path, source="mfm", **released_architecture(config))
    return model.eval(), tensors


@pytest.mark.parametrize("backend", ["functorch", "explicit"])
def test_velocity_null_label_and_jvps(mfm, backend):
    model, data = mfm
    case = {k.removeprefix("case."): v for k, v in data.items() if k.startswith("case.")}
    inputs = [case[k] for k in ("s", "u", "x", "t", "x_t")]
    conditions = {"label": case["label"], "guidance": case["cfg_scale"]}
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(*inputs, **conditions), case["v"], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.velocity(*inputs), case["v_null_label"], atol=1e-5, rtol=0)
    one, zero = torch.ones(6), torch.zeros(6)
    for name, tangents in {
        "jvp_s": (one, zero, case["tangent_x"]),
        "jvp_u": (zero, one, torch.zeros_like(case["x"])),
    }.items():
        v, dv = velocity_and_jvp(model, *inputs, tangents, **conditions, backend=backend)
        torch.testing.assert_close(v, case["v"], atol=1e-5, rtol=0)
        torch.testing.assert_close(dv, case[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_posterior_draws(mfm, steps):
    model, data = mfm
    with torch.no_grad():
        draws = model.sample_posterior(
            data["case.x_t"],
            data["case.t"],
            steps=steps,
            noise=data["sampler.eps"][:, None],
            label=data["case.label"],
            guidance=data["case.cfg_scale"],
        )
    torch.testing.assert_close(draws[:, 0], data[f"sampler.posterior_{steps}_step"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["dmf", "sit"])
def test_import_equals_the_source_and_ignores_the_condition(source, tmp_path):
    data = load_file(DATA / f"official_{source}.safetensors")
    torch.save({k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")}, tmp_path / "w.pt")
    model = import_checkpoint(tmp_path / "w.pt", source=source, **ARCHITECTURE).eval()
    x, label, s = data["case.x"], data["case.label"], 1 - data["case.t"]
    u = 1 - data["case.r"] if source == "dmf" else s
    with torch.no_grad():
        at_zero = model.velocity(s, u, x, 0.0, torch.zeros_like(x), label=label)
        # those projects predict x0 - x1 with t = 1 for noise
        torch.testing.assert_close(at_zero, -data["case.velocity"], atol=1e-5, rtol=0)
        conditioned = model.velocity(s, u, x, 0.7, torch.randn_like(x), label=label, guidance=2.5)
    assert torch.equal(conditioned, at_zero)


@pytest.mark.parametrize("prefix", ["model.model.dit.", "model.dit.", "dit.", "module.", ""])
@pytest.mark.parametrize("kind", ["pt", "ckpt"])
def test_prefixes_and_containers(mfm, tmp_path, prefix, kind):
    model, data = mfm
    state = {prefix + k.removeprefix("weights.dit."): v for k, v in data.items() if k.startswith("weights.")}
    path = tmp_path / f"weights.{kind}"
    torch.save({"state_dict": state, "epoch": 3} if kind == "ckpt" else state, path)
    loaded = import_checkpoint(path, **ARCHITECTURE)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["B/2", "XL/2"])
def test_full_size_names_shapes_and_count(name):
    released = json.loads((DATA / "official_state_dict_shapes.json").read_text())[f"MFM-{name}"]
    with torch.device("meta"):
        model = MetaFlowMap(DiT(**architecture(name), input_size=32, in_channels=4, num_classes=1000))
    shapes = {f"dit.{k}": list(v.shape) for k, v in to_released_names(model.network.state_dict()).items()}
    assert shapes == released["state_dict"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == released["parameters"]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("kind", ["base", "dps"])
def test_steered_ode(mfm, kind, renormalise):
    model, data = mfm
    vector, label, scale = data["steer.reward_vector"], data["case.label"], data["case.cfg_scale"]
    target = Target(model, lambda x: x.flatten(1) @ vector, label=label, guidance=scale)
    strength = 1.0 if kind == "dps" else 0.0
    method = Steering(DPSGradient(), TimeGrid(8, 0.01), strength=strength, renormalise=renormalise)
    result = method(target, data["steer.x0"])
    expected = data[f"steer.ode_{kind}_renorm{int(renormalise)}_8steps"]
    torch.testing.assert_close(result.states, expected, atol=1e-5, rtol=1e-5)
