"""FLUX as a two-time flow map by a LoRA in the public form, with tiny random weights, against a transformer of merged
weights that is called by hand."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from mfm_lightning.alignment import (  # fmt: skip
    DiamondGradientFree,
    DrawGradient,
    FlowMapGradient,
    NoiseOptimisation,
    Steering,
    Target,
    TimeGrid,
    TrajectoryTilting,
)
from mfm_lightning.backbones import FluxFlow, FluxFlowMap, load_flow
from mfm_lightning.backbones.flux import packed, places, unpacked
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Conditions
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

peft = pytest.importorskip("peft")
RANK = 3
TIMES = "timestep_embedder.linear_1", "timestep_embedder.linear_2"
MODULES = [
    *(f"time_text_embed.{which}_embedder.{name}" for which in ("original", "second") for name in TIMES),
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_mlp",
]  # fmt: skip


def layer(transformer, name):
    """Of the transformer with one time."""
    for which in ("original", "second"):
        name = name.replace(f"time_text_embed.{which}_embedder.", "time_text_embed.")
    return transformer.get_submodule(name)


def lora(path, modules=MODULES, change=None, header=None):
    transformer, generator, tensors = tiny.flux().transformer, torch.Generator().manual_seed(7), {}
    for name in modules:
        out, inputs = layer(transformer, name).weight.shape
        for part, shape in (("A", (RANK, inputs)), ("B", (out, RANK))):
            tensors[f"transformer.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(change(tensors) if change else tensors, path, header)
    return tensors


def by_hand(tensors, s, u, x, given):
    """The mean of both embeddings and merged weights, W + B A, written out: X_{s,u}(x) and the velocity."""
    transformer = tiny.flux().transformer
    embedders = {"original": transformer.time_text_embed, "second": copy.deepcopy(transformer.time_text_embed)}
    for name in {key.split(".lora_")[0] for key in tensors}:
        a, b = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        name = name.removeprefix("transformer.")
        which = next((w for w in embedders if f".{w}_embedder." in name), None)
        part = (
            transformer.get_submodule(name) if which is None else embedders[which].get_submodule(name.split(".", 2)[2])
        )
        with torch.no_grad():
            part.weight += b @ a
    seen = []

    def both(timestep, guidance, pooled):
        seen.append(timestep)
        times = {"original": 1000 * (1 - s), "second": 1000 * (1 - u)}
        each = [embedders[which](time.expand(len(x)), guidance, pooled) for which, time in times.items()]
        return (each[0] + each[1]) / 2

    transformer.time_text_embed.forward, first = both, transformer.time_text_embed.forward
    embedders["original"] = first
    out = transformer(
        hidden_states=packed(x), timestep=torch.zeros(len(x)), guidance=given.guidance.expand(len(x)),
        pooled_projections=given.pooled.expand(len(x), -1), encoder_hidden_states=given.text.expand(len(x), -1, -1),
        txt_ids=torch.zeros(given.text.shape[1], 3), img_ids=places(x.shape[2] // 2, x.shape[3] // 2, x),
        return_dict=False,
    )[0]  # fmt: skip
    assert len(seen) == 1
    velocity = unpacked(out, *x.shape[2:])  # along sigma, from data to noise
    return x + ((1 - u) - (1 - s)) * velocity, -velocity


def conditions():
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(1, tiny.TOKENS, tiny.TEXT, generator=generator)
    return Conditions(text=text, pooled=torch.randn(1, tiny.POOLED, generator=generator), guidance=1.5)


def noise(rows=3):
    return torch.randn(rows, tiny.CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("max_rows", [8, 2])
def test_map_and_drift_are_those_of_merged_weights(tmp_path, max_rows):
    tensors = lora(tmp_path / "lora.safetensors")
    flow = FluxFlowMap(tiny.flux(), lora=tmp_path / "lora.safetensors", image_size=16, max_rows=max_rows)
    given, x = conditions(), noise()
    for s, u in ((0.0, 1.0), (0.2, 0.7), (0.4, 0.4)):
        exact, velocity = by_hand(tensors, torch.tensor(s), torch.tensor(u), x, given)
        torch.testing.assert_close(flow.base_flow_map(s, u, x, given), exact, rtol=1e-4, atol=1e-5)
        if s == u:
            torch.testing.assert_close(flow.drift(s, x, given), velocity, rtol=1e-4, atol=1e-5)
            assert torch.equal(flow.base_flow_map(s, u, x, given), x)
    # each sample has its own times, and both times count
    s, u = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.8, 1.0])
    whole = flow.base_flow_map(s, u, x, given)
    for i in range(3):
        one = flow.base_flow_map(float(s[i]), float(u[i]), x[i : i + 1], given)
        torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-4, atol=1e-5)
    plain = FluxFlow(tiny.flux(), image_size=16).drift(0.2, x, given)
    assert (flow.drift(0.2, x, given) - plain).abs().max() > 0.01  # the LoRA does something


@torch.no_grad()
def test_the_scale_that_a_files_header_says_is_taken(tmp_path):
    """diffusers writes a LoRA's alpha there; B A is then times alpha / rank."""
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES).to_dict()
    said = json.dumps({f"transformer.{name}": value for name, value in settings.items()}, default=list)
    tensors = lora(tmp_path / "lora.safetensors", header={"format": "pt", "lora_adapter_metadata": said})
    flow = FluxFlowMap(tiny.flux(), lora=tmp_path / "lora.safetensors", image_size=16)
    doubled = {name: 2 * value if "lora_B" in name else value for name, value in tensors.items()}
    exact, _ = by_hand(doubled, torch.tensor(0.2), torch.tensor(0.7), noise(), conditions())
    torch.testing.assert_close(flow.base_flow_map(0.2, 0.7, noise(), conditions()), exact, rtol=1e-4, atol=1e-5)
    lora(tmp_path / "lora.safetensors", header={"lora_adapter_metadata": "[1"})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata in its header is no JSON object"):
        FluxFlowMap(tiny.flux(), lora=tmp_path / "lora.safetensors")


def test_look_ahead_methods_run_and_count(tmp_path):
    lora(tmp_path / "lora.safetensors")
    flow = FluxFlowMap(tiny.flux(), lora=tmp_path / "lora.safetensors", image_size=16)
    target = Target(flow, lambda images: 5 * images[:, 0].mean(dim=(1, 2)), flow.decoder, conditions())
    x0, K = noise(2), 3
    steered = Steering(FlowMapGradient(), TimeGrid(K), clip=0.5)(target, x0)
    plain = Steering(FlowMapGradient(), TimeGrid(K), strength=0.0)(target, x0)
    assert (steered.rewards > plain.rewards).all()
    assert steered.nfe.total == 2 * 5 * K
    tilted = TrajectoryTilting(num_particles=2, grid=TimeGrid(K))(target, x0, torch.Generator().manual_seed(0))
    assert tilted.nfe.total == 2 * 2 * (5 * K - 3)
    free = Steering(DiamondGradientFree(2), TimeGrid(2))(target, x0, torch.Generator().manual_seed(0))
    assert torch.isfinite(free.states).all()
    for method in (
        Steering(FlowMapGradient()),
        TrajectoryTilting(),
        NoiseOptimisation(),
        Steering(DiamondGradientFree(2)),
    ):
        method.check(target.reward, flow)  # as mfm predict and mfm benchmark do, before any work
        with pytest.raises(CheckpointError, match="needs a flow map, and a FluxFlow has none"):
            method.check(target.reward, FluxFlow(tiny.flux(), image_size=16))
    with pytest.raises(CheckpointError, match="draws posteriors from the model, and a FluxFlowMap gives none"):
        Steering(DrawGradient(1)).check(target.reward, flow)


def test_load_flow_takes_it(tmp_path):
    tensors = lora(tmp_path / "lora.safetensors")
    tiny.flux(**encoders.of_flux(tmp_path / "words")).save_pretrained(tmp_path / "pipe")
    flow = load_flow(tmp_path / "pipe", 16, "float32", flow_map=str(tmp_path / "lora.safetensors"))
    assert isinstance(flow, FluxFlowMap)
    assert "lora.safetensors" in flow.identity["weights"]
    exact, _ = by_hand(tensors, torch.tensor(0.2), torch.tensor(0.7), noise(), conditions())
    with torch.no_grad():
        torch.testing.assert_close(flow.base_flow_map(0.2, 0.7, noise(), conditions()), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_flow(tmp_path / "pipe", 16, "float32", flow_map=str(tmp_path / "none.safetensors"))
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="is a LoRA of FLUX's: a SD3Flow takes none"):
        load_flow(tmp_path / "sd3", 16, "float32", flow_map=str(tmp_path / "lora.safetensors"))


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def without(key):
    return lambda tensors: {name: value for name, value in tensors.items() if key not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("second"), "trains no second time: it has no transformer.time_text_embed.second_embedder"),
        (renamed("transformer.", "unet.", ), r"expected transformer.MODULE.lora_A.weight, got unet\."),
        (renamed("attn.to_q.", "attn.to_qkv."), r"another transformer, .*no transformer_blocks.0.attn.to_qkv here"),
        (without("to_q.lora_B"), r"transformer_blocks.0.attn.to_q needs lora_A.weight \(rank, in\) and lora_B"),
        (lambda t: {k: v[:, :1].contiguous() if "to_q.lora_A" in k else v for k, v in t.items()},
         r"to_q has lora_A \(3, 1\) and lora_B \(16, 3\), for a layer of 16 inputs and 16 outputs"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, change, message):
    lora(tmp_path / "lora.safetensors", change=change)
    pipe = tiny.flux()
    names = list(pipe.transformer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        FluxFlowMap(pipe, lora=tmp_path / "lora.safetensors")
    assert list(pipe.transformer.state_dict()) == names  # a pipeline that is in memory stays as it was


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        FluxFlowMap(tiny.flux(), lora=tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="FluxFlowMap takes a FluxPipeline, got a StableDiffusion3Pipeline"):
        FluxFlowMap(tiny.sd3(), lora=tmp_path / "lora.safetensors")
