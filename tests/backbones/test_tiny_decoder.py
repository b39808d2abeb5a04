"""Gradients of rewards through a small decoder, and images by the VAE."""

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from mfm_lightning import DPSGradient, Steering, Target, TimeGrid, VAEDecoder
from mfm_lightning.backbones import load_flow
from mfm_lightning.commands.flow_planning import CHECKPOINTED, DECODING, GRADIENT, plan_flow
from mfm_lightning.networks import TinyDecoder
from mfm_rewards.weights import CheckpointError
from tests.backbones import encoders, tiny

# two pixels a latent, as `tiny.kl_vae`
SIZES = {
    "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}  # fmt: skip


def small(channels=tiny.CHANNELS):
    """Of diffusers' class."""
    return tiny.random_weights(AutoencoderTiny(latent_channels=channels, **SIZES), 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small decoder, one for latents of other channels, a VAE, and a whole pipeline."""
    folder = tmp_path_factory.mktemp("decoders")
    small().save_pretrained(folder / "small")
    small(3).save_pretrained(folder / "other")
    tiny.kl_vae().save_pretrained(folder / "vae")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "sd3")
    return folder


def latents(number=5):
    return torch.randn(number, tiny.CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))


def gradient(decoder, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(decoder(x).square().sum(), x)[0]


@pytest.mark.parametrize("max_rows", [1, 2, 8])
def test_it_decodes_states_as_diffusers_does(folder, max_rows):
    """AutoencoderTiny takes scaled latents as they are, and gives pixels in [-1, 1]."""
    x, network = latents(), AutoencoderTiny.from_pretrained(folder / "small")
    decoder = TinyDecoder(str(folder / "small"), max_rows=max_rows)
    plain = (network.decode(x).sample + 1) / 2
    torch.testing.assert_close(decoder(x), plain.clamp(0, 1))
    wide = TinyDecoder(str(folder / "small"), clamp=False, max_rows=max_rows)
    torch.testing.assert_close(wide(x), plain)
    assert (plain < 0).any()  # there is something to clamp
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(((network.decode(leaf).sample + 1) / 2).square().sum(), leaf)
    torch.testing.assert_close(gradient(wide, x), expected)
    assert not list(decoder.parameters())  # no part of a checkpoint
    low = TinyDecoder(str(folder / "small"), precision="bf16")(x)
    assert low.dtype == torch.float32
    assert 0 < (low - plain.clamp(0, 1)).abs().max() < 0.05


def test_a_vae_told_by_itself_and_differentiated_through_the_small_one(folder):
    x, through = latents(), TinyDecoder(str(folder / "small"))
    plain = VAEDecoder(str(folder / "vae"))
    both = VAEDecoder(str(folder / "vae"), gradients=through)
    assert torch.equal(both(x), plain(x))
    with torch.no_grad():
        assert torch.equal(both(x.clone().requires_grad_()), plain(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(through(leaf), leaf, 2 * plain(x))  # of the VAE's pixels, back by the small one
    torch.testing.assert_close(gradient(both, x), expected)
    assert torch.equal(both(x.clone().requires_grad_()).detach(), plain(x))  # what is scored is what there will be
    assert (gradient(both, x) - gradient(plain, x)).abs().max() > 1e-3
    assert both.missing() == []
    nowhere = VAEDecoder(str(folder / "vae"), gradients=TinyDecoder("nowhere"))
    assert nowhere.missing()[0].startswith("gradients: no small decoder at nowhere: give a folder with config.json")
    assert "TinyDecoder" in repr(both)  # by which samples of another decoder are told apart


def test_a_flow_is_steered_through_it(folder):
    """By one Euler step of DPS, written out: x + dt (b + (1-t)/t grad r(D(x)))."""
    plain = load_flow(folder / "sd3", torch_dtype="float32")
    flow = load_flow(folder / "sd3", torch_dtype="float32", gradient_vae=str(folder / "small"))
    x, t, then = latents(2), 0.5, 1.0
    given = flow.encode(["a red circle", "a blue square"])
    torch.testing.assert_close(flow.decoder(x), plain.decoder(x), rtol=0, atol=0)

    def reward(images):
        return images.square().mean(dim=(1, 2, 3))

    method = Steering(DPSGradient(), TimeGrid(1, start=t))
    steered = method(Target(flow, reward, flow.decoder, given), x).states
    state = x.clone().requires_grad_()
    b = flow.drift(t, state, given)
    denoised = state + (1 - t) * b
    images = plain.decoder(denoised.detach())  # the VAE's, of which the reward is
    slope = 2 * images / images[0].numel()
    through = ((small().decode(denoised).sample + 1) / 2).clamp(0, 1)
    (slope,) = torch.autograd.grad(through, state, slope)
    expected = x + (then - t) * (b.detach() + (1 - t) / t * slope)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-5)
    other = method(Target(plain, reward, plain.decoder, given), x).states
    assert (steered - other).abs().max() > 1e-4
    assert "gradients" not in plain.identity  # folders of before are gone on with
    assert "small" in flow.identity["gradients"]


@pytest.mark.parametrize(
    "numbers", [{"scale": 0.3}, {"shift": 0.5}, {"scale": [1.0, 2.0, 3.0, 4.0], "shift": [0.1, 0.2, 0.3, 0.4]}]
)
def test_states_with_numbers_of_their_own(folder, numbers):
    """The small decoder takes latents z as (z - 0.11) 0.7, by the VAE's config, whatever x = (z - shift) scale is."""
    z, through = latents(), TinyDecoder(str(folder / "small"))
    scale, shift = (
        torch.tensor(numbers.get(k, usual)).reshape(-1, 1, 1) for k, usual in (("scale", 0.7), ("shift", 0.11))
    )
    both = VAEDecoder(str(folder / "vae"), gradients=through, **numbers)
    plain = VAEDecoder(str(folder / "vae"))
    found = gradient(both, (z - shift) * scale)
    leaf = ((z - 0.11) * 0.7).requires_grad_()
    (expected,) = torch.autograd.grad(through(leaf), leaf, 2 * plain(leaf.detach()))
    torch.testing.assert_close(found, expected * 0.7 / scale, rtol=1e-4, atol=1e-6)


def test_the_best_iterate_is_the_best_by_the_vae(folder):
    """Scores with and without a gradient are compared with each other: both are of the VAE's images."""
    both = VAEDecoder(str(folder / "vae"), gradients=TinyDecoder(str(folder / "small")))
    plain = VAEDecoder(str(folder / "vae"))
    x = latents().requires_grad_()
    scores = [decoder(states).mean(dim=(1, 2, 3)) for decoder in (both, plain) for states in (x, x.detach())]
    for score in scores[1:]:
        assert torch.equal(score.detach(), scores[0].detach())


def test_a_decoder_of_other_latents_is_said_or_refused(folder, caplog):
    both = VAEDecoder(str(folder / "vae"), gradients=TinyDecoder(str(folder / "small")))
    gradient(both, latents())
    gradient(both, latents())
    assert caplog.text.count("is it for these latents?") == 1  # of random weights, once

    class Same(TinyDecoder):
        def forward(self, states):
            return VAEDecoder(str(folder / "vae"))(states)

    caplog.clear()
    gradient(VAEDecoder(str(folder / "vae"), gradients=Same("same")), latents())
    assert "correlation" not in caplog.text
    wide = AutoencoderTiny(
        latent_channels=4, **{**SIZES, "num_decoder_blocks": (1, 1, 1), "decoder_block_out_channels": (8, 8, 8)}
    )
    other = VAEDecoder(str(folder / "vae"), gradients=TinyDecoder.of_network(wide))
    with pytest.raises(
        ValueError, match=r"gives images \(3, 16, 16\), and the VAE \(3, 8, 8\): it is for other latents"
    ):
        gradient(other, latents())


def test_what_does_not_fit_is_refused(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("mfm_lightning.backbones.loading._load", lambda *a, **k: asked.append(a))
    with pytest.raises(FileNotFoundError, match="no small decoder at nowhere"):
        load_flow(folder / "sd3", gradient_vae="nowhere")
    with pytest.raises(CheckpointError, match=r"small decoder .*vae: .* weights are not in its file"):
        load_flow(folder / "sd3", gradient_vae=str(folder / "vae"))
    with pytest.raises(ValueError, match="decodes latents of 3 channels, and these have 4"):
        load_flow(folder / "sd3", gradient_vae=str(folder / "other"))
    assert not asked  # before the pipeline is read
    with pytest.raises(ValueError, match="max_rows 0 must be at least 1"):
        TinyDecoder("any", max_rows=0)
    broken = small()
    with torch.no_grad():
        next(broken.decoder.parameters()).fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="holds numbers that are not finite, first in decoder"):
        TinyDecoder(str(tmp_path / "broken")).load()


def test_its_plan_has_less_memory_for_gradients(folder):
    """Nothing is read but sizes; what decodes for images is as before."""
    plans = {
        path: plan_flow(str(folder / "sd3"), 64, "float32", 1, method=Steering(DPSGradient()), gradient_vae=path)
        for path in (None, str(folder / "small"))
    }
    plain, through = plans.values()
    assert through.peaks[DECODING] == plain.peaks[DECODING]
    assert through.peaks[GRADIENT] < plain.peaks[GRADIENT]
    assert through.peaks[CHECKPOINTED] < plain.peaks[CHECKPOINTED]
    weights = sum(p.numel() for p in small().parameters())
    assert through.parameters == plain.parameters | {"gradient_vae": weights}
    assert through.weights["gradient_vae"] == pytest.approx(4 * weights)


def test_of_a_network_in_memory():
    decoder = TinyDecoder.of_network(small(), max_rows=2)
    assert not any(p.requires_grad for p in decoder.load().parameters())
    with pytest.raises(ValueError, match="decodes latents of 4 channels"):
        decoder(torch.zeros(1, 16, 4, 4))
    assert isinstance(decoder, nn.Module)
