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
from mfm_benchmarks.parts.reward_report import RewardReport
from mfm_benchmarks.report import write_report
from mfm_lightning.metrics.measured import Measured


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
