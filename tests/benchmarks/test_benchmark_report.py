"""The report of a benchmark: what its headline takes, and its page in a browser."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch

from mfm_benchmarks.blocks import Page, Picture, Table
from mfm_benchmarks.parts.entry import Entry
from mfm_benchmarks.parts.reward_report import RewardReport, contest
from mfm_benchmarks.report import write_report
from mfm_lightning.metrics.distances import frequency_distance
from mfm_lightning.metrics.measured import Measured, mean_of, resampled, simultaneous


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
    headline, table, _, short = report.blocks()[:4]
    # the cheapest of A is too far from the data, B is dearer than Best-of-N, C is not above it
    assert headline.items[0][0] == "2 x"
    assert "A, λ = any, 25" in headline.items[0][1]
    assert [(row["method"], row["NFE"]) for row in table.rows] == [("A", 10), ("B", 200)]
    assert list(short.lines) == ["C (λ = any): r."]
    alone = RewardReport({"r": [best, far, dear, level]}, [1.0], "A", "", "").blocks()[0]
    assert alone.items[0][0] == "none"


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
    headline, _, decided = RewardReport({"r": [best, near, open_, far]}, [1.0], "A", "", "", 2.0).blocks()[:3]
    assert headline.items[0][0] == "20 x"
    assert re.match(
        r"r: A, λ = any is above by 0.2 \(at least 0.1\d+ for all settings at once\), at 1.05", decided.lines[0]
    )
    assert "not decided, with fewer evaluations: B" in decided.lines[0]
    assert "further than 2 times, with fewer evaluations: C" in decided.lines[0]
    items = RewardReport({"r": [best, open_, far]}, [1.0], "A", "", "", 2.0).blocks()[0].items
    assert items[0][0] == "not decided"
    assert "whether B, λ = any, 50 times fewer" in items[0][1]
    blocks = RewardReport({"r": [best, far]}, [1.0], "A", "", "", 2.0).blocks()
    assert blocks[0].items[0][0] == "none"


def test_a_mixture_is_judged_by_its_shares():
    wanted, classes = torch.tensor([0.5, 0.5]), torch.arange(64) % 2
    shares = [resampled(frequency_distance, c, wanted) for c in (classes, torch.zeros(64, dtype=torch.long))]
    best = setting("Best-of-N", 1000, 1.0, 100.0, seed=0, label="N 10", shares=shares[1])
    ours, other = (setting(n, 10, 1.0, 100.0, seed=k + 1, shares=shares[k]) for k, n in enumerate(("A", "B")))
    blocks = RewardReport({"r": [best, ours, other]}, [1.0], "A", "", "").blocks()
    assert blocks[0].items[0][0] == "0"
    assert "closer to the shares than Best-of-N (0.707) and B (0.707)" in blocks[0].items[0][1]
    lines = next(b for b in blocks if b.__class__.__name__ == "Claims" and "shares" in b.heading).lines
    assert len(lines) == 4
    assert "further from the shares than A (0)" in lines[0]


def test_the_page_in_a_browser(tmp_path):
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    from mfm_benchmarks import plots

    line = [(1, Measured(1.0, torch.tensor([0.9, 1.1]))), (4, Measured(2.0, torch.tensor([1.9, 2.1])))]
    blocks = [
        Picture("curve", "A curve", plots.lines({"left": {"a": line}}, "x", "y")),
        Table("numbers", "Numbers", [{"who": "b", "value": 2.0}, {"who": "a", "value": 10.0}]),
    ]
    page = write_report(Page("Title", "About <b>", blocks, {"x": "failed & more"}), tmp_path)
    # a word in the page says what the browser found: errors, figures that it drew, and the table once sorted by value
    check = """<script>const errors = []; addEventListener("error", e => errors.push(e.message));
    addEventListener("load", () => {
    const heads = document.querySelectorAll("#table-numbers th button"); heads[1].click(); heads[1].click();
    const drawn = [...document.images].filter(i => i.naturalWidth > 0).length;
    document.body.dataset.found = JSON.stringify({errors, drawn,
    images: document.images.length, first: document.querySelector("#table-numbers tbody td").textContent,
    wide: document.documentElement.scrollWidth - innerWidth}); });</script>"""
    page.write_text(page.read_text().replace("<head>", f"<head>{check}"))
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=400,800",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    found = json.loads(found.group(1).replace("&quot;", '"'))
    assert found["errors"] == []
    assert found["drawn"] == found["images"] == 1
    assert found["first"] == "a"  # sorted by number, not by text
    assert found["wide"] <= 0  # nothing runs out of a phone's screen
    assert "failed &amp; more" in done.stdout
