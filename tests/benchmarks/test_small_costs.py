"""What the small commands on decoders, bfloat16 and variants of steering measure."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from mfm_benchmarks import decoder_costs, draw_precision, steering_variants
from mfm_lightning.alignment import DrawGradient, Estimate, NetworkGradient, Steering, Target, TimeGrid
from mfm_lightning.checkpoints import load_model
from mfm_lightning.networks import PixelDecoder, ValueDiT
from tests.processes import ended, forked


def test_operations_of_a_decoder_are_those_of_its_convolutions():
    """In a process of its own: a gradient of tensors without content starts threads, after which a fork has none."""
    assert ended(forked(check_operations)) == 0


def check_operations():
    """What the small decoder adds to the VAE's own images, against a count by hand: 2 products a weight and pixel,
    forward and for the input; and the VAE's attention has none that are not counted in both."""
    networks, counted = decoder_costs.networks(), {}

    def count(layer, given, out):
        counted[layer] = 2 * layer.weight.numel() * out.shape[-1] * out.shape[-2]

    for network in networks.values():
        for layer in (m for m in network.decoder.modules() if isinstance(m, torch.nn.Conv2d)):
            layer.register_forward_hook(count)
    small, large = networks[decoder_costs.SMALL], networks[decoder_costs.LARGE]
    with torch.no_grad():
        for network in networks.values():
            network.decode(torch.zeros(1, decoder_costs.CHANNELS, 8, 8))
    by_small, by_large = (
        sum(number for layer, number in counted.items() if layer in set(network.decoder.modules()))
        for network in (small, large)
    )
    found = decoder_costs.operations(64)
    through = found[decoder_costs.SMALL] - 2 * by_small
    assert by_large < through < 1.02 * by_large  # and its attention in the middle
    assert found[decoder_costs.LARGE] == pytest.approx(2 * through, rel=0.02)


def test_a_size_that_is_no_latents_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoder_costs", "--size", "100"])
    with pytest.raises(SystemExit):
        decoder_costs.main()
    assert "--size 100 must be a multiple of 8" in capsys.readouterr().err


def test_only_the_draws_are_in_bfloat16():
    """By what autocast says while drift and draws are computed; in float32 steering is the library's own."""
    model = load_model("mnist").eval().requires_grad_(False)
    seen: dict[str, set[tuple[str, bool]]] = {}

    class Watched(Target):
        def base_flow_map(self, s, u, x):
            seen[precision].add(("drift", torch.is_autocast_enabled("cpu")))
            return super().base_flow_map(s, u, x)

        def flow_map(self, s, u, x, t, x_t):
            seen[precision].add(("draws", torch.is_autocast_enabled("cpu")))
            return super().flow_map(s, u, x, t, x_t)

    target = Watched(model, lambda images: 150 * images.mean(dim=(1, 2, 3)), PixelDecoder())
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = {}
    for precision in (draw_precision.FLOAT, draw_precision.DRAWS, draw_precision.ALL):
        seen[precision] = set()
        found[precision], seconds = draw_precision.steered(target, noise, 2, precision)
        assert seconds > 0
    assert seen[draw_precision.FLOAT] == {("drift", False), ("draws", False)}
    assert seen[draw_precision.DRAWS] == {("drift", False), ("draws", True)}
    assert seen[draw_precision.ALL] == {("drift", True), ("draws", True)}
    precision = draw_precision.FLOAT
    method = Steering(DrawGradient(), TimeGrid(2), clip=2.0, base_step="flow_map")
    assert torch.equal(found[precision], method(target, noise, torch.Generator().manual_seed(1)).states)


def test_variants_of_steering_take_the_evaluations_of_their_budget():
    """As counted while they run; and noise that is kept is the same at each step, fresh noise is not."""
    model = load_model("mnist").eval().requires_grad_(False)
    noise, seen = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), {}

    class Watched(Target):
        def flow_map(self, s, u, x, t, x_t):
            seen.setdefault(name, []).append(x[:1].detach().clone())
            return super().flow_map(s, u, x, t, x_t)

    for name, variant in steering_variants.variants(45, None).items():
        if variant.pilot:
            continue
        target = Watched(model, lambda images: images.mean(dim=(1, 2, 3)), PixelDecoder())
        method = Steering(variant.estimator(), variant.grid(target, noise), base_step="flow_map")
        found = method(target, noise, torch.Generator().manual_seed(1))
        assert 36 <= found.nfe.total / 2 <= 54, name
    kept, fresh = seen["the same noise at each step"], seen[steering_variants.FIRST]
    assert all(torch.equal(drawn, kept[0]) for drawn in kept)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(fresh, 2))
    assert steering_variants.growing(45) == [1] * 4 + [2] + [4]


def test_steering_that_is_kept_held_or_moved_is_that_of_the_draws(monkeypatch):
    """P = (sigma^2/2) grad V of draws that are known: a = 2 + noise at each step, plus the state's own mean."""
    asked = []

    def known(self, target, t, x, generator=None):
        noise = self.noise(x, generator)
        asked.append((float(t), noise.clone()))
        half = 1 / float(t) - 1
        return Estimate((noise[:, 0] + 10 * x) / half, x.new_zeros(len(x)), x.new_ones(len(x)))

    monkeypatch.setattr(steering_variants.KeptNoise, "__call__", known)
    times, states = (0.2, 0.4, 0.5), [torch.full((1, 2), value) for value in (1.0, 2.0, 3.0)]

    def products(**settings):
        asked.clear()
        estimator, found = steering_variants.Reused(**settings), []
        generator = torch.Generator().manual_seed(0)
        for t, x in zip(times, states, strict=True):
            found.append((1 / t - 1) * estimator(None, t, x, generator).gradient)
        return found, [noise[:, 0] for _, noise in asked]

    def close(found, expected):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    found, e = products()
    close(found, [e[0] + 10, e[1] + 20, e[2] + 30])
    found, e = products(keep=0.25)
    second = 0.25 * (e[0] + 10) + 0.75 * (e[1] + 20)
    close(found, [e[0] + 10, second, 0.25 * second + 0.75 * (e[2] + 30)])
    found, e = products(held=2)
    assert len(e) == 2
    close(found, [e[0] + 10, e[0] + 10, e[1] + 30])
    found, e = products(keep=0.5, corrected=True)  # moved by P(x_k) - P(x_{k-1}) with the same noise: 10 each
    assert len(e) == 5
    assert [t for t, _ in asked] == [0.2, 0.4, 0.2, 0.5, 0.4]
    second = 0.5 * (e[0] + 10 + 10) + 0.5 * (e[1] + 20)
    close(found, [e[0] + 10, second, 0.5 * (second + 10) + 0.5 * (e[3] + 30)])


@pytest.mark.parametrize("rising_from", [0.0, 0.5])
def test_steps_are_placed_where_steering_changes(monkeypatch, rising_from):
    """A steering whose rate rises by the same from one time on, and is constant before: steps are uniform after that
    time, and one long step leads to it. The base flow's part of the way counts for nothing."""
    noise = torch.zeros(3, 1)
    base = SimpleNamespace(base_flow_map=lambda t, then, x: x + 5 * (then - t[:, None]) ** 2)

    def steer(target, x, method, generator, callback):
        for k, (now, then) in enumerate(method.grid.pairs(None)):
            rate = max(0.0, now - rising_from)
            x = base.base_flow_map(torch.full((3,), now), then, x) + (then - now) * rate
            callback(k, x)

    monkeypatch.setattr(steering_variants, "steer", steer)
    target = SimpleNamespace(expand=lambda x: base)
    grid = steering_variants.placed(5, target, noise, pilot=200)
    start = max(rising_from, 0.01)
    expected = [0.01, *[start + (1 - start) * k / 5 for k in range(1, 5)], 1.0]
    assert grid.times == pytest.approx(expected, abs=0.01)
    assert grid.steps == 5


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
