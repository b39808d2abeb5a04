"""The suites that measure time, made short, as a user runs them."""

import csv
import json

import pytest
import yaml

from mfm_lightning.commands.main import main as mfm
from tests.backbones.fast import frozen  # noqa: F401


def table(folder, name):
    with open(folder / "report" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
@pytest.mark.slow
def test_training_speed_measures_every_variant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--sizes", "{S/8: [2, 3]}", "--input_size", "8", "--rounds", "2", "--attention", "{}"]
    mfm(["benchmark", "training-speed", *small, "--precisions", "[fp32]", "--compile", "false", "--device", "cpu"])
    folder = tmp_path / "outputs/benchmarks/training-speed"
    rows = table(folder, "steps")
    (alone,) = (row for row in rows if row["batch"] == "3")
    assert alone["step"] == "explicit"
    assert float(alone["ms per step"]) > 0
    assert alone["times faster"] == alone["gradient error"] == ""
    found = {row["step"]: row for row in rows if row["batch"] == "2"}
    assert set(found) == {
        "reference", "explicit, own samples", "functorch", "finite difference", "explicit", "explicit, checkpointed",
    }  # fmt: skip
    for name, row in found.items():
        assert float(row["ms per step"]) > 0
        # finite differences are within their documented error; all others are the same gradient
        assert float(row["gradient error"]) < (1e-2 if name == "finite difference" else 1e-5), name
    assert float(found["explicit, checkpointed"]["memory over the reference"]) <= float(
        found["explicit"]["memory over the reference"]
    )
    parts = {row["part"]: row for row in table(folder, "parts") if row["batch"] == "2"}
    assert {"forward, no graph", "EMA", "optimiser (RAdam)", "tangent and backward: functorch"} <= set(parts)
    assert parts["EMA"]["share of matmul peak"] == ""  # it has no matrix product
    # a DiT's own products, by hand: 2 in out for each token, once for each of 2 samples
    tokens, width, depth = 1, 384, 12
    of_tokens = depth * (12 * width**2 + 2 * tokens * width) + 2 * 4 * 64 * width + width * 4 * 64
    of_condition = depth * 6 * width**2
    forward = 2 * 2 * (tokens * of_tokens + of_condition)
    (numbers,) = (json.loads(p.read_text())["numbers"] for p in (folder / "results").glob("S_8_fp32_batch_2*.json"))
    assert (
        1 < numbers["part_flops"]["forward, no graph"] / forward < 1.5
    )  # embeddings of times and guidance, last layer


def test_attention_tangents_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heads = "{of 40: {tokens: 40, heads: 2, head_size: 8}}"
    nothing = ["--sizes", "{}", "--adapters", "{}", "--rounds", "2"]
    mfm(
        [
            "benchmark",
            "training-speed",
            *nothing,
            "--precisions",
            "[fp32, bf16]",
            "--attention",
            heads,
            "--device",
            "cpu",
        ]
    )
    folder = tmp_path / "outputs/benchmarks/training-speed"
    rows = table(folder, "attention")
    ways = [(row["precision"], row["way"]) for row in rows]
    assert ways == [(p, way) for p in ("fp32", "bf16") for way in ("attention itself", "chunked", "fused")]
    for row in rows:
        assert float(row["ms"]) > 0
        if row["way"] != "attention itself":
            assert float(row["error"]) < (1e-5 if row["precision"] == "fp32" else 3e-2), row
    assert "triton" in (folder / "report/index.html").read_text()  # said to be left out


TINY = {
    "SD3": {
        "published": "stabilityai/stable-diffusion-3-medium-diffusers",
        "transformer": {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64,
                        "joint_attention_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 16},
        "vae": {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1},
    },
    "FLUX.1": {
        "published": "black-forest-labs/FLUX.1-dev",
        "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 32,
                        "pooled_projection_dim": 16},
        "vae": {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1},
    },
    "SANA": {
        "published": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        "transformer": {"num_layers": 1, "num_attention_heads": 1, "num_cross_attention_heads": 1,
                        "cross_attention_head_dim": 32, "cross_attention_dim": 32, "caption_channels": 32},
        "vae": {f"{which}_{what}": value for which in ("encoder", "decoder") for what, value in
                (("block_out_channels", [8] * 6), ("layers_per_block", [1] * 6))} | {"attention_head_dim": 8},
    },
}  # fmt: skip


def test_tangents_of_adapters_are_measured_for_each_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters = {name: {**size, "image_size": 64, "tokens": 4, "batch": 2, "rank": 2} for name, size in TINY.items()}
    settings = {"sizes": {}, "rounds": 2, "precisions": ["fp32"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**settings, "adapters": adapters}, sort_keys=False))
    mfm(["benchmark", "training-speed", "--config", "mine.yaml", "--device", "cpu", "--output", "out"])
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in table(tmp_path / "out", "adapters"):
        found.setdefault(row["transformer"], {})[row["tangent"]] = row
    assert list(found) == list(TINY)
    for rows in found.values():
        assert set(rows) == {"no tangent", "torch.func.jvp", "finite differences"}  # none has rules of its own
        jvp, differences = rows["torch.func.jvp"], rows["finite differences"]
        assert float(jvp["error"]) == 0
        assert 0 < float(differences["error"]) < 1e-2
        assert min(float(row["time over the fastest"]) for row in (jvp, differences)) == 1
        assert min(float(row["memory over the smallest"]) for row in (jvp, differences)) == 1
        # of both the value has a graph; the derivative of torch's is computed with one, of differences without
        assert float(rows["no tangent"]["peak memory, MB"]) <= float(differences["peak memory, MB"])
        assert float(differences["peak memory, MB"]) < float(jvp["peak memory, MB"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"published": "nobody/nothing"}, "no sizes of 'nobody/nothing' are known: expected one of"),
        ({"batch": 0}, "adapters: batch 0 must be at least 1"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"adapters": {"SD3": {**TINY["SD3"], **changes}}}))
    with pytest.raises(SystemExit):
        mfm(["benchmark", "training-speed", "--config", "mine.yaml"])
    assert message in capsys.readouterr().err


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
    assert float(found["raw read"]["share of a raw read"]) == 1
    assert "of a raw read" in (tmp_path / "out/report/index.html").read_text()
