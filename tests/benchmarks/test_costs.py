"""What a suite will take: evaluations against the paper's formulas, operations against published ones."""

import pytest

from mfm_benchmarks.command import load_suite
from mfm_benchmarks.costs import Part, count, networks, operations, parts_of, totals
from mfm_lightning.alignment import BestOfN, DPSGradient, DrawGradient, DrawGradientFree, Search, Steering, TimeGrid


@pytest.mark.parametrize(
    ("method", "network", "reward"),
    [  # F.3.5, split in networks and rewards
        (Steering(DrawGradient(3), TimeGrid(5)), 5 * (1 + 2 * 3), 5 * 2 * 3),
        (Steering(DrawGradientFree(4), TimeGrid(5)), 5 * (1 + 4), 5 * 4),
        (Steering(DPSGradient(), TimeGrid(5)), 5 * 2, 5 * 2),
        (Search(num_particles=4, num_draws=3, steps=5), 5 * 4 * 3, 5 * 4 * 3),
        (BestOfN(num_candidates=7, steps=5), 7 * 5, 7),
    ],
)
def test_evaluations_are_those_of_the_paper(method, network, reward):
    found = count(method)
    assert (found.network, found.reward) == (network, reward)


def test_the_imagenet_suite_is_planned_without_its_files():
    suite, _, _ = load_suite("imagenet256", [])
    suite.methods = {name: suite.methods[name] for name in ("MFM-G", "DPS")}
    suite._points = [point for point in suite._points if point.method in suite.methods]
    parts = list(parts_of(suite))
    by = {part.name: part for part in parts}
    assert by["pool"].network == 128 * 1000 * 250
    steered = [part for part in parts if part.name.startswith("MFM-G")]
    # six numbers of draws, three rewards, three scales, 128 samples, 250 steps
    assert sum(part.network for part in steered) == 3 * 3 * 128 * 250 * (6 + 2 * 63)
    assert sum(part.scored for part in steered) == 3 * 3 * 128 * 250 * 2 * 63
    assert sum(part.cells for part in steered) == 6 * 3 * 3 * 128 / 8
    made = networks(suite, "imagenet256/mfm_xl2")
    assert set(made) == {"network", "decoder", "ImageReward", "HPSv2", "PickScore"}
    flops = operations({"network": made["network"]})["network"]
    # DiT-XL/2 has 118.64 G multiply-adds (arXiv 2212.09748, Table 4); the condition's tokens add a little
    assert flops == pytest.approx(2 * 118.64e9, rel=0.01)
    (one, everything) = totals(iter([Part("a, b", "r", 10, 2, 3, 1)]), {"network": 5, "decoder": 7, "r": 11})
    assert one.flops == everything.flops == 10 * 5 + 3 * 7 + 2 * 11
    assert everything.hours(1e-12) == everything.flops / 3600
