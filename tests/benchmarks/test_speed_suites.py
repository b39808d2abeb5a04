"""The suites that measure time, made short, as a user runs them."""

import csv

import pytest

from mfm_lightning.commands.main import main as mfm


def table(folder, name):
    with open(folder / "report" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_speed_measures_every_variant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--sizes", "{S/8: 2}", "--input_size", "8", "--rounds", "2"]
    mfm(["benchmark", "training-speed", *small, "--precisions", "[fp32]", "--compile", "false", "--device", "cpu"])
    folder = tmp_path / "outputs/benchmarks/training-speed"
    found = {row["step"]: row for row in table(folder, "steps")}
    assert set(found) == {
        "reference", "explicit, own samples", "functorch", "finite difference", "explicit", "explicit, checkpointed",
    }  # fmt: skip
    for name, row in found.items():
        assert float(row["ms a step"]) > 0
        # finite differences are within their documented error; all others are the same gradient
        assert float(row["gradient error"]) < (1e-2 if name == "finite difference" else 1e-5), name
    assert float(found["explicit, checkpointed"]["of the reference's"]) <= float(
        found["explicit"]["of the reference's"]
    )
    parts = {row["part"] for row in table(folder, "parts")}
    assert {"forward, no graph", "EMA", "optimiser (RAdam)", "tangent and backward: functorch"} <= parts


def test_an_unknown_precision_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^2$"):
        mfm(["benchmark", "training-speed", "--precisions", "[fp8]"])
    assert "suite training-speed: unknown precision 'fp8'" in capsys.readouterr().err


def test_throughput_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--samples", "60", "--shard_size", "25", "--batch_size", "8", "--passes", "1", "--rounds", "2"]
    mfm(["benchmark", "data-throughput", *small, "--state_shape", "[4,4,4]", "--workers", "[0,1]", "--output", "out"])
    found = table(tmp_path / "out", "throughput")
    assert {row["files"] for row in found} == {"from the cache", "from disk"}
    found = {row["reader"]: row for row in found if row["files"] == "from the cache"}
    ours = ["LatentShards, 0 workers", "LatentShards, 1 worker"]
    assert list(found) == ["raw read", "tarfile", "webdataset, decoded", *ours]
    assert all(float(row["samples/s"]) > 0 for row in found.values())
    assert float(found["raw read"]["of a raw read"]) == 1
    assert "of a raw read" in (tmp_path / "out/report/index.html").read_text()
