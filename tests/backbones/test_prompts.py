"""Prompts through real tokenizers and text encoders; pipelines from folders; kept embeddings; what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mfm_lightning import backbones
from mfm_lightning.backbones import FluxFlow, Lumina2Flow, QwenImageFlow, SanaFlow, SD3Flow, load_flow
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.conditions import Conditions
from mfm_lightning.samplers import integrate
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

PROMPTS = ["a red cat", "the blue dog on the mat"]
FAMILIES = {
    "sd3": (SD3Flow, tiny.sd3, encoders.of_sd3, 16),
    "flux": (FluxFlow, tiny.flux, encoders.of_flux, 16),
    "sana": (SanaFlow, tiny.sana, encoders.of_gemma, 64),
    "lumina2": (Lumina2Flow, tiny.lumina2, encoders.of_gemma, 32),
}


def whole(family, folder):
    """A pipeline with text encoders, and its image size."""
    kind, build, make, size = FAMILIES[family]
    pipe = build(**make(folder))
    pipe.set_progress_bar_config(disable=True)
    return kind, pipe, size


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_give_the_pipelines_pictures(tmp_path, family):
    """With the pipeline's own guidance and negative prompt; then with others."""
    kind, pipe, size = whole(family, tmp_path)
    flow = kind(pipe, image_size=size)
    noise = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(noise, 2, *noise.shape[1:]) if family == "flux" else noise
    call = {"height": size, "width": size, "num_inference_steps": 3, "latents": packed, "output_type": "pt"}
    call |= {"use_resolution_binning": False} if family == "sana" else {}
    others = [({}, {})]
    if family != "flux":
        others.append(({"negative_prompt": ["a dog", "red"], "guidance_scale": 2.0}, {"negative": ["a dog", "red"], "guidance": 2.0}))  # fmt: skip  # noqa: E501
        others.append(({"guidance_scale": 1.0}, {"guidance": 1.0}))
    else:
        others.append(({"guidance_scale": 2.0}, {"guidance": 2.0}))
    pictures = []
    for theirs, ours in others:
        expected = pipe(PROMPTS, **call, **theirs).images
        given = flow.encode(PROMPTS, **ours)
        with torch.no_grad():
            found = flow.decoder(integrate(lambda t, x, c=given: flow.drift(t, x, c), noise, flow.time_grid(3)))
        assert given.prompts == tuple(PROMPTS)
        assert torch.allclose(found, expected, atol=2e-5)
        pictures.append(found)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_true_guidance_of_flux(tmp_path):
    kind, pipe, size = whole("flux", tmp_path)
    flow = kind(pipe, image_size=size, true_guidance=2.0)
    noise = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    expected = pipe(
        PROMPTS, negative_prompt="a dog", true_cfg_scale=2.0, height=size, width=size, num_inference_steps=3,
        latents=pipe._pack_latents(noise, 2, *noise.shape[1:]), output_type="pt",
    ).images  # fmt: skip
    given = flow.encode(PROMPTS, negative="a dog")
    with torch.no_grad():
        found = flow.decoder(integrate(lambda t, x: flow.drift(t, x, given), noise, flow.time_grid(3)))
    assert torch.allclose(found, expected, atol=2e-5)
    assert flow.passes(given) == 2
    with pytest.raises(ValueError, match="guidance 2 needs a negative prompt"):
        flow.encode(PROMPTS)
    with pytest.raises(ValueError, match="needs a negative prompt, and the conditions have none"):
        flow.drift(0.5, noise, Conditions(text=given.text, pooled=given.pooled))
    with pytest.raises(ValueError, match="a negative prompt is no use with guidance 1"):
        kind(pipe, image_size=size).encode(PROMPTS, negative="a dog")


def test_a_folder_is_loaded_without_its_text_encoders_until_a_prompt_is_new(tmp_path, monkeypatch):
    _, pipe, size = whole("sd3", tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    cache = tmp_path / "cache"
    flow = load_flow(tmp_path / "pipe", size, "float32", cache=cache)
    assert isinstance(flow, SD3Flow)
    assert flow.pipe.text_encoder is None
    expected = SD3Flow(pipe, image_size=size).encode(PROMPTS)
    found = flow.encode(PROMPTS)
    for name, value in expected._tensors().items():
        assert torch.allclose(getattr(found, name), value, atol=1e-6), name
    assert len(list(cache.glob("*.safetensors"))) == 3  # two prompts, and the negative one

    def not_needed(*_, **__):
        raise AssertionError("the text encoders were loaded")

    again = load_flow(tmp_path / "pipe", size, "float32", cache=cache)
    monkeypatch.setattr(again, "_load_encoders", not_needed)
    kept = again.encode(list(reversed(PROMPTS)))
    assert torch.equal(kept.text, found.text.flip(0))
    with pytest.raises(AssertionError, match="were loaded"):
        again.encode("a three")
    # another text encoder in the folder: what the old one made is not its own
    encoders.clip(True, 9).save_pretrained(tmp_path / "pipe/text_encoder")
    other = load_flow(tmp_path / "pipe", size, "float32", cache=cache).encode(PROMPTS)
    assert (other.text - found.text).abs().max() > 1e-3


def test_what_does_not_fit_is_refused(tmp_path):
    _, pipe, size = whole("sd3", tmp_path)
    flow = SD3Flow(pipe, image_size=size)
    x = torch.randn(2, *flow.state_shape)
    given = flow.encode(PROMPTS)
    cases = [
        (lambda: flow.drift(0.5, x), r"a SD3Flow needs conditions with text: give flow\.encode\(prompts\)"),
        (lambda: flow.drift(0.5, x[:, :3], given), r"latents of shape \(2, 3, 8, 8\): a SD3Flow takes \(B, 4, h, w\)"),
        (lambda: flow.drift(0.5, x[..., :7], given), r"h and w multiples of 2"),
        (lambda: flow.drift(0.5, torch.cat([x, x[:1]]), given), r"3 states for 2 rows of"),
        (lambda: flow.encode(["a", 3]), r"prompt 1 is 3: expected a text"),
        (lambda: flow.encode(PROMPTS, negative=["a"] * 3), r"3 negative prompts for 2 prompts: expected one, or"),
        (lambda: SD3Flow(pipe, image_size=15), r"image_size 15 x 15: height and width must be multiples of 4"),
        (lambda: SD3Flow(pipe, max_rows=0), r"max_rows 0 must be at least 1"),
        (lambda: SD3Flow(pipe, cache=tmp_path), r"a cache of embeddings needs encoders"),
        (lambda: FluxFlow(pipe), r"FluxFlow takes a FluxPipeline, got a StableDiffusion3Pipeline"),
        (lambda: SD3Flow(tiny.sd3()).encode("a"), r"has no text encoder: load it whole, or give Conditions"),
        (lambda: flow.time_grid(0), r"steps 0 must be at least 1"),
        (lambda: QwenImageFlow(tiny.qwen_image()).encode("a", guidance=4.0), r"guidance 4 needs a negative prompt"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_pipelines_that_are_no_flows_are_refused(tmp_path):
    def folder(name, scheduler=None):
        path = tmp_path / name
        (path / "scheduler").mkdir(parents=True)
        (path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        if scheduler is not None:
            (path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
        return path

    with pytest.raises(CheckpointError, match="is a StableDiffusionPipeline, which is no flow: it predicts 'epsilon'"):
        load_flow(folder("StableDiffusionPipeline", {"prediction_type": "epsilon"}))
    with pytest.raises(
        CheckpointError, match="is a HiDreamImagePipeline, a family that has no adapter here; known are"
    ):
        load_flow(folder("HiDreamImagePipeline", {"shift": 3.0}))
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json: not the folder of a diffusers pipeline"):
        load_flow(tmp_path)
    with pytest.raises(FileNotFoundError, match="no diffusers pipeline at"):
        load_flow(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="torch_dtype 'bf16': expected one of float32, bfloat16, float16"):
        load_flow(tmp_path, torch_dtype="bf16")
    tiny.sd3().save_pretrained(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/transformer")
    with pytest.raises(CheckpointError, match=r"the StableDiffusion3Pipeline in .* cannot be read"):
        load_flow(tmp_path / "cut")
    epsilon = tiny.diffusers.DDIMScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"is no flow: its DDIMScheduler takes predictions of type 'epsilon'"):
        SD3Flow(tiny.sd3(epsilon))


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_compute_in_the_type_that_is_asked_for(tmp_path, family):
    """Their files are of float32. In 8 bits of mantissa and two layers nothing is off by a tenth."""
    _, pipe, size = whole(family, tmp_path)
    pipe.save_pretrained(tmp_path / "pipe")
    found = {name: load_flow(tmp_path / "pipe", size, name).encode(PROMPTS) for name in ("float32", "bfloat16")}
    for name in ("text", "pooled"):
        exact, half = getattr(found["float32"], name), getattr(found["bfloat16"], name)
        if exact is not None:
            assert half.dtype == torch.bfloat16
            assert 0 < (half.float() - exact).norm() < 0.1 * exact.norm()


def test_the_guides_lines_run(tmp_path):
    """docs/text_to_image.md, with a tiny pipeline for the real one, and fewer steps."""
    tiny.flux(**encoders.of_flux(tmp_path / "words")).save_pretrained(tmp_path / "pipe")
    text = (Path(__file__).parents[2] / "docs/text_to_image.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for real, small in (
        ('"black-forest-labs/FLUX.1-dev", 1024', f'"{tmp_path / "pipe"}", 16'),
        ('.to("cuda")', ""),
        (', device="cuda"', ""),
        ("TimeGrid(28", "TimeGrid(3"),
    ):
        assert real in code
        code = code.replace(real, small)
    found = {}
    exec(code, found)
    assert found["result"].images.shape == (2, 3, 16, 16)
    # the guide's table says what the flows do
    for family, usual in (("SD3Flow", 7.0), ("FluxFlow", 3.5), ("SanaFlow", 4.5), ("Lumina2Flow", 4.0), ("ZImageFlow", 6.0)):  # fmt: skip  # noqa: E501
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{family}`")]
        build = {"SD3Flow": tiny.sd3, "FluxFlow": tiny.flux, "SanaFlow": tiny.sana, "Lumina2Flow": tiny.lumina2}
        flow = getattr(backbones, family)(build.get(family, tiny.z_image)(), image_size=64)
        assert flow.usual_guidance == usual
        assert row.split("|")[2].strip().startswith(f"{usual:g}")


def test_another_vae_is_part_of_the_identity_and_must_fit(tmp_path):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    found = []
    for seed in (1, 2):  # as a VAE that is trained again
        tiny.random_weights(tiny.kl_vae(), seed).save_pretrained(tmp_path / "vae")
        found.append(load_flow(tmp_path / "sd3", 8, "float32", vae=str(tmp_path / "vae")).identity)
    assert found[0]["weights"] != found[1]["weights"]
    tiny.kl_vae(channels=8).save_pretrained(tmp_path / "vae")
    with pytest.raises(
        ValueError, match="the VAE has latents of 8 channels, and the StableDiffusion3Pipeline's transf"
    ):
        load_flow(tmp_path / "sd3", 8, "float32", vae=str(tmp_path / "vae"))


def test_random_weights_leave_the_generators_of_accelerators_alone(tmp_path, monkeypatch):
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    next((tmp_path / "sd3/transformer").glob("*.safetensors")).unlink()
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.default_generator.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (load_flow(tmp_path / "sd3", 8, "float32", random_seed=seed) for seed in (0, 1))
    assert not seeded  # all ranks would go on with the same noise, whatever seed_everything says
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(flow.transformer.parameters()) for flow in (first, second)]
    assert not torch.equal(*weights)
    with pytest.raises(CheckpointError, match="no AutoencoderKL from nobody/vae"):  # and nothing is fetched
        load_flow(tmp_path / "sd3", 8, "float32", random_seed=0, vae="nobody/vae")
