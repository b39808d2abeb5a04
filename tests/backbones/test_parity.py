"""Each family against its own pipeline: the same latents, images and times, in diffusers' loop and in ours."""

from dataclasses import replace

import pytest
import torch

from mfm_lightning.backbones import FluxFlow, Lumina2Flow, QwenImageFlow, SanaFlow, SD3Flow, ZImageFlow
from mfm_lightning.conditions import Conditions
from mfm_lightning.samplers import integrate
from tests.backbones import tiny

STEPS = 4
FAMILIES = {
    "sd3": (SD3Flow, tiny.sd3, 2),
    "flux": (FluxFlow, tiny.flux, 2),
    "sana": (SanaFlow, tiny.sana, 32),
    "lumina2": (Lumina2Flow, tiny.lumina2, 8),
    "qwen_image": (QwenImageFlow, tiny.qwen_image, 8),
    "z_image": (ZImageFlow, tiny.z_image, 2),
}
SIZES = [(8, 8), (12, 4)]  # in latents


def texts(seed, rows=2):
    """Embeddings of two prompts, as an encoder would give them; the second is shorter where there are masks."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(rows, tiny.TOKENS, tiny.TEXT, generator=generator)
    mask = torch.ones(rows, tiny.TOKENS, dtype=torch.long)
    mask[1:, 3:] = 0
    return text, mask, torch.randn(rows, tiny.POOLED, generator=generator)


def asked(family, guided):
    """Arguments of the pipeline, and our conditions, for the same two prompts."""
    (text, mask, pooled), (other, other_mask, other_pooled) = texts(1), texts(2)
    if family == "sd3":
        given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 3.0 if guided else 1.0}
        ours = Conditions(text=text, pooled=pooled, guidance=3.0 if guided else 1.0)
        negative = {"negative_prompt_embeds": other, "negative_pooled_prompt_embeds": other_pooled}
        return given | (negative if guided else {}), ours, {"negative_text": other, "negative_pooled": other_pooled}
    if family == "flux":
        given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 2.0}
        negative = {
            "negative_prompt_embeds": other,
            "negative_pooled_prompt_embeds": other_pooled,
            "true_cfg_scale": 3.0,
        }
        ours = Conditions(text=text, pooled=pooled, guidance=2.0)
        return given | (negative if guided else {}), ours, {"negative_text": other, "negative_pooled": other_pooled}
    if family in ("sana", "lumina2"):
        given = {"prompt_embeds": text, "prompt_attention_mask": mask, "guidance_scale": 3.0 if guided else 1.0}
        negative = {
            "negative_prompt_embeds": other,
            "negative_prompt_attention_mask": other_mask,
            "negative_prompt": None,
        }
    elif family == "qwen_image":
        given = {"prompt_embeds": text, "prompt_embeds_mask": mask, "true_cfg_scale": 3.0 if guided else 1.0}
        negative = {"negative_prompt_embeds": other, "negative_prompt_embeds_mask": other_mask}
    else:
        rows = [row[there.bool()] for row, there in zip(text, mask, strict=True)]
        others = [row[there.bool()] for row, there in zip(other, other_mask, strict=True)]
        given = {"prompt_embeds": rows, "guidance_scale": 2.0 if guided else 0.0}
        negative = {"negative_prompt_embeds": others}
    ours = Conditions(text=text, mask=mask, guidance=3.0 if guided else 1.0)
    return given | (negative if guided else {}), ours, {"negative_text": other, "negative_mask": other_mask}


def conditions(family, guided):
    given, ours, negative = asked(family, guided)
    return given, replace(ours, **negative) if guided else ours


def started(family, size, **options):
    """Flow, pipeline, noise of a size, and options of the pipeline's call."""
    kind, build, factor = FAMILIES[family]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    pixels = tuple(factor * side for side in size)
    flow = kind(pipe, image_size=pixels, **options)
    noise = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(3))
    call = {"height": pixels[0], "width": pixels[1], "num_inference_steps": STEPS}
    if family == "sana":
        call["use_resolution_binning"] = False
    return flow, pipe, noise, call


def as_given(family, pipe, noise):
    """Latents as the pipeline takes them."""
    if family in ("flux", "qwen_image"):
        return pipe._pack_latents(noise, 2, noise.shape[1], *noise.shape[2:])
    return noise


def close(x, y):
    """To 1e-5 of the largest number."""
    return x.shape == y.shape and (x - y).abs().max() < 1e-5 * y.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ode_equals_the_pipeline(family, guided, size):
    extra = {"true_guidance": 3.0} if family == "flux" and guided else {}
    flow, pipe, noise, call = started(family, size, **extra)
    given, ours = conditions(family, guided)
    call |= given
    theirs = pipe(latents=as_given(family, pipe, noise), output_type="latent", **call).images
    with torch.no_grad():
        found = integrate(lambda t, x: flow.drift(t, x, ours), noise, flow.time_grid(STEPS))
        images = flow.decoder(found)
    assert flow.state_shape == (tiny.CHANNELS, *size)
    assert close(as_given(family, pipe, found), theirs)
    decoded = pipe(latents=as_given(family, pipe, noise), output_type="pt", **call).images
    assert images.shape == decoded.shape
    assert close(images, decoded)
    # the prompts matter, and so do times: else any mistake in them would pass
    with torch.no_grad():
        t = torch.tensor([0.3, 0.6])
        v = flow.drift(t, noise, ours)
        assert (flow.drift(t, noise, ours.take(torch.tensor([1, 0]))) - v).abs().amax() > 1e-3
        assert (flow.drift(t.flip(0), noise, ours) - v).abs().amax() > 1e-3
        # a row does not depend on its neighbours, nor on how the batch is cut
        alone = flow.drift(t[1:], noise[1:], ours.take(torch.tensor([1])))
        assert torch.allclose(alone, v[1:], atol=1e-5)
        flow.max_rows = 1
        assert torch.allclose(flow.drift(t, noise, ours), v, atol=1e-5)
