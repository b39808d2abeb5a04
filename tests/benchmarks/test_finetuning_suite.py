"""`mfm benchmark finetuning` as a user runs it, on a tiny model; and what is read off its curves."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mfm_benchmarks.parts.drift_curves import Curve, Run, best_at_drift, together
from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import main
from mfm_lightning.metrics.measured import mean_of
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT

ROOT = Path(__file__).parents[2]


def method(kind, **options):
    return {"method": {"class_path": f"mfm_benchmarks.finetuning.{kind}", "init_args": options}}


METHODS = {
    "MFM-FT": method("MFMFineTuning", batch_size=4, buffer_size=4),
    "DRaFT-2": method("DRaFT", last=2, steps=2, batch_size=4),
}
SETTINGS = {
    "model": {"file": "model.safetensors", "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"}},
    "data": {"class_path": "mfm_lightning.data.DigitsDataModule"},
    "training": {"evaluations": 120, "checkpoints": [0.4, 1.0], "warmup": 0.0, "average": 0.0},
    "learning_rates": [1e-5, 1e-3],
    "seeds": [1, 2, 3],
    "drifts": [1e-4, 1e9],
    "num_samples": 4,
    "ode_steps": 3,
    "rewards": {"brightness": {"reward": "brightness", "scale": 100.0, "held_out": {"contrast": "contrast"}}},
    "methods": METHODS,
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())
    for tensor in (*network.buffers(), *network.parameters()):
        torch.nn.init.normal_(tensor, std=0.1)
    save_model(MetaFlowMap(network), tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def benchmark(*args, **changes):
    Path("mine.yaml").write_text(yaml.safe_dump({**SETTINGS, **changes}, sort_keys=False))
    main(["benchmark", "finetuning", "--config", "mine.yaml", "--output", "out", "--device", "cpu", *args])


def table(name):
    with open(f"out/report/{name}.csv") as file:
        return list(csv.DictReader(file))


def stored():
    return {path.name: path.read_text() for path in Path("out/results").glob("*.json")}


def test_a_run_reports_rewards_by_evaluations_and_at_equal_drift_and_goes_on_from_the_store(workplace):
    benchmark()
    rows = table("results")
    assert {(row["reward"], row["method"]) for row in rows} == {("brightness", "MFM-FT"), ("brightness", "DRaFT-2")}
    assert all(int(row["evaluations"]) >= 48 and float(row["drift"]) > 0 for row in rows)
    assert all(float(row["contrast low"]) < float(row["contrast"]) < float(row["contrast high"]) for row in rows)
    equal = table("equal_drift")
    assert equal[0]["method"] == "base flow"
    assert {row["drift"] for row in equal} == {"0", "0.0001"}  # what is not reached is left out
    for row in [*rows, *equal[1:]]:
        gain = float(row["mean reward"]) - float(equal[0]["mean reward"])
        assert float(row["gain over the base flow"]) == pytest.approx(gain, abs=1e-6)
    page = re.sub(r"</?abbr[^>]*>", "", Path("out/report/index.html").read_text())
    assert "Not reached by MFM-FT, DRaFT-2" in page
    for name in ("reward_evaluations", "reward_drift", "held_out"):
        assert Path(f"out/report/{name}.png").stat().st_size > 5000

    found = stored()
    assert len(found) == 2 * (2 + 3)
    for text in found.values():
        numbers = json.loads(text)["numbers"]
        assert numbers["nfe"][0] == numbers["step"][0] == 0
        assert numbers["nfe"][-1] == numbers["network"][-1] + numbers["reward"][-1] >= 120
    benchmark()
    assert stored() == found
    benchmark("--num_samples", "5")
    assert len(stored()) == 2 * len(found)


def test_the_reported_runs_take_the_learning_rate_that_was_best_in_the_other_runs(workplace):
    """By scale x reward - drift of their stored tensors, without the checkpoint before training."""
    benchmark()
    cells = [json.loads(text) for text in stored().values()]
    tuning = {c["numbers"]["learning_rate"] for c in cells if "learning_rate" in c["identity"]}
    assert tuning == {1e-5, 1e-3}
    for method in METHODS:
        ours = [c for c in cells if c["cell"].startswith(method)]
        scores = {}
        for c in (c for c in ours if "learning_rate" in c["identity"]):
            tensors = _tensors(c)
            score = (100 * tensors["rewards"].mean(dim=1) - tensors["drift"].mean(dim=1))[1:].max()
            scores[c["numbers"]["learning_rate"]] = float(score)
        taken = {c["numbers"]["learning_rate"] for c in ours if "seed" in c["cell"]}
        assert taken == {max(scores, key=scores.get)}


def test_without_a_choice_there_are_no_runs_to_choose_by(workplace):
    benchmark(learning_rates=[1e-3], seeds=[1, 2])
    cells = [json.loads(text) for text in stored().values()]
    assert sorted(c["cell"] for c in cells) == [
        f"{m}, brightness, seed {seed}" for m in sorted(METHODS) for seed in (1, 2)
    ]
    assert {c["numbers"]["learning_rate"] for c in cells} == {1e-3}
    assert {row["method"] for row in table("equal_drift")} == {"base flow", *METHODS}


def _tensors(cell):
    from safetensors.torch import load_file

    return next(load_file(p.with_suffix(".safetensors")) for p in Path("out/results").glob("*.json")
                if json.loads(p.read_text())["cell"] == cell["cell"])  # fmt: skip


def test_a_black_box_reward_leaves_out_what_differentiates_it(workplace):
    rewards = {"jpeg": {"reward": "jpeg_compressibility", "scale": 1.0}}
    free = {
        "class_path": "mfm_benchmarks.finetuning.DiffusionNFT",
        "init_args": {"steps": 2, "batch_size": 4, "group_size": 4},
    }
    benchmark(rewards=rewards, methods={**METHODS, "NFT": {"method": free}}, seeds=[1], learning_rates=[1e-4])
    assert {row["method"] for row in table("results")} == {"NFT"}
    skipped = json.loads(Path("out/report/environment.json").read_text())["skipped"]
    assert set(skipped) == {"MFM-FT, jpeg", "DRaFT-2, jpeg"}
    assert "not differentiable" in skipped["DRaFT-2, jpeg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 1]}, "tuning_seed 0 is among the seeds"),
        ({"drifts": []}, "a comparison needs a reward, a method, a learning rate, a seed and a drift"),
        ({"methods": {"M": method("DRaFT", last=20)}}, "last 20 of 10 steps"),
        ({"methods": {"M": {**METHODS["DRaFT-2"], "knob": "scale"}}}, "method 'M': give a knob and its values"),
        ({"methods": {"M": {**METHODS["DRaFT-2"], "knob": "k", "values": [1.0]}}}, "method 'M' cannot be built"),
        ({"training": {"checkpoints": [0.0]}}, "training.checkpoints [0.0] must increase"),
        ({"data": {"class_path": "mfm_lightning.data.GaussianMixtureDataModule"}}, "data of shape (2,) for a model of"),
    ],
)
def test_bad_settings_are_refused_before_any_work_in_one_line(workplace, changes, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark(**changes)
    said = f"{capsys.readouterr().err}{stopped.value}".splitlines()
    assert len([line for line in said if message in line]) == 1, said
    assert not Path("out").exists()


def test_the_config_that_is_there_fits_the_suite_and_its_quick_version(workplace):
    from mfm_benchmarks.command import load_suite

    shutil.copytree(ROOT / "configs", "configs")
    suite, _, _ = load_suite("finetuning", [])
    assert next(iter(suite.methods)) == "MFM-FT"
    suite.shrink()
    assert len(suite.rewards) == len(suite.seeds) == len(suite.learning_rates) == 1
    assert all(len(settings) == 1 for settings in suite._settings.values())


# curves


def run(drifts, rewards, spread=0.0):
    """A training whose samples lie about these means, all moving together."""
    noise = spread * torch.linspace(-1, 1, 32)
    values = {"drift": drifts, "rewards": rewards}
    measured = {
        name: [mean_of(torch.full((32,), float(v)) + noise * (name == "rewards")) for v in of]
        for name, of in values.items()
    }
    return Run({"nfe": [100.0 * k for k in range(len(drifts))]}, measured)


def test_a_value_at_a_drift_is_linear_in_its_root():
    """Where the reward is 2 + 3 sqrt(drift) it is so between checkpoints, too."""
    drifts = [0.0, 1.0, 4.0, 3.0, 16.0]
    found = run(drifts, [2 + 3 * math.sqrt(d) for d in drifts])
    for level in (0.25, 1.0, 2.5, 4.0, 9.0, 16.0):
        assert found.at_drift("rewards", level).value == pytest.approx(2 + 3 * math.sqrt(level), abs=1e-5)
    assert found.at_drift("rewards", 16.1) is None
    assert found.cost_at_drift("nfe", 2.25) == pytest.approx(150)
    assert found.cost_at_drift("nfe", 4.0) == pytest.approx(200)  # for the first time
    assert found.score(2.0) == pytest.approx(max(2 * (2 + 3 * math.sqrt(d)) - d for d in drifts[1:]))


def test_the_interval_at_a_drift_has_the_drifts_own_noise():
    """Reward = 5 for all samples before and 10 after; drifts differ by sample: only they make the value vary."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        drift = [torch.zeros(64), torch.randn(64, generator=generator).square() * 4]
        reward = [torch.full((64,), 5.0), torch.full((64,), 10.0)]
        r = Run({"nfe": [0.0, 1.0]}, {"drift": list(map(mean_of, drift)), "rewards": list(map(mean_of, reward))})
        if (value := r.at_drift("rewards", 1.0)) is not None:
            found.append(value)
    truth = 5 + 5 * math.sqrt(1.0 / 4.0)
    assert len(found) == 300
    assert sum(v.low <= truth <= v.high for v in found) / 300 > 0.9
    spread = torch.tensor([v.value for v in found]).std().item()
    assert sum(v.error for v in found) / 300 == pytest.approx(spread, rel=0.2)


def test_a_methods_curve_is_chosen_by_the_runs_that_are_not_reported():
    better_there = Curve("M", "a", 1.0, [run([0, 4], [0, 1])], run([0, 4], [0, 9]), torch.zeros(1))
    better_here = Curve("M", "b", 1.0, [run([0, 4], [0, 5])], run([0, 4], [0, 2]), torch.zeros(1))
    assert best_at_drift([better_here, better_there], 4.0) is better_there
    assert best_at_drift([better_here, better_there], 5.0) is None


def test_three_trainings_have_an_interval_of_trainings():
    values = [mean_of(torch.full((8,), v) + torch.linspace(-1e-3, 1e-3, 8)) for v in (1.0, 2.0, 3.0)]
    assert together(values).high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # Student's t, s = 1
    assert together(values[:2]).samples == 16  # of the samples
