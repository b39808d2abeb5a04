"""LoRA of flows: the base where it is off, diffusers' own pipeline with the written file where it is on."""

import diffusers
import pytest
import torch

from mfm_lightning.backbones import FlowAdapter, LoRANetwork, SD3Flow, load_flow
from mfm_lightning.backbones.lora import mark_of
from mfm_lightning.checkpoints import CheckpointError, load_model
from mfm_lightning.networks.files import save_network
from mfm_lightning.samplers import integrate
from tests.backbones import tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_adapter import FAMILIES, folders, given, stirred  # noqa: F401

SIZES = {"sd3": 8, "flux": 8, "sana": 32}


def opened(places, family, **options):
    return load_flow(str(places[family]), SIZES[family], torch_dtype="float32", **options)


def guided(family, rows=2):
    """Conditions as the pipeline's call makes them of embeddings."""
    found = given(rows, family)
    if family == "flux":
        return type(found)(text=found.text, pooled=found.pooled, guidance=3.5)
    null = given(rows, family, seed=9)
    negative = {f"negative_{k}": getattr(null, k) for k in ("text", "mask", "pooled") if getattr(null, k) is not None}
    return type(found)(text=found.text, mask=found.mask, pooled=found.pooled, guidance=4.0, **negative)


def as_call(conditions, family):
    names = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_attention_mask"}
    call = {call: getattr(conditions, name) for name, call in names.items() if getattr(conditions, name) is not None}
    if family == "flux":
        return {**call, "guidance_scale": 3.5}
    negative = {f"negative_{call}": getattr(conditions, f"negative_{name}") for name, call in names.items()}
    call |= {"negative_prompt": None} if family == "sana" else {}
    return {**call, **{k: v for k, v in negative.items() if v is not None}, "guidance_scale": 4.0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"rank": 2, "alpha": 5.0}, {"rank": 2, "ranks": {"to_q": 3}, "targets": r".*\.to_[qv]"}]
)
def test_diffusers_makes_the_policys_images_of_the_written_file(folders, family, options, tmp_path):  # noqa: F811
    flow = opened(folders, family)
    conditions = guided(family)
    x0 = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(4))
    base, mark = flow.drift(0.3, x0, conditions), mark_of(flow.transformer)
    network = stirred(LoRANetwork.on_flow(flow, **options), 0.5)
    assert torch.equal(flow.drift(0.3, x0, conditions), base)  # off
    assert mark_of(flow.transformer) == mark == network.config["base"]
    ours = integrate(lambda t, x: network.drift(t, x, conditions), x0, flow.time_grid(3))
    plain = integrate(lambda t, x: flow.drift(t, x, conditions), x0, flow.time_grid(3))
    assert (ours - plain).abs().max() > 0.01 * plain.abs().max()
    network.write_beside(tmp_path)
    pipe = getattr(tiny, family)()
    kind = type(pipe)
    absent = dict.fromkeys([k for k in pipe.components if k.startswith(("text_encoder", "tokenizer"))])
    pipe = kind.from_pretrained(str(folders[family]), **absent)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(tmp_path / "lora"))
    latents = x0 if family != "flux" else diffusers.FluxPipeline._pack_latents(x0, 2, *x0.shape[1:])
    size = {"height": SIZES[family], "width": SIZES[family], "num_inference_steps": 3, "output_type": "latent"}
    size |= {"use_resolution_binning": False} if family == "sana" else {}
    theirs = pipe(latents=latents, **as_call(conditions, family), **size).images
    if family == "flux":
        theirs = diffusers.FluxPipeline._unpack_latents(theirs, SIZES[family], SIZES[family], pipe.vae_scale_factor)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    # merged by load_flow, it is the policy, too, and another base
    merged = opened(folders, family, lora=str(tmp_path / "lora"))
    again = integrate(lambda t, x: merged.drift(t, x, conditions), x0, merged.time_grid(3))
    assert (again - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert mark_of(merged.transformer) != mark
    place = next(iter(network.lora)).replace("/", ".")
    layer = flow.transformer.get_submodule(place)
    change = merged.transformer.get_submodule(place).weight - layer.base_layer.weight
    scale = {5.0: 5 / 2, None: 1 if layer.r["policy"] == 2 else 2 / 3}[options.get("alpha")]  # alpha / rank
    assert torch.allclose(change, scale * layer.lora_B["policy"].weight @ layer.lora_A["policy"].weight, atol=1e-5)
    assert "base_model: " in (tmp_path / "lora/README.md").read_text()


def test_two_adapters_are_on_one_transformer_and_each_is_itself(folders, tmp_path):  # noqa: F811
    conditions = given(2, "sd3")
    alone = stirred(FlowAdapter(str(folders["sd3"]), rank=2, image_size=8))
    save_network(alone, tmp_path / "model.safetensors")
    flow = opened(folders, "sd3", checkpointing=True)
    adapter = FlowAdapter.of_file(tmp_path / "model.safetensors", flow)
    policy = stirred(LoRANetwork.on_flow(flow, rank=4, targets=r".*\.to_q"))
    x, times = torch.randn(2, *flow.state_shape), torch.full((2,), 0.4)
    call = (times, times + 0.3, x, times, x, conditions)
    with torch.no_grad():
        assert torch.allclose(adapter(*call), alone(*call), atol=1e-5)
        lone = LoRANetwork(str(folders["sd3"]), image_size=8, rank=4, targets=r".*\.to_q")
        lone.load_state_dict(policy.state_dict())
        assert torch.allclose(policy(*call), lone(*call), atol=1e-5)
        assert torch.allclose(flow.velocity(times, x, conditions), lone.flow.velocity(times, x, conditions), atol=1e-5)
        assert not torch.allclose(policy(*call), adapter(*call), atol=1e-2)
    # the gradient of one, of recomputed blocks, after a call of the other
    for ours, theirs in ((policy, lone), (adapter, alone)):
        found = ours(*call)
        adapter(*call)
        policy(*call)
        found.square().sum().backward()
        theirs(*call).square().sum().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-6 + 1e-5 * q.grad.abs().max()), name


def test_two_networks_of_one_kind_on_one_flow_keep_their_weights(folders, tmp_path):  # noqa: F811
    conditions, files, alone = given(2, "sd3"), [], []
    for i in range(2):
        alone.append(stirred(FlowAdapter(str(folders["sd3"]), rank=2, image_size=8), 0.3 + i))
        files.append(save_network(alone[i], tmp_path / f"{i}.safetensors"))
    flow = opened(folders, "sd3")
    both = [FlowAdapter.of_file(file, flow) for file in files]
    policies = [stirred(LoRANetwork.on_flow(flow, rank=2), 0.3 + i) for i in range(3)]
    x, t = torch.randn(2, *flow.state_shape), torch.full((2,), 0.4)
    with torch.no_grad():
        for ours, theirs in zip(both, alone, strict=True):
            assert torch.allclose(ours(t, t, x, t, x, conditions), theirs(t, t, x, t, x, conditions), atol=1e-5)
        for policy in policies:
            lone = LoRANetwork(str(folders["sd3"]), image_size=8, rank=2)
            lone.load_state_dict(policy.state_dict())  # a name on the transformer is in no file
            assert torch.allclose(policy.drift(0.4, x, conditions), lone.drift(0.4, x, conditions), atol=1e-5)


def test_ranks_of_a_module_are_of_all_layers_in_it_and_of_none_is_an_error(folders):  # noqa: F811
    ranks = {"^transformer_blocks.0.attn": 3, "to_q": 4, "^transformer_blocks.0": 5}
    network = LoRANetwork(str(folders["sd3"]), image_size=8, rank=2, ranks=ranks)
    for place, (a, b) in network.lora.items():
        expected = 3 if "blocks/0/attn" in place else 4 if place.endswith("to_q") else 5 if "blocks/0" in place else 2
        assert a.out_features == b.in_features == expected, place
    with pytest.raises(ValueError, match=r"ranks: no layer .* is in, a module 'blocks.7': expected a part of names su"):
        LoRANetwork(str(folders["sd3"]), image_size=8, rank=2, ranks={"blocks.7": 3})


def test_files_of_another_flow_are_refused(folders, tmp_path):  # noqa: F811
    network = LoRANetwork(str(folders["sd3"]), image_size=8, rank=2)
    file = save_network(network, tmp_path / "model.safetensors")
    again = load_model(file).network
    assert again.config == network.config
    other = tiny.sd3()
    with torch.no_grad():
        next(other.transformer.parameters())[0] += 1
    other.save_pretrained(tmp_path / "other")
    flow = load_flow(tmp_path / "other", 8, torch_dtype="float32")
    with pytest.raises(CheckpointError, match=r"trained on other weights than those of .*other: give the flow"):
        LoRANetwork.of_file(file, flow)
    with pytest.raises(CheckpointError, match=r"holds a mfm_lightning.backbones.lora.LoRANetwork: expected a FlowAdap"):
        FlowAdapter.of_file(file, flow)
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*nowhere: expected a pytorch_lora_weights.safetensors"):
        load_flow(tmp_path / "other", 8, lora=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"model.safetensors is no LoRA of a StableDiffusion3Pipeline"):
        load_flow(tmp_path / "other", 8, lora=str(file))
    with pytest.raises(ValueError, match="rank 0 and ranks None must be at least 1"):
        LoRANetwork.on_flow(flow, rank=0)
    with pytest.raises(ValueError, match=r"targets 'nothing': .*"):
        LoRANetwork.on_flow(flow, rank=1, targets="nothing")


def test_a_lora_on_top_of_another_says_so_in_its_card_and_where_it_does_not_fit(folders, tmp_path):  # noqa: F811
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = stirred(LoRANetwork.on_flow(opened(folders, "sd3"), rank=2), 0.5).write_beside(tmp_path / "first")
    network = stirred(LoRANetwork.on_flow(opened(folders, "sd3", lora=str(first)), rank=2), 0.5)
    file = save_network(network, tmp_path / "model.safetensors")
    second, x = network.write_beside(tmp_path / "second"), torch.randn(2, *network.state_shape)
    # the card's lines, run as they are, give the policy's velocity
    code = (second / "README.md").read_text().split("```python\n")[1].split("```")[0]
    absent = dict.fromkeys([k for k in network.flow.pipe.components if k.startswith(("text_encoder", "tokenizer"))])
    found = {"FOLDER": str(second), "absent": absent}
    exec(code.replace(f"({str(folders['sd3'])!r})", f"({str(folders['sd3'])!r}, **absent)"), found)
    theirs = SD3Flow(found["pipe"], 8)
    conditions = guided("sd3")
    ours = network.drift(0.3, x, conditions).detach()
    assert (theirs.drift(0.3, x, conditions) - ours).abs().max() < 1e-5 * ours.abs().max()
    for flow, said in (
        (opened(folders, "sd3"), "give the flow that it was trained on$"),
        (load_flow(str(folders["sd3"]), 8, torch_dtype="float16"), "rounded otherwise: open it in bfloat16 or float32"),
        (
            opened(folders, "sd3", lora=str(second)),
            r"sd3\d* with the LoRA .*second.*the type \(float32 here\) in which",
        ),
    ):
        with pytest.raises(CheckpointError, match=said):
            LoRANetwork.of_file(file, flow)


@pytest.mark.parametrize("kind", [LoRANetwork, FlowAdapter])
def test_a_file_opens_the_variant_of_the_weights_that_it_was_trained_on(kind, tmp_path):
    tiny.sd3().save_pretrained(tmp_path / "sd3", variant="fp16")  # the only weights that are there
    network = kind.on_flow(load_flow(tmp_path / "sd3", 8, torch_dtype="float32", variant="fp16"), rank=2)
    again = load_model(save_network(stirred(network), tmp_path / "model.safetensors")).network
    assert (again.config["variant"], again.config["revision"]) == ("fp16", None)
    conditions, x, t = given(2, "sd3"), torch.randn(2, *network.state_shape), torch.full((2,), 0.4)
    with torch.no_grad():
        assert torch.equal(again(t, t, x, t, x, conditions), network(t, t, x, t, x, conditions))


def test_a_mark_is_of_the_weights_in_any_type(folders):  # noqa: F811
    full, half = (load_flow(str(folders["sd3"]), 8, torch_dtype=kind).transformer for kind in ("float32", "bfloat16"))
    assert mark_of(full) == mark_of(half)
