"""Adapters of pretrained flows: exactly the base at first, its weights there once, derivatives by two ways."""

from typing import Any, cast

import pytest
import torch

from mfm_lightning.alignment import Target
from mfm_lightning.backbones import FlowAdapter, FlowNetwork, load_flow
from mfm_lightning.checkpoints import load_model
from mfm_lightning.conditions import Conditions
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks.files import save_network
from mfm_lightning.objectives.teachers import ModelTeacher
from mfm_lightning.tangents import velocity_and_jvp
from mfm_lightning.training.sharding import shard
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

FAMILIES = ["sd3", "flux", "sana"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines of each family on disk, by name."""
    found = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in found.items():
        getattr(tiny, name)().save_pretrained(str(folder))
    return found


def given(rows, family, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, tiny.TOKENS, tiny.TEXT, generator=generator)
    more = {"mask": torch.ones(rows, tiny.TOKENS)} if family == "sana" else {}
    more |= {} if family == "sana" else {"pooled": torch.randn(rows, tiny.POOLED, generator=generator)}
    return Conditions(text=text, **more)


def made(folder, **options):
    torch.manual_seed(1)
    size = {"image_size": 32} if "sana" in str(folder) else {"image_size": 8}
    return FlowAdapter(str(folder), rank=2, **size, **options)


def inputs(network, rows=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    s, u, t = (torch.rand(rows, generator=generator) for _ in range(3))
    s, u = torch.minimum(s, u), torch.maximum(s, u)
    x, x_t = (torch.randn(rows, *network.state_shape, generator=generator) for _ in range(2))
    return s, u, x, t, x_t


def stirred(network, scale=0.3):
    """Weights as training might leave them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(scale * torch.randn_like(p) / max(1, p[0].numel()) ** 0.5)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_it_is_exactly_the_base_flow(folders, family):
    network = made(folders[family])
    s, u, x, t, x_t = inputs(network)
    conditions = given(3, family)
    base = load_flow(folders[family], network.flow.image_size, "float32")
    expected = base.velocity(s, x, conditions)
    assert torch.equal(network(s, u, x, t, x_t, conditions), expected)  # whatever u, t and x_t
    stirred(network)
    found = network(s, u, x, t, x_t, conditions)
    assert (found - expected).abs().max() > 1e-2
    for changed in ((s, s, x, t, x_t), (s, u, x, 0 * t, x_t), (s, u, x, t, -x_t)):
        assert (network(*changed, conditions) - found).abs().max() > 1e-4  # each of u, t and x_t counts
    # the teacher is the same transformer as before, to the last bit, and the adapter is on again after it
    assert torch.equal(network.teacher_network(s, u, x, t, x_t, conditions), expected)
    assert torch.equal(network.flow.velocity(s, x, conditions), expected)
    assert torch.equal(network(s, u, x, t, x_t, conditions), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_derivatives_by_rules_of_torch_and_by_differences_agree(folders, family):
    network = stirred(made(folders[family]))
    model, (s, u, x, t, x_t), conditions = _with_null(network, given(1, family)), inputs(network), given(3, family)
    along = torch.ones(3), torch.zeros(3), torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    value, exact = velocity_and_jvp(model, s, u, x, t, x_t, along, conditions, "functorch")
    again, differences = velocity_and_jvp(model, s, u, x, t, x_t, along, conditions, "finite_difference")
    assert torch.allclose(value, again, atol=1e-5)
    assert (exact - differences).norm() < 1e-2 * exact.norm()
    _, default = velocity_and_jvp(model, s, u, x, t, x_t, along, conditions)
    assert torch.equal(default, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_give_the_same_gradients(folders, family):
    plain, kept = (stirred(made(folders[family], checkpointing=c)) for c in (False, True))
    found = []
    for network in (plain, kept):
        network(*inputs(network), given(3, family)).square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    unused = "add_q_proj"  # SD3's last block does not ask with its texts
    assert all(found[0][name].abs().sum() > 0 for name in found[0] if "lora" in name and unused not in name)
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], atol=1e-6 * float(grad.abs().max() + 1)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_its_file_has_what_is_trained_alone_and_gives_the_same_map(folders, family, tmp_path):
    network = stirred(made(folders[family]))
    (s, u, x, t, x_t), conditions = inputs(network), given(3, family)
    base = sum(p.numel() for name, p in network.flow.transformer.named_parameters() if "lora" not in name)
    held = {p.data_ptr() for p in network.parameters()}
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for n, p in network.flow.transformer.named_parameters() if "lora" not in n)
    assert not held & {p.data_ptr() for n, p in network.flow.transformer.named_parameters() if "lora" not in n}
    save_network(network, tmp_path / "model.safetensors")
    assert sum(v.numel() for v in network.state_dict().values()) < base
    again = load_model(tmp_path / "model.safetensors").network
    assert torch.allclose(again(s, u, x, t, x_t, conditions), network(s, u, x, t, x_t, conditions), atol=1e-6)


def test_the_teachers_guidance_is_the_pipelines_and_the_student_learns_it_as_an_input(folders):
    network = stirred(made(folders["sd3"], guidance_scales=[3.0]))
    s, u, x, t, x_t = inputs(network)
    conditions, null = given(3, "sd3"), given(1, "sd3", seed=9)
    teacher = ModelTeacher(_with_null(network.teacher_network, null))
    guided = Conditions(text=conditions.text, pooled=conditions.pooled, guidance=3.0)
    base = load_flow(folders["sd3"], 8, "float32")
    of_null = base.velocity(s, x, null)
    expected = of_null + 3.0 * (base.velocity(s, x, conditions) - of_null)
    assert torch.allclose(teacher.drift(s, x, guided), expected, atol=1e-5)
    model = _with_null(network, null)
    without = model.velocity(s, u, x, t, x_t, conditions)
    assert (model.velocity(s, u, x, t, x_t, guided) - without).abs().max() > 1e-4


def _with_null(network, null):
    """A model whose null condition needs no text encoder."""
    kind = type(network)
    network.__class__ = type(kind.__name__, (kind,), {"null_conditions": null})
    return MetaFlowMap(network)


def test_ranks_differ_by_module_and_wrong_settings_are_refused(folders):
    network = made(folders["sd3"], ranks={"transformer_blocks.0.attn.to_q": 5})
    ranks = {name: parts[0].out_features for name, parts in network.lora.items()}
    assert ranks["transformer_blocks/0/attn/to_q"] == 5
    assert {rank for name, rank in ranks.items() if name != "transformer_blocks/0/attn/to_q"} == {2}
    assert any("ff/net/2" in name for name in ranks)
    assert any("add_k_proj" in name for name in ranks)
    with pytest.raises(ValueError, match="targets 'nothing'"):
        made(folders["sd3"], targets="nothing")
    with pytest.raises(ValueError, match=r"has guidance as an input, at its usual 3\.5 here"):
        made(folders["flux"], guidance_scales=[2.0])
    with pytest.raises(ValueError, match=r"a FlowNetwork cannot be trained in shards.*strategy ddp"):
        shard(
            MetaFlowMap(FlowNetwork(str(folders["sd3"]), image_size=8)), mesh=cast(Any, None)
        )  # before anything is sharded
    with pytest.raises(ValueError, match="rank -1 must be at least 0"):
        FlowAdapter(str(folders["sd3"]), rank=-1)


@torch.no_grad()
def test_prompts_without_embeddings_are_embedded_and_not_taken_for_the_empty_one(tmp_path):
    tiny.sd3(**encoders.of_sd3(tmp_path / "words")).save_pretrained(tmp_path / "sd3")
    network = made(tmp_path / "sd3", max_sequence_length=8)
    model, x = MetaFlowMap(network), torch.randn(2, *network.state_shape, generator=torch.Generator().manual_seed(4))
    prompts = ["a red cat", "a blue dog"]
    expected = network.flow.drift(0.3, x, network.flow.encode(prompts, guidance=1.0))
    target = Target(model, lambda images: images.mean(dim=(1, 2, 3)), network.flow.decoder, Conditions(prompts=prompts))
    assert torch.allclose(target.drift(0.3, x), expected, atol=1e-6)
    assert (model.drift(0.3, x) - expected).abs().max() > 1e-2  # the empty prompt's
