"""What the small commands on decoders, bfloat16 and variants of steering measure."""

import itertools
import sys

import pytest
import torch

from mfm_benchmarks import decoder_costs, draw_precision, steering_variants
from mfm_lightning.alignment import DrawGradient, NetworkGradient, Steering, Target, TimeGrid
from mfm_lightning.checkpoints import load_model
from mfm_lightning.networks import PixelDecoder, ValueDiT


def test_operations_of_a_decoder_are_those_of_its_convolutions():
    """Against a count by hand of the small decoder: 2 products a weight and pixel, forward and for the input."""
    network = decoder_costs.networks()[decoder_costs.SMALL]
    pixels, counted = {}, 0
    layers = [m for m in network.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda m, given, out: pixels.__setitem__(m, out.shape[-1] * out.shape[-2]))
    with torch.no_grad():
        network.decode(torch.zeros(1, decoder_costs.CHANNELS, 8, 8))
    for layer in layers:
        counted += 2 * 2 * layer.weight.numel() * pixels[layer]
    found = decoder_costs.operations(64)
    assert found[decoder_costs.SMALL] == counted
    assert found[decoder_costs.LARGE] > 10 * counted


def test_a_size_that_is_no_latents_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoder_costs", "--size", "100"])
    with pytest.raises(SystemExit):
        decoder_costs.main()
    assert "--size 100 must be a multiple of 8" in capsys.readouterr().err


def test_only_the_draws_are_in_bfloat16():
    """Steering in float32 is the library's own; with draws in bfloat16 it is near it and not the same, and its states
    stay float32, for the drift's are."""
    model = load_model("mnist").eval().requires_grad_(False)
    target = Target(model, lambda images: 150 * images.mean(dim=(1, 2, 3)), PixelDecoder())
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in (draw_precision.FLOAT, draw_precision.DRAWS, draw_precision.ALL):
        found[precision], seconds = draw_precision.steered(target, noise, 2, precision)
        assert seconds > 0
    method = Steering(DrawGradient(), TimeGrid(2), clip=2.0, base_step="flow_map")
    expected = method(target, noise, torch.Generator().manual_seed(1)).states
    assert torch.equal(found[draw_precision.FLOAT], expected)
    for precision in (draw_precision.DRAWS, draw_precision.ALL):
        assert 0 < (found[precision] - expected).abs().max() < 0.5
    assert found[draw_precision.DRAWS].dtype == torch.float32
    apart = {k: (v - expected).square().mean() for k, v in found.items()}
    assert apart[draw_precision.ALL] > apart[draw_precision.DRAWS] / 4


def test_variants_of_steering_take_the_evaluations_of_their_budget():
    """As counted while they run; and noise that is kept is the same at each step, fresh noise is not."""
    model = load_model("mnist").eval().requires_grad_(False)
    noise, seen = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), {}

    class Watched(Target):
        def flow_map(self, s, u, x, t, x_t):
            seen.setdefault(name, []).append(x[:1].detach().clone())
            return super().flow_map(s, u, x, t, x_t)

    for name, (make, steps) in steering_variants.variants(45, None).items():
        target = Watched(model, lambda images: images.mean(dim=(1, 2, 3)), PixelDecoder())
        method = Steering(make(), TimeGrid(steps), base_step="flow_map")
        found = method(target, noise, torch.Generator().manual_seed(1))
        assert 36 <= found.nfe.total / 2 <= 54, name
    kept, fresh = seen["the same noise at each step"], seen[steering_variants.FIRST]
    assert all(torch.equal(drawn, kept[0]) for drawn in kept)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(fresh, 2))
    assert steering_variants.growing(45) == [1] * 4 + [2] + [4]


def test_half_an_amortised_value_is_half_its_gradient():
    model, value = load_model("mnist").eval().requires_grad_(False), ValueDiT(28, 4, 1, 16, 1, 2, 0)
    for p in value.parameters():
        torch.nn.init.normal_(p, std=0.2)
    target = Target(model, lambda images: images.mean(dim=(1, 2, 3)), PixelDecoder())
    x, amortised = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), NetworkGradient(value)
    drawn = DrawGradient()(target, 0.5, x, torch.Generator().manual_seed(1)).gradient
    network = amortised(target, 0.5, x).gradient
    found = steering_variants.Between(amortised, 0.25)(target, 0.5, x, torch.Generator().manual_seed(1)).gradient
    assert network.abs().max() > 0
    torch.testing.assert_close(found, 0.75 * drawn + 0.25 * network)
