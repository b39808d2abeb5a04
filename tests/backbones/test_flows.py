"""What pretrained flows are asked for besides samples: conventions of time and sign, derivatives, counts, methods."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from mfm_lightning.alignment import (  # fmt: skip
    BestOfN,
    DPSGradient,
    DrawGradientFree,
    FeynmanKac,
    GlassPosterior,
    Search,
    Steering,
    Target,
    TimeGrid,
)
from mfm_lightning.alignment.described import described
from mfm_lightning.backbones import FluxFlow, SanaFlow, SD3Flow
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.samplers import integrate
from tests.backbones import tiny
from tests.backbones.test_parity import FAMILIES, close, conditions, started

MEAN, DEVIATION = 0.7, 0.3


class ExactVelocity(nn.Module):
    """In place of a transformer: the velocity of data N(MEAN, DEVIATION^2), as the family's own would give it.

    How each transformer is fed and what it gives is written here from its pipeline's source: the time as so many of
    sigma, or as 1 - sigma; the derivative along sigma, or along 1 - sigma.
    """

    dtype = torch.float32

    def __init__(self, family, config):
        super().__init__()
        self.family, self.config, self.in_channels = family, config, config.in_channels

    def forward(self, hidden_states, timestep, *_, **__):
        per_sigma = {"sd3": 1000.0, "sana": 1000.0 * getattr(self.config, "timestep_scale", 1.0)}.get(self.family, 1.0)
        along_t = self.family in ("lumina2", "z_image")
        t = timestep if along_t else 1 - timestep / per_sigma
        x = torch.stack(hidden_states) if isinstance(hidden_states, list) else hidden_states
        t = t.reshape(-1, *[1] * (x.dim() - 1))
        variance = (1 - t) ** 2 + (t * DEVIATION) ** 2
        velocity = MEAN + (t * DEVIATION**2 - (1 - t)) / variance * (x - t * MEAN)
        return (velocity if along_t else -velocity,)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_velocity_samples_its_gaussian(family):
    """The flow of a Gaussian is x1 = MEAN + DEVIATION x0; 200 steps of Heun are within 1e-4 of it."""
    kind, build, factor = FAMILIES[family]
    pipe = build()
    flow = kind(pipe, image_size=8 * factor)
    flow.transformer = ExactVelocity(family, pipe.transformer.config)
    _, ours = conditions(family, False)
    noise = torch.randn(2, *flow.state_shape, generator=torch.Generator().manual_seed(0))
    found = integrate(lambda t, x: flow.drift(t, x, ours), noise, torch.linspace(0, 1, 201), "heun")
    assert torch.allclose(found, MEAN + DEVIATION * noise, atol=1e-4)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_derivatives(family):
    """Along a direction against reverse mode, <w, J d> = <J^T w, d>; gradients in parts and recomputed."""
    flow, _, noise, _ = started(family, (8, 8), attention="math")
    _, ours = conditions(family, True)
    t, generator = torch.tensor([0.3, 0.7]), torch.Generator().manual_seed(1)
    direction = torch.randn(noise.shape, generator=generator)
    value, along = torch.func.jvp(lambda x: flow.drift(t, x, ours), (noise,), (direction,))
    assert torch.allclose(value, flow.drift(t, noise, ours), atol=1e-5)
    for _ in range(3):
        w = torch.randn(noise.shape, generator=generator)
        back = torch.func.vjp(lambda x: flow.drift(t, x, ours), noise)[1](w)[0]
        assert float((w * along).sum()) == pytest.approx(float((back * direction).sum()), rel=1e-4, abs=1e-3)

    def gradient():
        x = noise.clone().requires_grad_()
        (flow.drift(t, x, ours) * direction).sum().backward()
        return x.grad

    def counted(transformer):
        """The gradient, and how often the first block ran for it."""
        calls = []
        hook = next(iter(transformer.transformer_blocks)).register_forward_pre_hook(lambda *_: calls.append(1))
        found = gradient()
        hook.remove()
        return found, len(calls)

    whole, once = counted(flow.transformer)
    flow.max_rows = 1
    assert close(gradient(), whole)
    flow.transformer = started(family, (8, 8), attention="math", checkpointing=True)[0].transformer
    found, twice = counted(flow.transformer)
    assert close(found, whole)
    assert twice == 2 * 2 * once  # cut into rows, and each once more in the backward pass


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_have_gradients_in_parts(family):
    flow, _, noise, _ = started(family, (8, 8))
    x = (0.3 * noise).requires_grad_()
    flow.decoder(x).square().sum().backward()
    whole, x.grad, flow.decoder.max_rows = x.grad, None, 1
    flow.decoder(x).square().sum().backward()
    assert whole.abs().max() > 0
    assert torch.allclose(x.grad, whole, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_checkpointing_decodes_again(family):
    flow, _, noise, _ = started(family, (8, 8))
    x, calls = (0.3 * noise).requires_grad_(), []
    flow.decoder(x).square().sum().backward()
    whole, x.grad = x.grad, None
    flow.enable_checkpointing()
    hook = flow.decoder.vae.decoder.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    flow.decoder(x).square().sum().backward()
    hook.remove()
    assert len(calls) == 2
    assert torch.allclose(x.grad, whole, atol=1e-5 * float(whole.abs().max()))


def test_states_stay_in_float32_whatever_the_transformer_computes_in():
    flow, _, noise, _ = started("sd3", (8, 8))
    _, ours = conditions("sd3", True)
    exact = flow.drift(0.4, noise, ours)
    flow.transformer.bfloat16()
    flow.decoder.vae.bfloat16()
    found, images = flow.drift(0.4, noise, ours), flow.decoder(noise)
    assert found.dtype == images.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def reward(images):
    return 5 * images[:, 0].mean(dim=(1, 2))


def test_evaluations_by_guidance_count_twice():
    flow, _, noise, _ = started("sd3", (8, 8))
    for guided, passes in ((False, 1), (True, 2)):
        _, ours = conditions("sd3", guided)
        target = Target(flow, reward, flow.decoder, ours)
        result = Steering(strength=0.0, grid=TimeGrid(5, of_model=True))(target, noise)
        assert result.nfe.network == 2 * 5 * passes
        # DPS: an evaluation and its backward pass at each step, whose drift is used again
        target = Target(flow, reward, flow.decoder, ours)
        result = Steering(DPSGradient(), TimeGrid(5))(target, noise)
        assert (result.nfe.network, result.nfe.reward) == (2 * 5 * 2 * passes, 2 * 5 * 2)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_the_base_sampler_on_the_models_own_times_is_the_pipeline(family):
    flow, pipe, noise, call = started(family, (8, 8))
    given, ours = conditions(family, False)
    packed = pipe._pack_latents(noise, 2, *noise.shape[1:]) if family == "flux" else noise
    expected = pipe(latents=packed, output_type="pt", **call, **given).images
    target = Target(flow, reward, flow.decoder, ours)
    result = Steering(strength=0.0, grid=TimeGrid(call["num_inference_steps"], of_model=True))(target, noise)
    assert torch.allclose(flow.decoder(result.states), expected, atol=2e-5)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_methods_that_need_a_drift_alone_raise_the_reward(family):
    """Best-of-N, search and Feynman-Kac by GLASS, DPS and gradient-free steering, each against the base samples."""
    flow, _, noise, _ = started(family, (8, 8))
    _, ours = conditions(family, True)
    target = Target(flow, reward, flow.decoder, ours, reward_scale=20.0)
    grid, glass = TimeGrid(4, of_model=True), GlassPosterior(steps=2)

    def mean_reward(method):
        result = method(target, noise, torch.Generator().manual_seed(0))
        assert result.states.shape == noise.shape
        return float(target.plain_rewards(result.states).mean())

    base = mean_reward(Steering(strength=0.0, grid=grid))
    assert mean_reward(Steering(DPSGradient(), grid, clip=1.0)) > base
    assert mean_reward(Steering(DrawGradientFree(4, glass), grid, clip=1.0)) > base
    candidates = [mean_reward(BestOfN(n, grid=grid)) for n in (1, 6)]
    assert candidates[1] > candidates[0]
    assert mean_reward(Search(4, 2, 2, posterior=glass)) > base
    particles = FeynmanKac(num_particles=6, grid=TimeGrid(3), transition="glass", ess_threshold=1.0)
    target = Target(flow, reward, flow.decoder, ours, reward_scale=1000.0)
    steered = mean_reward(particles)
    target = Target(flow, reward, flow.decoder, ours, reward_scale=0.0)  # the same moves, without weights
    assert steered > mean_reward(particles)


def test_times_are_the_schedulers():
    """Written out from the schedulers' source."""
    sigma = torch.linspace(1, 1 / 4, 4).double()
    flux = FluxFlow(tiny.flux(), image_size=16)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (4 * 4 - 256)  # by 16 tokens
    shifted = torch.exp(torch.tensor(mu)) / (torch.exp(torch.tensor(mu)) + (1 / sigma - 1))
    assert torch.allclose(torch.tensor(flux.time_grid(4)).double(), torch.cat([1 - shifted, torch.ones(1)]), atol=1e-6)
    assert torch.allclose(
        torch.tensor(flux.time_grid(4, shift=3.0)[:-1]).double(), 1 - 3 * sigma / (1 + 2 * sigma), atol=1e-6
    )
    # SANA's own scheduler: DPM-Solver's sigmas of a flow
    solver = tiny.diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    sana = SanaFlow(tiny.sana(solver), image_size=64)
    grid = torch.tensor(sana.time_grid(4)).double()
    alphas = torch.linspace(1, 1 / 1000, 5).double()
    expected = 1 - 3 * (1 - alphas) / (1 + 2 * (1 - alphas))
    assert torch.allclose(grid, torch.cat([expected.flip(0)[:-1], torch.ones(1)]), atol=1e-6)
    with pytest.raises(ValueError, match="a SD3Transformer2DModel takes no attention backend of diffusers"):
        SD3Flow(tiny.sd3(), attention="native")
    with pytest.raises(ValueError, match="quick"):
        FluxFlow(tiny.flux(), attention="quick")
    theirs = FluxFlow(tiny.flux(), attention="_native_math").transformer
    assert {p._attention_backend for p in theirs.attn_processors.values()} == {"_native_math"}
    active, _ = _AttentionBackendRegistry.get_active_backend()
    assert active == "native"  # of models that have none of their own
    with pytest.raises(ValueError, match="shift -1 positive"):
        flux.time_grid(4, shift=-1)
    with pytest.raises(ValueError, match="shift 3 is of a model's own grid"):
        TimeGrid(4, shift=3)
    with pytest.raises(ValueError, match="a model's own grid has its own start"):
        TimeGrid(4, start=0.3, of_model=True)
    with pytest.raises(ValueError, match="steps 50 and a grid of 4: give one of them"):
        BestOfN(2, steps=50, grid=TimeGrid(4))
    with pytest.raises(ValueError, match="guidance 5: this transformer"):
        FluxFlow(tiny.flux(guidance_embeds=False), image_size=16).encode("a", guidance=5.0)
    with pytest.raises(TypeError, match="a SimpleNamespace has no time grid of its own"):
        TimeGrid(4, of_model=True).pairs(SimpleNamespace())


def test_the_first_of_the_candidates_is_the_base_flows_sample():
    flow, _, noise, _ = started("sd3", (8, 8))
    _, ours = conditions("sd3", False)
    target, grid = Target(flow, reward, flow.decoder, ours), TimeGrid(3, of_model=True)
    base = Steering(strength=0.0, grid=grid)(target, noise)
    one = BestOfN(1, grid=grid)(target, noise, torch.Generator().manual_seed(0))
    assert torch.allclose(one.states, base.states, atol=1e-5)
    many = [BestOfN(4, grid=grid, max_rows=rows)(target, noise, sample_generators(0, [5, 6])) for rows in (64, 2)]
    assert torch.allclose(many[0].states, many[1].states, atol=1e-5)  # however they are cut
    assert (many[0].rewards >= base.rewards - 1e-5).all()


def test_a_method_is_described_without_addresses():
    found = described(Search(2, 2, 2, posterior=GlassPosterior(steps=2)))
    assert found["posterior"]["class"].endswith("GlassPosterior")
    assert found["posterior"]["steps"] == 2
    assert " at 0x" not in json.dumps(described(FeynmanKac(num_particles=6, transition="glass")))
    assert described(Search(2, 2, 2, posterior=GlassPosterior(steps=2))) == found
    assert described(Search(2, 2, 2, posterior=GlassPosterior(steps=3))) != found


def test_memory_that_ends_says_what_to_lower(monkeypatch):
    flow, _, noise, _ = started("sd3", (8, 8))
    _, ours = conditions("sd3", False)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(flow.transformer, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"the transformer ran out of memory: lower max_rows or"):
        flow.drift(0.5, noise, ours)
    monkeypatch.setattr(flow.decoder.vae, "decode", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"the VAE ran out of memory: lower max_rows, or set tiled"):
        flow.decoder(noise)
