"""Logarithmic axes: labels that can be read, by what is drawn."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mfm_lightning.utils.figures import log_ticks, round_numbers

RANGES = [
    (0.075, 0.22),
    (38.0, 225.0),
    (0.013, 0.095),
    (3.1, 3.9),
    (0.9, 2.8),
    (1e-6, 3e5),
    (2e-4, 7e-3),
    (101.0, 101.5),
]


def drawn(low, high, marked=()):
    """Ticks, texts and boxes of the labels of both axes, as they are drawn; the x axis is marked."""
    figure = Figure(figsize=(3.7, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.plot([low, high], [low, high])
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    log_ticks(axes.xaxis, 6, marked)
    log_ticks(axes.yaxis, 8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx((low, high))
    for axis in (axes.xaxis, axes.yaxis):
        labels = axis.get_ticklabels(which="both")
        shown = [label for label in labels if label.get_text()]
        yield axis.get_ticklocs(), [(s.get_text(), s.get_window_extent(canvas.get_renderer())) for s in shown]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_labels_do_not_overlap_and_are_numbers_of_their_ticks(low, high):
    for ticks, labels in drawn(low, high):
        assert len(labels) == len(ticks) >= 2
        assert not [1 for (_, a), (_, b) in itertools.combinations(labels, 2) if a.overlaps(b)]
        for tick, (text, _) in zip(ticks, labels, strict=True):
            number = float(text.replace("$10^{", "1e").replace("}$", ""))
            assert number == pytest.approx(tick, rel=1e-5)
            assert low <= tick <= high


def test_of_what_is_marked_all_has_ticks_and_what_fits_has_labels():
    marked = [1, 2, 3, 4, 5, 6, 7, 8, 16, 64]
    (ticks, labels), _ = drawn(0.8, 80.0, marked)
    assert ticks.tolist() == marked
    assert [text for text, _ in labels] == ["1", "3", "7", "16", "64"]
    assert not [1 for (_, a), (_, b) in itertools.combinations(labels, 2) if a.overlaps(b)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (38, 225, [50, 100, 200]),
        (0.9, 2.8, [1, 2]),
        (12, 85, [20, 50]),
        (7.5, 22, [10, 20]),
        (20, 62, [20, 30, 40, 50, 60]),
        (0.5, 2000, [1, 10, 100, 1000]),
        (1e-6, 3e5, [1e-6, 1e-4, 1e-2, 1, 100, 1e4]),
        (3.1, 3.9, [3.2, 3.4, 3.6, 3.8]),
    ],
)
def test_round_numbers(low, high, expected):
    assert round_numbers(low, high, 6) == pytest.approx(expected)
