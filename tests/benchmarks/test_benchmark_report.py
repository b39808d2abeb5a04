"""The report of a benchmark: what its headline takes, and its page in a browser."""

import html
import json
import os
import re
import shutil
import subprocess
import zlib

import pytest
import torch
from matplotlib.figure import Figure

from mfm_benchmarks import plots
from mfm_benchmarks.blocks import Claims, Headline, Page, Picture, Summary, Table, Text
from mfm_benchmarks.charts import COLOURS, Interval, family, level_dash, looks
from mfm_benchmarks.claims import verdict
from mfm_benchmarks.compare import report
from mfm_benchmarks.page import axes, svg
from mfm_benchmarks.page.figures import write_figures
from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.reward_report import RewardReport, contest
from mfm_benchmarks.report import write_report
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.metrics.distances import frequency_distance
from mfm_lightning.metrics.measured import Measured, interval, mean_of, of_runs, resampled, rounded, simultaneous


def test_the_headline_takes_what_is_cheaper_above_and_near_the_data():
    spread = torch.linspace(-1, 1, 21, dtype=torch.float64)

    def entry(method, label, nfe, reward, frechet, sign=1):
        values = [Measured(v, v + sign * 0.01 * spread) for v in (reward, frechet)]
        return Entry(method, label, None, nfe, *values, values[0], torch.rand(2, 1, 4, 4))

    best = entry("Best-of-N", "N 10", 100, 1.0, 10.0)
    far, near, dear, level = (
        entry("A", "5", 10, 2.0, 20.0), entry("A", "25", 50, 2.0, 12.0),
        entry("B", "", 200, 3.0, 9.0), entry("C", "", 5, 1.001, 9.0, sign=-1),
    )  # fmt: skip
    report = RewardReport({"r": [best, far, near, dear, level]}, [1.0], "A", "", "")
    summary, headline, table, _, short = report.blocks()[:5]
    # A with the fewest evaluations is too far from the data, B needs more than Best-of-N, C is not above it
    assert headline.items[0][0] == "2 ×"  # noqa: RUF001
    assert summary.sentences[0] == (
        "A higher mean reward than Best-of-10, at no more than 1.5 times its Fréchet distance, is reached by A with 2 "
        "times fewer evaluations (r)."
    )
    assert "is 1.2 (1.2 to 1.2) for r" in summary.sentences[1]
    assert "A, λ = any, 25" in headline.items[0][1]
    assert [(row["method"], row["NFE"]) for row in table.rows] == [("A", 10), ("B", 200)]
    assert list(short.lines) == ["C (λ = any): r."]
    assert not any("seconds a sample" in row for row in table.rows)  # not taken
    best.wall_time, far.wall_time = 30.0, 0.5
    (table,) = (b for b in report.blocks() if isinstance(b, Table) and b.name == "reaching_best_of_n")
    assert [row.get("times fewer seconds") for row in table.rows] == [60.0, None]
    assert table.rows[0]["seconds a sample"] == 0.5
    alone = RewardReport({"r": [best, far, dear, level]}, [1.0], "A", "", "").blocks()[:2]
    assert alone[1].items[0][0] == "none"
    assert alone[0].sentences[0].startswith("No setting is shown to reach a higher mean reward")


def samples(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(method, nfe, reward, frechet, seed, num=64, label="", shares=None):
    """An entry of rewards with deviation 0.1, and of a distance with a standard error of 10 % (and one of shares)."""
    spread = samples(400, seed=seed)
    distance = Measured(frechet, frechet * (1 + 0.1 * (spread - spread.mean()) / spread.std()), samples=num)
    rewards = mean_of(reward + 0.1 * (z := samples(num, seed=seed) / 1.0) - 0.1 * z.mean())
    return Entry(method, label, None, nfe, rewards, distance, rewards, torch.rand(2, 1, 4, 4), shares)


def test_a_ratio_is_near_far_or_not_decided_for_all_settings_at_once():
    """Standard errors: of a difference of rewards 0.018, of the logarithm of a ratio 0.14."""
    best = setting("Best-of-N", 1000, 1.0, 100.0, seed=0, label="N 10")
    near, open_, far = (setting("A", 10, 1.2, ratio * 100, seed) for seed, ratio in ((1, 1.05), (2, 1.6), (3, 5.0)))
    barely = setting("A", 10, 1.0 + 2.0 * 0.0177, 100.0, seed=4)  # 2 standard errors: above alone, not among five
    below = setting("A", 10, 0.5, 100.0, seed=5)
    found = contest([near, open_, far, barely, below], best, limit=2.0)
    assert [c.near for c in found[:3]] == [1, 0, -1]
    assert [c.above for c in found] == [True, True, True, False, False]
    assert found[3].gain.sign == 1 or found[3].gain.low == pytest.approx(0, abs=0.005)
    # all bounds are the estimates less one critical value times their errors, as `simultaneous` has it
    ratios = [e.frechet.over(best.frechet).unscaled() * -1.0 for e in (near, open_, far, barely, below)]
    c = simultaneous([*(c.gain for c in found), *ratios])
    assert found[0].least == pytest.approx(found[0].gain.value - c * found[0].gain.error)
    assert c > 2.2  # Student's alone is 1.67


def test_the_headline_says_what_is_not_decided_and_the_page_what_decided():
    best = setting("Best-of-N", 1000, 1.0, 100.0, seed=0, label="N 10")
    near, open_, far = (
        setting(name, nfe, 1.2, frechet, seed)
        for name, nfe, frechet, seed in (("A", 50, 105, 1), ("B", 20, 160, 2), ("C", 10, 500, 3))
    )
    headline, _, decided = RewardReport({"r": [best, near, open_, far]}, [1.0], "A", "", "", 2.0).blocks()[1:4]
    assert headline.items[0] == (
        "20 ×",  # noqa: RUF001
        "fewer evaluations than Best-of-10 for a higher reward (r) at no more than 2 times its Fréchet distance: A, "
        "λ = any; not decided for B, 50 times fewer",
    )
    assert re.match(
        r"r: A, λ = any has a mean reward higher by 0.2 \(at least 0.1\d+ for all settings together\) and 1.05",
        decided.lines[0],
    )
    limit = "the limit of 2 times the Fréchet distance"
    assert f"Even fewer evaluations, but it is not decided whether {limit} holds: B" in decided.lines[0]
    assert f"Even fewer evaluations, but above {limit}: C" in decided.lines[0]
    items = RewardReport({"r": [best, open_, far]}, [1.0], "A", "", "", 2.0).blocks()[1].items
    assert items[0][0] == "not decided"
    assert "whether B, λ = any, with 50 times fewer" in items[0][1]
    blocks = RewardReport({"r": [best, far]}, [1.0], "A", "", "", 2.0).blocks()
    assert blocks[1].items[0][0] == "none"


def first_sentence(*entries, ours="A"):
    report = RewardReport({"r": list(entries)}, [1.0], ours, "", "", 2.0)
    return report.blocks()[0].sentences[0]


def test_the_summary_names_other_methods_with_fewer_evaluations_that_are_not_within_the_limit():
    best = setting("Best-of-N", 1000, 1.0, 100.0, seed=0, label="N 10")
    ours, open_, far = (
        setting(name, nfe, reward, frechet, seed)
        for name, nfe, reward, frechet, seed in (
            ("A", 50, 1.2, 105, 1), ("B", 20, 1.4, 160, 2), ("C", 10, 1.3, 500, 3),
        )
    )  # fmt: skip
    goal = "A higher mean reward than Best-of-10, at no more than 2 times its Fréchet distance, is reached by"
    ratio = {e.method: e.frechet.over(best.frechet).text(2) for e in (open_, far)}
    said = first_sentence(best, ours, open_, far)
    assert said == (
        f"{goal} A with 20 times fewer evaluations (r). "
        "C has a higher mean reward with 100 times fewer evaluations (a gain of 0.3, A 0.2), "
        f"but its Fréchet distance is above the limit: {ratio['C']} times. "
        "B has a higher mean reward with 50 times fewer evaluations (a gain of 0.4, A 0.2), "
        f"but whether its Fréchet distance is within the limit is not decided: {ratio['B']} times."
    )
    # without a setting within the limit, what is not decided is there all the same
    said = first_sentence(best, open_)
    assert said.startswith(
        "No setting is shown to reach a higher mean reward than Best-of-10, at no more than 2 times its Fréchet "
        "distance, with fewer evaluations. B has a higher mean reward with 50 times fewer evaluations (a gain of 0.4), "
        "but whether its Fréchet distance is within the limit is not decided"
    )
    # ours with fewer evaluations that are not within the limit is no other method
    assert first_sentence(best, ours, setting("A", 10, 1.2, 500, 3)) == f"{goal} A with 20 times fewer evaluations (r)."


def test_the_summary_says_plainly_where_another_method_wins():
    best, other = (
        setting(name, nfe, reward, 100.0, seed, label=label)
        for name, nfe, reward, seed, label in (("Best-of-N", 1000, 1.0, 0, "N 10"), ("B", 20, 1.4, 1, ""))
    )
    said = first_sentence(best, other, setting("A-G", 50, 1.2, 100.0, 2), setting("A-S", 10, 0.5, 100.0, 3), ours="A-G")
    won = "For r, another method, B, needs the fewest evaluations:"
    assert said.endswith(f"is reached by B with 50 times fewer evaluations (r). {won} A-G needs 2.5 times as many.")
    said = first_sentence(best, other, setting("A-G", 50, 0.5, 100.0, 2), setting("A-S", 10, 0.5, 100.0, 3), ours="A-G")
    assert said.endswith(f"{won} no setting of A-S or A-G is shown to reach this.")


def test_without_an_interval_nothing_is_decided():
    many, far, one = mean_of(samples(20, seed=0)), mean_of(9 + samples(20, seed=1)), of_runs([2.0])
    assert verdict(many, {"one": one, "far": far}) == ("lower than far; not comparable, without an interval, with one")


def test_a_mixture_is_judged_by_its_shares():
    wanted, classes = torch.tensor([0.5, 0.5]), torch.arange(64) % 2
    shares = [resampled(frequency_distance, c, wanted) for c in (classes, torch.zeros(64, dtype=torch.long))]
    best = setting("Best-of-N", 1000, 1.0, 100.0, seed=0, label="N 10", shares=shares[1])
    ours, other = (setting(n, 10, 1.0, 100.0, seed=k + 1, shares=shares[k]) for k, n in enumerate(("A", "B")))
    blocks = RewardReport({"r": [best, ours, other]}, [1.0], "A", "", "").blocks()
    assert blocks[1].items[0][0] == "0"
    assert "closer to the requested shares than Best-of-N (0.707) and B (0.707)" in blocks[1].items[0][1]
    lines = next(b for b in blocks if b.__class__.__name__ == "Claims" and "shares" in b.heading).lines
    assert len(lines) == 4
    assert "further from the requested shares than A (0)" in lines[0]


# -- the page in a browser

CHECK = """<script>const errors = []; addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => {
const heads = document.querySelectorAll("#table-numbers th button"); heads[1].click(); heads[1].click();
const style = element => getComputedStyle(element);
const small = [...document.querySelectorAll("p, li, td, dd, dt, figcaption, summary, button, svg text")]
  .filter(e => e.getClientRects().length && e.textContent.trim())
  .map(e => [parseFloat(style(e).fontSize) * (e.ownerSVGElement?.getScreenCTM().a ?? 1), e.textContent])
  .filter(([size]) => size < 12.5);
const chart = document.querySelector("#curve svg"), mark = chart.querySelector('[data-name="a"] .mark:last-child');
const box = mark.getBoundingClientRect(), at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
chart.dispatchEvent(new PointerEvent("pointermove", {...at, bubbles: true}));
const tip = document.getElementById("tip"), shown = tip.hidden ? "" : tip.innerText;
const on = [...document.querySelectorAll("#curve .line.on")].map(e => e.dataset.name);
chart.dispatchEvent(new PointerEvent("pointerleave"));
const term = document.querySelector("abbr"); term.focus();
const meaning = tip.hidden ? "" : tip.innerText; term.blur();
const copy = document.querySelector("#table-numbers .copy"); copy.click();
setTimeout(() => { document.body.dataset.found = JSON.stringify({errors, shown, on, meaning, small,
copied: copy.dataset.copied || "", hidden: tip.hidden,
body: parseFloat(style(document.querySelector("main p")).fontSize), back: style(document.body).backgroundColor,
ours: style(chart.querySelector('[data-name="a"] .way')).stroke,
other: style(chart.querySelector('[data-name="b"] .way')).stroke,
roles: [...document.querySelectorAll("svg.chart")].map(e => [e.getAttribute("role"), e.getAttribute("aria-label")]),
drawn: [...document.images].filter(i => i.naturalWidth > 0).length, images: document.images.length,
first: document.querySelector("#table-numbers tbody td").textContent,
contents: document.getElementById("contents").open,
wide: document.documentElement.scrollWidth - innerWidth, inner: innerWidth}); }, 300); });</script>"""


def browser():
    found = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if found is None:
        pytest.skip("no Chromium here")
    return found


def seen(page, folder, width, dark=False):
    """What the script finds on the page, in a frame of that width: a window is not narrower than 500 pixels."""
    checked = folder / "checked.html"
    checked.write_text(page.read_text().replace("<head>", f"<head>{CHECK}"))
    frame = folder / f"frame{width}.html"
    reader = "setTimeout(() => document.body.dataset.found = f.contentDocument.body.dataset.found, 1500)"
    frame.write_text(
        f'<body style="margin:0"><iframe id="f" src="checked.html" style="width:{width}px;height:1500px;border:0" '
        f"onload='{reader}'></iframe>"
    )
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--window-size={max(width, 500)},1500", "--allow-file-access-from-files", "--virtual-time-budget=6000",
        f"--user-data-dir={folder / 'profile'}", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [browser(), *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, env=environment
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


def measured(value, spread=0.1):
    return Measured(value, torch.tensor([value - spread, value + spread], dtype=torch.float64))


def example(scale=1.0, seed=0):
    """A page with a block of each kind; its numbers are multiples of `scale`."""
    panels = {
        title: {
            "a": [(n, measured(scale * n)) for n in (1, 4, 16)],
            "b": [(n, measured(0.4 * scale * n)) for n in (1, 4, 16)],
            "floor": measured(0.5),
        }
        for title in ("left", "right", "third")
    }
    rows = [
        {"who": who, "value": value * scale, "loss": measured(value * scale), "text": "words " * 12}
        for who, value in (("b", 2.0), ("a", 10.0))
    ]
    generator = torch.Generator().manual_seed(seed)
    points, photos = torch.randn(50, 2, generator=generator), torch.rand(2, 3, 120, 120, generator=generator)
    speeds = {"speed": {"a": measured(2.0), "b": measured(1.0)}}
    samples = {"a": points, "b": points}
    blocks = [
        Summary(["First.", "Second.", "Third.", "Fourth."]),
        Headline([("2", "times fewer NFE")]),
        Picture("curve", "A curve", plots.lines(panels, "NFE", "mean reward", ours=["a"], baselines=["floor"])),
        Picture("bars", "Bars", plots.bars(speeds, {"speed": 1.0}, "x", ["a"])),
        Picture("clouds", "Clouds", plots.clouds(samples, lambda x: -x.square().sum(1) / 2, points, points)),
        Picture("images", "Images", plots.gallery([("a\n0.5", torch.rand(12, 1, 8, 8, generator=generator))])),
        Picture("sheet", "Sheet", plots.gallery([("a long prompt", photos)], 2, ["a\n1", "b\n2"], 1.5)),
        Picture("own", "A figure of one's own", own_figure()),
        Table("numbers", "Numbers", rows, keys=["who"], only=["it's b", "a"]),
        Claims("Claims", ["a is higher than b."]),
        Text("Text", ["Some words with DPS."]),
    ]  # fmt: skip
    page = Page(
        "Title", "About <b> NFE", blocks, {"x": "failed & more"}, suite="example", command="mfm benchmark example"
    )
    page.settings, page.methods = {"scale": scale, "inner": {"seed": seed}}, {"a": {"class": "A", "steps": 3}}
    return page


def charts_and_tables(scale=1.0, seed=0, suite="example"):
    """A part of the page, which is written sooner."""
    page = example(scale, seed)
    page.blocks = [b for b in page.blocks if isinstance(b, Table | Headline) or getattr(b, "name", "") == "curve"]
    page.suite = suite
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of a report's folder."""
    return write_report(example(), tmp_path_factory.mktemp("run") / "report")


def own_figure():
    figure = Figure(figsize=(6, 3))
    figure.subplots().plot([1, 2])
    return figure


@pytest.mark.slow
def test_the_page_on_a_phone_on_a_screen_and_in_the_dark(written, tmp_path):
    browser()
    page, text = written, written.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)  # one file
    assert "failed &amp; more" in text
    assert text.count("<p>Third.</p>") == 1
    assert "Fourth." not in text  # three sentences
    for width in (400, 1280):
        found = seen(page, tmp_path, width)
        assert found["errors"] == []
        assert found["inner"] == width
        assert found["wide"] <= 0  # nothing runs out of the screen
        assert found["body"] >= 14
        assert found["small"] == []
        assert found["drawn"] == found["images"] == 8 + 2 + 1
        assert found["first"] == "a"  # sorted by number, not by text
        assert found["contents"] == (width == 1280)
        assert found["shown"].split("\n") == ["a", "NFE: 16", "mean reward: 16 (" + found["shown"].split("(")[1]]
        assert found["on"] == ["a"] * 3  # in all panels
        assert found["hidden"]
        assert found["meaning"].startswith("NFE\nNumber of function evaluations")
        assert found["copied"] in (
            "mfm benchmark example --output outputs/again --only 'it'\\''s b'",
            "mfm benchmark example --output outputs/again --only 'a'",
        )
        assert len(found["roles"]) == 3 + 1 + 2
        assert all(role == "img" and label for role, label in found["roles"])
        assert found["ours"] != found["other"]
    dark = seen(page, tmp_path, 400, dark=True)
    assert brightness(dark["back"]) < 0.1 < 0.9 < brightness(found["back"])
    assert dark["ours"] != found["ours"]


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


# -- values far from all others


def diverging(yscale, value, other=1.0):
    lines = {f"m{k}": [(n, measured(1.0 + 0.1 * k + 0.01 * n, 0.01)) for n in (1, 2, 4)] for k in range(4)}
    lines["far"] = [(1, measured(other, 0.01)), (2, measured(value, 0.01)), (4, measured(2 * value, 0.01))]
    return plots.lines({"p": lines}, "N", "W2", yscale=yscale)


@pytest.mark.parametrize(("yscale", "value", "arrow"), [("log", 4e5, "↑"), ("linear", 4e5, "↑"), ("linear", -70, "↓")])
def test_a_value_far_from_all_others_is_written_at_the_edge(tmp_path, yscale, value, arrow):
    chart = diverging(yscale, value)
    low, high = axes.y_limits(chart, chart.panels)
    assert 0.5 < low < 1.01 < 1.34 < high < 2
    ends = sorted((rounded(value), rounded(2 * value)), key=lambda text: float(text.replace(",", "")))
    text = f"{arrow} far: {' to '.join(ends)}"
    assert axes.beyond(chart.panels[0], (low, high)) == [text]
    drawn = svg.line_panels(chart)[0][1]
    assert f">{text}</text>" in drawn
    assert f'data-y="{chart.panels[0].lines[-1].points[1][1].text()}"' in drawn  # the tip has it in full
    assert axes.note(chart).startswith("An arrow at the edge marks a value beyond the axis.")
    write_figures(chart, tmp_path / "far")
    assert all(end in glyphs(tmp_path / "far.svg") for end in ends)


def glyphs(path):
    """The texts of a figure of matplotlib's, which stand there as comments."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(), re.S))


def test_an_axis_that_holds_all_values_stays_as_it_is():
    chart = diverging("log", 3.0, other=2.0)  # no value is far: 1 to 6
    low, high = axes.y_limits(chart, chart.panels)
    assert low < 1.0
    assert high > 6.0
    assert axes.beyond(chart.panels[0], (low, high)) == []
    assert "arrow" not in axes.note(chart)


def test_a_line_across_the_panel_is_dashed_and_marked_as_in_the_legend():
    chart = plots.lines({"p": {"a": [(1, measured(1.0)), (2, measured(2.0))], "floor": measured(0.5)}}, "N", "W2")
    assert chart.levels() == {"floor"}
    look = looks(chart.names())["floor"]
    dash = f'stroke-dasharray="{" ".join(f"{d:g}" for d in level_dash(look))}"'
    assert dash in svg.line_panels(chart)[0][1]
    assert dash in svg.legend_mark(look, level=True)
    assert len({level_dash(look) for look in looks([f"m{k}" for k in range(24)]).values()}) == 4


# -- colours

# of simulated protanopia and deuteranopia in linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1)
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def linear(colour):
    rgb = torch.tensor([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)], dtype=torch.float64)
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    white = torch.tensor([0.9505, 1.0, 1.089], dtype=torch.float64)
    t = torch.tensor(matrix, dtype=torch.float64) @ rgb.clamp(0, 1) / white
    f = torch.where(t > 0.008856, t ** (1 / 3), 7.787 * t + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", [0, 1])
def test_our_colour_stands_out_for_all_readers(theme):
    """CIE76 distances of our colour to the others, also as colour-blind readers see them; contrast to the page."""
    ours, *others = (linear(pair[theme]) for pair in COLOURS.values())
    seen_by = {"all": torch.eye(3, dtype=torch.float64)}
    seen_by |= {name: torch.tensor(rows, dtype=torch.float64) for name, rows in BLINDNESS.items()}
    for matrix in seen_by.values():
        assert min(float((lab(matrix @ ours) - lab(matrix @ other)).norm()) for other in others) > 25
    back = linear(("#ffffff", "#15181c")[theme])
    shares = torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    for colour in (ours, *others):
        light, dark = sorted([float(shares @ colour), float(shares @ back)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3  # of graphics, by WCAG 2.1


def test_lines_differ_without_colour():
    found = looks([f"m{k}" for k in range(20)], ["m3", "m7"], ["m5"])
    assert len(set(found.values())) == 20
    assert [name for name, look in found.items() if look.is_strong] == ["m3", "m7"]
    assert family("MFM-G", ["MFM-G", "MFM-GF", "DPS", "MFMX"]) == ["MFM-G", "MFM-GF"]
    assert family("A", ["A", "AB"]) == ["A"]


# -- files


def test_figures_for_papers_have_the_width_of_a_column_and_their_fonts(written):
    folder = written.parent
    for name, pages in (("curve", 3), ("bars", 1), ("clouds", 1), ("images", 1)):
        content = (folder / f"{name}.pdf").read_bytes()
        boxes = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", content)
        assert len(boxes) == pages
        assert {float(width) for width, _ in boxes} == {3.25 * 72}
        assert b"/FontFile2" in content  # embedded TrueType
        text = b"".join(zlib.decompress(part) for part in streams(content))
        assert {float(size) for size in re.findall(rb"/F\d+ ([\d.]+) Tf", text)} <= {7.0, 8.0}
        assert (folder / f"{name}.png").stat().st_size > 500


def streams(content):
    """The compressed streams of a PDF's pages."""
    for match in re.finditer(rb"stream\r?\n(.*?)\r?\nendstream", content, re.S):
        try:
            found = zlib.decompress(match.group(1))
        except zlib.error:
            continue
        if b" Tf" in found:
            yield match.group(1)


# -- mfm report


def numbers_of(folder, name="numbers"):
    return json.loads((folder / f"{name}.json").read_text())


def test_report_writes_a_page_again(written, tmp_path, capsys):
    page, before = tmp_path / "run/report/index.html", written.read_text()
    page.parent.mkdir(parents=True)
    shutil.copy(written.with_name("page.json"), page.parent)
    report(tmp_path / "run")
    assert page.read_text() == before
    assert "index.html" in capsys.readouterr().out


def test_report_compares_two_runs(tmp_path):
    for name, scale in (("one", 1.0), ("two", 1.5)):
        write_report(charts_and_tables(scale, seed=int(scale * 2)), tmp_path / name / "report")
    report(tmp_path / "one", tmp_path / "two/report/index.html", output=tmp_path / "both")
    settings = {row["setting"]: (row["A"], row["B"]) for row in numbers_of(tmp_path / "both", "settings")}
    assert settings == {"scale": ("1.0", "1.5"), "inner.seed": ("2", "3")}
    rows = {(r["who"], r["number"]): r for r in numbers_of(tmp_path / "both")}
    assert rows["a", "value"]["difference"] == pytest.approx(5.0)
    row, one = rows["b", "loss"], measured(2.0)
    # independent numbers of equal half widths w: w sqrt 2
    assert row["difference"] == pytest.approx(1.0)
    assert row["difference high"] - 1.0 == pytest.approx((one.high - one.value) * 2**0.5)
    text = (tmp_path / "both/index.html").read_text()
    assert text.count('<svg class="chart lines') == 6
    assert "they differ in scale, inner.seed" in text
    assert "Of 2 numbers with an interval that both runs have, 2 differ significantly; if nothing differed, 0.1" in text
    # the same axes on both sides, though the numbers differ
    ticks = [
        re.findall(r'text-anchor="end">([^<]*)<', svg) for svg in re.findall(r"<svg class=\"chart lines.*?</svg>", text)
    ]
    assert ticks[0] == ticks[3]


def run_of(folder, shift, num=48, noise="48 samples of seeds [0]", of_suite="example"):
    """A run whose samples are those of a seed, moved by `shift` and a little noise of its own."""
    z, own = samples(48, seed=0)[:num], 0.05 * samples(48, seed=int(10 * shift) + 1)[:num]
    x = z + shift + own
    row = {"who": "a", "reward": mean_of(x), "spread": resampled(lambda x, weights: weights @ x.square() / len(x), x)}
    page = Page("Title", "", [Table("numbers", "Numbers", [row | {"NFE": 3}], keys=["who"])], suite=of_suite)
    page.noise = noise
    write_report(page, folder / "report")
    return row


def test_runs_of_the_same_noise_are_paired_sample_by_sample(tmp_path):
    one, two = run_of(tmp_path / "one", 0.0), run_of(tmp_path / "two", 0.3)
    report(tmp_path / "one", tmp_path / "two", output=tmp_path / "both")
    found = {row["number"]: row for row in numbers_of(tmp_path / "both")}
    for name in ("reward", "spread"):
        low, high = interval(two[name] - one[name])
        assert found[name]["difference low"] == pytest.approx(low, abs=1e-9)
        assert found[name]["difference high"] == pytest.approx(high, abs=1e-9)
        assert found[name]["taken as"] == "paired"
    # of independent numbers it is several times wider, and holds zero
    alone = Interval.of(two["reward"]).minus(Interval.of(one["reward"]))
    assert alone.high - alone.low > 5 * (found["reward"]["difference high"] - found["reward"]["difference low"])
    assert alone.sign == 0 < found["reward"]["difference low"]
    said = "Both runs have the same noise (48 samples of seeds [0]), so that they are paired sample by sample."
    assert said in re.sub(r"</?abbr[^>]*>", "", (tmp_path / "both/index.html").read_text())
    # writing a page again keeps its samples
    before = (tmp_path / "two/report/samples.safetensors").read_bytes()
    report(tmp_path / "two")
    assert (tmp_path / "two/report/samples.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise": "48 samples of seeds [1]"}, "they have different noise: A has 48 samples of seeds [0], B has 48"),
        ({"noise": ""}, "it is not stored what their noise is made from"),
        ({"num": 40}, "their numbers have different numbers of samples"),
        (None, "a report of an earlier version has no samples.safetensors"),
    ],
)
def test_other_runs_are_taken_as_independent_and_the_page_says_why(tmp_path, change, said):
    one, two = run_of(tmp_path / "one", 0.0), run_of(tmp_path / "two", 0.3, **(change or {}))
    if change is None:
        (tmp_path / "two/report/samples.safetensors").unlink()
    report(tmp_path / "one", tmp_path / "two", output=tmp_path / "both")
    row = next(row for row in numbers_of(tmp_path / "both") if row["number"] == "reward")
    alone = Interval.of(two["reward"]).minus(Interval.of(one["reward"]))
    assert (row["difference low"], row["difference high"]) == pytest.approx((alone.low, alone.high))
    assert row["taken as"] == "independent"
    assert f"The runs are taken as independent, for {said}" in (tmp_path / "both/index.html").read_text()


def test_report_refuses_runs_of_different_suites_and_what_is_no_run(tmp_path):
    for name, suite in (("one", "example"), ("two", "another")):
        write_report(Page("Title", "", suite=suite), tmp_path / name / "report")
    with pytest.raises(CommandLineError, match=r"one is of the suite 'example' and two of"):
        report(tmp_path / "one", tmp_path / "two")
    with pytest.raises(CommandLineError, match="--output is of a comparison"):
        report(tmp_path / "one", output=tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"no report in .*three"):
        report(tmp_path / "three")
    (tmp_path / "two/report/page.json").unlink()
    with pytest.raises(FileNotFoundError, match="earlier version"):
        report(tmp_path / "two")
    for text, said in (('{"$kind": "Page"', "damaged"), ('{"format": 0}', "its format is 0, expected 1")):
        (tmp_path / "one/report/page.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            report(tmp_path / "one")
