"""Benchmark suites as a user runs them, on tiny models: cells, resuming, failures, reports, bad input."""

import csv
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import mfm_rewards
from mfm_benchmarks.cells import compute, leases_of
from mfm_benchmarks.command import load_suite
from mfm_benchmarks.fitting import Fit, FitSettings, say_fewer_steps
from mfm_benchmarks.measure import measure
from mfm_benchmarks.methods import MethodSettings, points
from mfm_benchmarks.models import ModelSettings, compute_in
from mfm_benchmarks.parts.best_of_n import BestOfNPool
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.store import Store
from mfm_benchmarks.suite import Cell, Outcome, Results, Suite, no_result, suites
from mfm_benchmarks.suites.alignment import AlignmentSuite, RewardSettings
from mfm_lightning.alignment import DrawGradient, FeynmanKac, Search, Steering, Target, TimeGrid
from mfm_lightning.alignment.nfe import Meter
from mfm_lightning.checkpoints import save_model
from mfm_lightning.commands.main import main
from mfm_lightning.conditions import Conditions
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.metrics.measured import rounded
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP, DiT
from mfm_lightning.networks.decoders import PixelDecoder
from tests.latent_data import small_vae
from tests.tiny_rewards import tiny_rewards

ROOT = Path(__file__).parents[2]


def model(network):
    torch.manual_seed(0)
    for tensor in (*network.buffers(), *network.parameters()):
        torch.nn.init.normal_(tensor, std=0.1)
    return MetaFlowMap(network)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a digits model where the documentation has it."""
    save_model(
        model(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())),
        _folder(tmp_path / "outputs/digits/mfm") / "model.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def _folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def benchmark(*args):
    main(["benchmark", *map(str, args)])


def rows(folder, name):
    with open(folder / "report" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


# cells and the store


class Counting(Suite):
    """Two cells and one that needs both."""

    def __init__(self, stop_at=None, fail=False, version=1):
        self.ran, self.stop_at, self.fail, self.version = [], stop_at, fail, version

    def prepare(self):
        pass

    def cells(self):
        def work(name, value):
            def compute(*needed):
                if name == self.stop_at:
                    raise KeyboardInterrupt
                if self.fail and name == "second":
                    raise ValueError("no luck")
                self.ran.append(name)
                total = value + sum(float(o.tensors["x"][0]) for o in needed)
                return Outcome({"total": total}, {"x": torch.full((2,), float(total))})

            return compute

        first = Cell("first", {"version": 1}, work("first", 1))
        second = Cell("second", {"version": self.version}, work("second", 10))
        return [first, second, Cell("both", {"of": 2}, work("both", 100), (first, second))]

    def report(self, results):
        return []


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    store = Store(tmp_path)
    stopped = Counting(stop_at="both")
    with pytest.raises(KeyboardInterrupt):
        compute(stopped, store)
    assert stopped.ran == ["first", "second"]
    again = Counting()
    results, seconds = compute(again, store)
    assert again.ran == ["both"]
    assert seconds > 0
    assert [results[cell].numbers["total"] for cell in again.cells()] == [1, 10, 111]
    # another identity is another result, and half a file is none
    store.path(again.cells()[0]).write_text('{"numbers": {}')
    changed = Counting(version=2)
    compute(changed, store)
    assert changed.ran == ["first", "second"]
    fresh = Counting(version=2)
    compute(fresh, store, fresh=True)
    assert fresh.ran == ["first", "second", "both"]


def test_a_part_of_a_suite_is_computed_with_what_it_needs(tmp_path):
    suite = Counting()
    results, _ = compute(suite, Store(tmp_path), only="sec")
    assert suite.ran == ["second"]
    assert results.missing == ["first", "both"]
    again = Counting()
    results, _ = compute(again, Store(tmp_path), only="both")
    assert again.ran == ["first", "both"]
    assert not results.missing
    with pytest.raises(ValueError, match=r"--only 'x': no result .* first, second, both"):
        compute(Counting(), Store(tmp_path), only="x")


@pytest.mark.parametrize(
    ("only", "ran"),
    [
        ("*t", ["first", "second", "both"]),
        ("*st", ["first"]),
        ("s*n", ["second"]),
        ("f*r*t", ["first"]),
        ("*th", ["first", "second", "both"]),
    ],
)
def test_a_part_of_a_suite_is_named_by_any_part_of_the_name(tmp_path, only, ran):
    suite = Counting()
    compute(suite, Store(tmp_path), only=only)
    assert suite.ran == ran


def test_signs_of_a_name_mean_themselves(tmp_path):
    """Names have brackets and dots: none of them is a pattern."""
    for only in ("f.rst", "[fs]", "(first)", "first|second", "*.d"):
        with pytest.raises(ValueError, match="no result has a name that begins so"):
            compute(Counting(), Store(tmp_path), only=only)


class FailingFit(Fit):
    """A training that breaks down."""

    ran = 0

    def run(self, device=None):
        type(self).ran += 1
        raise FloatingPointError("its loss is NaN")


class OfOneTraining(Counting):
    """The two cells need the same training."""

    def cells(self):
        return [replace(cell, fit=FailingFit("none.yaml", "none.safetensors")) for cell in super().cells()[:2]]


def test_a_training_that_fails_is_not_run_again_for_each_cell(tmp_path):
    FailingFit.ran, suite = 0, OfOneTraining()
    results, _ = compute(suite, Store(tmp_path))
    assert (FailingFit.ran, suite.ran) == (1, [])
    said = "its training failed before in this run (none.safetensors): FloatingPointError: its loss is NaN"
    assert results.failures == {"first": "FloatingPointError: its loss is NaN", "second": f"RuntimeError: {said}"}
    compute(OfOneTraining(), Store(tmp_path))  # another run tries it again
    assert FailingFit.ran == 2


class KilledFit(Fit):
    """A training that kills its process where the file `kill` is there, else is done."""

    def run(self, device=None):
        if Path("kill").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        Path(self.file).write_text("done")


class OfOneKilledTraining(Counting):
    def cells(self):
        return [replace(super().cells()[0], fit=KilledFit("none.yaml", "done.safetensors"))]


def test_a_training_whose_process_was_killed_is_taken_over(tmp_path, monkeypatch):
    """Also where no other cell is left to do meanwhile: the dead one's lease of the training lapses, too."""
    monkeypatch.chdir(tmp_path)
    Path("kill").touch()
    process = multiprocessing.get_context("fork").Process(target=compute, args=(OfOneKilledTraining(), Store(tmp_path)))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert {name.split("-")[0] for name in leases_of(Store(tmp_path)).holders()} == {"first", "fit"}
    Path("kill").unlink()
    suite = OfOneKilledTraining()
    done = threading.Thread(target=compute, args=(suite, Store(tmp_path)), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive()
    assert suite.ran == ["first"]


def test_a_failure_is_noted_and_the_others_go_on(tmp_path):
    suite = Counting(fail=True)
    results, _ = compute(suite, Store(tmp_path))
    assert suite.ran == ["first"]
    assert results.failures == {"second": "ValueError: no luck", "both": "needs second, which failed"}
    mended = Counting()
    results, _ = compute(mended, Store(tmp_path))
    assert mended.ran == ["second", "both"]
    assert not results.failures


# a comparison of the user's own, as the documentation has it


def documented(kind):
    blocks = re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/benchmarks.md").read_text(), re.S)
    assert len(blocks) == 1
    return blocks[0]


def test_a_model_of_fewer_steps_than_its_job_is_taken_and_said_once(tmp_path, monkeypatch, caplog):
    """As after `make demo`, whose digits are trained for less; with the job's steps, with more, or where the file does
    not say, nothing is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("trainer: {max_steps: 900}")
    model, fit = MetaFlowMap(MLP(dim=2, hidden_size=8, depth=1)), {"config": "job.yaml", "file": "m.safetensors"}
    said = (
        "m.safetensors is taken as it is, after 700 steps of training; job.yaml has 900: move it away to have that run"
    )
    for step, options, expected in (
        (700, {}, 1), (900, {}, 0), (2500, {}, 0), (700, {"trainer.max_steps": 700}, 0), (None, {}, 0),
    ):  # fmt: skip
        save_model(model, "m.safetensors", metadata={} if step is None else {"step": str(step)})
        settings = ModelSettings("m.safetensors", [FitSettings(**fit, options=Spec(options))])
        for _ in range(2):
            assert settings.jobs() == []
            assert Fit(**fit, options=options).is_done()
        assert caplog.text.count(said) == len(caplog.records) == expected, (step, options)
        caplog.clear()
        say_fewer_steps.cache_clear()


@pytest.mark.slow
def test_the_documented_comparison_runs_and_its_costs_are_the_papers(workplace, capsys):
    (workplace / "my_rewards.py").write_text(documented("python"))
    (workplace / "compare.yaml").write_text(documented("yaml"))
    args = ("alignment", "--config", "compare.yaml", "--num_samples", 6, "--best_of_n.steps", 4)
    benchmark(*args)
    folder = workplace / "outputs/benchmarks/compare"
    assert "Report: outputs/benchmarks/compare/report/index.html" in capsys.readouterr().out
    found = {(r["method"], r["setting"], r["λ"]): r for r in rows(folder, "results")}
    # K steps, N draws: Best-of-N (K+1) N, MFM-G K + 4 N K, with GLASS draws of S steps K + 2 N K (S + 1) (F.3.5)
    nfe = {key: int(row["NFE"]) for key, row in found.items()}
    assert nfe["Best-of-N", "N 100", "any"] == 5 * 100
    assert nfe["MFM-G", "steps 25", "2.5"] == 25 + 4 * 25
    assert nfe["GLASS-G", "steps 10", "1"] == 10 + 2 * 10 * (4 + 1)
    assert float(found["Best-of-N", "N 10", "any"]["mean reward"]) >= float(
        found["Best-of-N", "N 1", "any"]["mean reward"]
    )
    # what is kept for one N is not that of another
    assert found["Best-of-N", "N 100", "any"]["diversity"] != found["Best-of-N", "N 1", "any"]["diversity"]
    for row in found.values():
        assert float(row["mean reward low"]) <= float(row["mean reward"]) <= float(row["mean reward high"])
    # larger lambda, larger reward: the gradient is the reward's
    assert float(found["MFM-G", "steps 25", "2.5"]["mean reward"]) > float(
        found["MFM-G", "steps 25", "1"]["mean reward"]
    )
    page = (folder / "report/index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    environment = json.loads((folder / "report/environment.json").read_text())
    assert environment["environment"]["command"].startswith("mfm benchmark alignment --config compare.yaml")
    for name in ("reward_nfe", "samples_top_heavy"):
        assert (folder / f"report/{name}.png").stat().st_size > 5000
        assert (folder / f"report/{name}.svg").read_text().startswith("<?xml")

    # again: nothing is computed, the numbers are the same
    before, stamps = rows(folder, "results"), {p: p.stat().st_mtime_ns for p in (folder / "results").glob("*-*.*")}
    benchmark(*args)
    assert rows(folder, "results") == before
    assert {p: p.stat().st_mtime_ns for p in (folder / "results").glob("*-*.*")} == stamps

    # changed code of the reward is noticed, though its name is the same
    settings = {"model": {"file": "outputs/digits/mfm/model.safetensors"}, "rewards": {"r": {"reward": "brightness"}}}
    probes = []
    for scale in (1.0, 2.0):
        settings["rewards"]["r"] = {"reward": {"name": "scale", "reward": "brightness", "factor": scale}}
        (workplace / "probe.yaml").write_text(yaml.safe_dump({**settings, "methods": {}}))
        suite, _, _ = load_suite("alignment", ["--config", "probe.yaml"])
        assert suite.missing() == []
        suite.prepare()
        probes.append(suite._probes)
    assert probes[0] != probes[1]


@pytest.mark.slow
def test_failures_and_what_is_left_out_are_on_the_page(workplace):
    (workplace / "bad_rewards.py").write_text(
        "def broken(images):\n    raise RuntimeError('the scorer is down')\n\n\n"
        "def late(images):\n    r = images.mean(dim=(1, 2, 3))\n"
        "    return r if not images.requires_grad else r * float('nan')\n"
    )
    steering = {"class_path": "Steering", "init_args": {"grid": {"steps": 3}}}
    settings = {
        "model": {
            "file": "outputs/digits/mfm/model.safetensors",
            "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"},
        },
        "rewards": {
            "down": {"reward": {"class_path": "bad_rewards.broken"}},
            "late": {"reward": {"class_path": "bad_rewards.late"}},
            "bytes": {"reward": "jpeg_compressibility"},
            "good": {"reward": "brightness", "scale": 10.0},
        },
        "scales": [1.0],
        "num_samples": 4,
        "best_of_n": {"numbers": [1, 4], "steps": 3},
        "methods": {
            "MFM-G": {"method": steering},
            "Search": {"method": {"class_path": "Search", "init_args": {"steps": 2}}},
        },
    }
    (workplace / "mixed.yaml").write_text(yaml.safe_dump(settings))
    benchmark("alignment", "--config", "mixed.yaml", "--output", "out")
    record = json.loads((workplace / "out/report/environment.json").read_text())
    assert any("down" in name and "the scorer is down" in message for name, message in record["failures"].items())
    assert "step 1 of 3" in record["failures"]["MFM-G, late, λ = 1, seed 0"]
    assert "is not differentiable" in record["skipped"]["MFM-G, bytes"]
    page = (workplace / "out/report/index.html").read_text()
    assert "the scorer is down" in page
    assert "Left out on purpose" in page
    kept = {(r["reward"], r["method"]) for r in rows(workplace / "out", "results")}
    assert {("good", "MFM-G"), ("good", "Search"), ("bytes", "Search"), ("late", "Search")} <= kept
    assert not any(reward == "down" for reward, _ in kept)


@pytest.mark.slow
def test_trained_methods_are_fitted_for_each_multiplier(workplace):
    shutil.copytree(ROOT / "configs", workplace / "configs")
    small = {
        "trainer.max_steps": 2, "trainer.val_check_interval": 10000, "trainer.limit_val_batches": 0,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False,
        "data.init_args.data.init_args.batch_size": 8,
        "data.init_args.buffer_size": 8, "data.init_args.ode_steps": 2,
    }  # fmt: skip
    settings = {
        "model": {
            "file": "outputs/digits/mfm/model.safetensors",
            "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"},
        },
        "rewards": {"brightness": {"reward": "brightness", "scale": 10.0}},
        "scales": [1.0, 2.0],
        "num_samples": 4,
        "best_of_n": {"numbers": [1], "steps": 3},
        "methods": {
            "policy": {
                "method": {"class_path": "PolicySampling", "init_args": {"policy": "FITTED"}},
                "sweep": {"steps": [2, 3]},
                "fit": {"config": "configs/digits/finetune.yaml", "options": small},
            }
        },
    }
    (workplace / "fit.yaml").write_text(yaml.safe_dump(settings))
    benchmark("alignment", "--config", "fit.yaml", "--output", "out")
    files = sorted(p.parent.name for p in (workplace / "out/models").rglob("model.safetensors"))
    assert files == ["policy_brightness_10", "policy_brightness_20"]
    found = [r for r in rows(workplace / "out", "results") if r["method"] == "policy"]
    assert [(r["λ"], r["NFE"]) for r in found] == [("1", "2"), ("2", "2"), ("1", "3"), ("2", "3")]
    assert all(r["needs training"] == "yes" for r in found)


@pytest.mark.parametrize("name", ["alignment", "mnist"])
def test_packaged_methods_can_be_built(name):
    """Each setting of each sweep; what --quick leaves out is said."""
    settings = yaml.safe_load((ROOT / f"configs/benchmarks/{name}.yaml").read_text())
    methods = {
        method: MethodSettings(Spec(given["method"]), given.get("sweep", {}), None, None, given.get("quick", True))
        for method, given in settings["methods"].items()
        if "fit" not in given
    }
    built = {method: [point.build() for point in points(method, given)] for method, given in methods.items()}
    assert [type(made).__name__ for made in built["FMTT"]] == ["TrajectoryTilting"] * 2
    assert [made.num_particles for made in built["FMTT"]] == [2, 8]
    assert [made.iterations for made in built["Noise optimisation"]] == [5, 20, 50]
    assert [made.estimator.num_draws for made in built["Diamond-G"]] == [2, 4]
    assert {made.correlation for made in built["FK-GLASS, fresh noise"]} == {0.0}
    suite = AlignmentSuite(ModelSettings("none"), {"brightness": RewardSettings("brightness")}, methods)
    suite.shrink()
    left_out = {method for method, given in methods.items() if not given.quick}
    assert left_out >= {"Diamond-G", "Diamond-GF", "Flow map's end", "FMTT", "Noise optimisation"}
    assert all("not in --quick" in suite.skipped[method] for method in left_out)
    assert not left_out & {point.method for point in suite._points}


# the other suites


@pytest.mark.slow
def test_gmm_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(model(MLP(2, 16, 1)), tmp_path / "model.safetensors")
    args = ("--draws", "[1,2]", "--num_samples", 64, "--num_reference", 256, "--seeds", "[0,1]", "--steps", 6)
    benchmark("gmm", "--model", "model.safetensors", *args, "--particles", 64, "--ascent", 3, "--output", "out")
    found = {(r["method"], r["N"]): r for r in rows(tmp_path / "out", "distances")}
    assert int(found["MFM-G, ODE", "2"]["NFE per sample"]) == 6 + 4 * 2 * 6
    assert int(found["MFM-GF, SDE", "2"]["NFE per sample"]) == 6 + 2 * 2 * 6
    assert int(found["DPS, ODE", ""]["NFE per sample"]) == 4 * 6
    assert int(found["Diamond-G, ODE", "2"]["NFE per sample"]) == 6 + 6 * 2 * 6
    assert int(found["Diamond-GF, ODE", "2"]["NFE per sample"]) == 6 + 3 * 2 * 6
    assert int(found["flow map's end, SDE", ""]["NFE per sample"]) == 5 * 6
    assert int(found["FMTT", ""]["NFE per sample"]) == 5 * 6 - 3
    assert int(found["noise optimisation", ""]["NFE per sample"]) == 4 * 3 + 2
    assert found["FK, GLASS, fresh noise", ""]["NFE per sample"] == found["FK, GLASS", ""]["NFE per sample"]
    floor = found.pop(("exact samples (floor)", ""))
    assert float(floor["MMD low"]) < 0 < float(floor["MMD high"])
    # nothing that a random model draws is nearer than exact samples
    assert all(float(r["W2"]) > float(floor["W2"]) for (name, _), r in found.items() if "exact" not in name)
    assert all(float(r["W2 std of seeds"]) > 0 for r in found.values())
    # the summary takes the largest N of each method, whatever the results are
    page = re.sub(r"</?abbr[^>]*>", "", (tmp_path / "out/report/index.html").read_text())
    values = [
        f"{rounded(float(found[f'{name}, {way}', '2']['W2']))} for {name} ({way}, N = 2)"
        for name, way in itertools.product(("MFM-G", "MFM-GF"), ("ODE", "SDE"))
    ]
    assert (
        "The sliced W2 to the exact distribution, of each method with its largest N, is "
        f"{', '.join(values[:-1])} and {values[-1]}; two sets of exact samples have {rounded(float(floor['W2']))}."
    ) in page
    others = {
        key: float(r["W2"]) for key, r in found.items()
        if not key[0].startswith(("MFM", "exact")) and (key[1] == "2" or not key[0].startswith("Diamond"))
    }  # fmt: skip
    assert f"has the smallest ({rounded(min(others.values()))})" in page
    assert "2 seeds, 6 steps" in page


@pytest.mark.slow
def test_digits_suite(workplace):
    settings = yaml.safe_load((ROOT / "configs/benchmarks/digits.yaml").read_text())
    part = {
        "num_states": 4,
        "num_draws": 8,
        "model_steps": [1],
        "glass_steps": [1, 2],
        "times": [0.3],
        "rollout_steps": 4,
    }
    settings |= {"posterior": part, "value": part}
    settings["frequencies"] = {"draws": [1, 2], "particles": [2], "num_samples": 16, "steps": 4}
    settings["quality"]["init_args"]["steps"] = 5
    settings["reward"]["classifier"]["init_args"] = {"steps": 5}
    (workplace / "digits.yaml").write_text(yaml.safe_dump(settings))
    benchmark("digits", "--config", "digits.yaml", "--output", "out")
    shares = {(r["method"], r["draws or particles"]): r for r in rows(workplace / "out", "class_frequencies")}
    assert int(shares["MFM-G", "2"]["NFE"]) == 4 + 4 * 2 * 4
    assert sum(map(int, shares["DPS", ""]["class shares in %"].split())) == pytest.approx(100, abs=3)
    draws = {r["draws"]: float(r["sliced W2"]) for r in rows(workplace / "out", "posterior_recovery")}
    assert set(draws) == {"MFM 1", "GLASS 1", "GLASS 2", "SDE rollouts again (floor)"}
    values = {r["estimator"]: r for r in rows(workplace / "out", "value_estimates")}
    assert int(values["GLASS 2"]["NFE"]) == 8 * (2 + 1)
    assert int(values["DPS point estimate"]["NFE"]) == 2


class TinyQuality(Quality):
    """Colour means, in place of Inception."""

    def prepare(self, device):
        self._real = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))

    def features(self, images):
        return images.mean(dim=(2, 3)).cpu()

    @property
    def real(self):
        return self._real

    @property
    def identity(self):
        return {"tiny": 1}


def tiny_imagenet(tmp_path):
    """The packaged config in `small.yaml`, with weights of a tiny size where it looks for them; its settings."""
    small_vae(tmp_path / "checkpoints/sd-vae-ft-mse", blocks=2)
    network = DiT(8, 4, 4, 16, 2, 2, 1, num_classes=1000, guidance_scales=(2.5,))
    save_model(model(network), _folder(tmp_path / "checkpoints/imagenet256") / "mfm_xl2.safetensors")
    settings = yaml.safe_load((tmp_path / "configs/benchmarks/imagenet256.yaml").read_text())
    settings["quality"] = settings["fid"] = {"class_path": "tests.benchmarks.test_benchmarks.TinyQuality"}
    zoo = tiny_rewards(tmp_path / "rewards")
    for reward in settings["rewards"].values():  # the config's own, but for their size
        reward["reward"] = {"name": reward["reward"], **zoo[reward["reward"]]}
    settings |= {"num_samples": 4, "block": 3, "scales": [1.0], "best_of_n": {"numbers": [1, 3], "steps": 2}}
    settings["samples"] = {"num_samples": 20, "steps": [1, 2], "batch_size": 8, "chunk": 12}
    for name, method in settings["methods"].items():
        arguments = method["method"]["init_args"]
        if "grid" in arguments:
            arguments["grid"]["steps"] = 2
        else:
            arguments["steps"] = 2
        method["sweep"] = {key: values[:1] for key, values in method.get("sweep", {}).items()}
        assert name
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return settings


@pytest.mark.slow
def test_imagenet_suite_says_what_is_missing_and_runs_when_it_is_there(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    with pytest.raises(SystemExit, match="imagenet256 cannot run") as error:
        benchmark("imagenet256")
    files = ["model.file", "decoder.path", "quality.weights", "quality.reference", "fid.weights", "fid.reference"]
    for what in (*files, "rewards, HPSv2", "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"):
        assert what in str(error.value)
    settings = tiny_imagenet(tmp_path)
    benchmark("imagenet256", "--config", "small.yaml", "--output", "out")
    quality = rows(tmp_path / "out", "sample_quality")
    assert [(r["samples"], r["number"]) for r in quality] == [("MFM, 1 step", "20"), ("MFM, 2 steps", "20")]
    assert {r["method"] for r in rows(tmp_path / "out", "results")} == {"Best-of-N", *settings["methods"]}
    assert not json.loads((tmp_path / "out/report/environment.json").read_text())["failures"]


# bad input


def test_bad_settings_are_refused_before_any_work(workplace, capsys):
    base = {"model": {"file": "outputs/digits/mfm/model.safetensors"}, "rewards": {"b": {"reward": "brightness"}}}
    good = {"class_path": "Steering"}
    cases = [
        (
            {"methods": {"M": {"method": {"class_path": "Steerin"}}}},
            r"unknown class 'Steerin': did you mean 'Steering'",
        ),
        (
            {"methods": {"M": {"method": {"class_path": "Steering", "init_args": {"power": 3}}}}},
            r"method 'M' cannot be built",
        ),
        ({"methods": {"M": {"method": good, "sweep": {"clip": [1], "strength": [1, 2]}}}}, "the same number of values"),
        ({"methods": {"M": {"method": good, "rewards": ["c"]}}}, "c is none of the rewards b"),
        ({"methods": {}, "rewards": {"b": {"reward": "brightnes"}}}, "did you mean 'brightness'"),
        ({"methods": {}, "model": {"file": "nowhere.safetensors"}}, "no model at nowhere.safetensors"),
        ({"methods": {}, "best_of_n": {"numbers": [3, 1]}}, "smallest first"),
        ({"methods": {}, "num_sample": 3}, "suite alignment: .*num_samples.*bad.yaml"),
    ]
    for change, message in cases:
        (workplace / "bad.yaml").write_text(yaml.safe_dump({**base, **change}))
        with pytest.raises(SystemExit) as stopped:
            benchmark("alignment", "--config", "bad.yaml")
        assert re.search(message, str(stopped.value) + capsys.readouterr().err)
        assert not (workplace / "outputs/benchmarks").exists()
    for args, message in (
        (("alignmen",), "unknown suite 'alignmen': did you mean 'alignment'"),
        (("alignment", "--config", "none.yaml"), "no config at none.yaml"),
        (("nowhere.Suite",), "cannot be imported"),
        (("gmm", "--device", "toaster"), "device 'toaster' cannot be used here"),
    ):
        with pytest.raises(SystemExit, match=message):
            benchmark(*args)


def test_every_suite_has_a_config_that_fits_it():
    assert {"gmm", "digits", "alignment", "imagenet256"} <= set(suites())
    for name, kind in suites().items():
        suite, settings, _ = load_suite(name)
        assert isinstance(suite, kind)
        assert settings
        suite.shrink()


def test_features_of_a_folder_of_real_images_are_kept(tmp_path):
    pytest.importorskip("torch_fidelity")
    from mfm_benchmarks.quality import InceptionQuality

    save_file({"features": torch.randn(5, 2048)}, tmp_path / "reference.safetensors")
    quality = InceptionQuality(str(tmp_path / "weights.pth"), str(tmp_path / "reference.safetensors"))
    assert [line.split(":")[0] for line in quality.missing()] == ["quality.weights"]
    assert len(InceptionQuality(str(tmp_path / "w"), str(tmp_path / "none")).missing()) == 2


def test_a_model_computes_in_bf16_where_asked_and_gives_float32_all_the_same():
    one = model(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=0))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    full, names = one.velocity(0.0, 1.0, x, t, x), list(one.state_dict())
    compute_in(one, "bf16")
    seen = []
    hook = next(m for m in one.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
        lambda _, given, found: seen.append(found.dtype)
    )
    half = one.velocity(0.0, 1.0, x.requires_grad_(), t, x)
    hook.remove()
    assert seen[0] == torch.bfloat16
    assert half.dtype == torch.float32
    error = (half - full).abs().max() / full.abs().max()
    assert 0 < error < 0.05
    assert list(one.state_dict()) == names
    assert torch.autograd.grad(half.sum(), x)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="unknown precision 'half': expected one of fp32, bf16, fp16"):
        ModelSettings("mnist", precision="half")


def test_the_best_look_aheads_stand_beside_the_samples_at_no_further_cost():
    one, x0 = model(MLP(2, 8, 1)), torch.randn(4, 2)
    target = Target(one, lambda x: -((x - 1) ** 2).sum(dim=1))
    method = Steering(DrawGradient(2), TimeGrid(3), clip=1.0)
    found = measure(method, target, x0, seed=0)
    target.meter = Meter()
    by_hand = replace(method, return_best=True)(target, x0, sample_generators((0, 1), [0, 1, 2, 3]))
    assert torch.allclose(found.tensors["states"], by_hand.states)
    assert torch.allclose(found.tensors["best_rewards"], -((by_hand.best_states - 1) ** 2).sum(dim=1))
    assert found.numbers["nfe"] == by_hand.nfe.total / 4 == 3 * (1 + 4 * 2)
    assert "best_rewards" not in measure(Steering(strength=0.0, grid=TimeGrid(3)), target, x0, seed=0).tensors


@pytest.mark.parametrize(
    "method",
    [Steering(DrawGradient(2), TimeGrid(3), clip=1.0), Search(2, 2, 3), FeynmanKac(num_particles=3, grid=TimeGrid(3))],
)
def test_samples_are_the_same_whichever_others_a_cell_computes(method):
    one, x0 = model(MLP(2, 8, 1, num_classes=5)), torch.randn(5, 2)
    target = Target(one, lambda x: -((x - 1) ** 2).sum(dim=1), conditions=Conditions(label=torch.arange(5)))
    whole = measure(method, target, x0, seed=3)
    parts = [measure(method, target, x0, seed=3, rows=rows) for rows in (range(2), range(2, 5))]
    for name in ("states", "rewards"):
        together = torch.cat([part.tensors[name] for part in parts])
        torch.testing.assert_close(together, whole.tensors[name], rtol=1e-5, atol=1e-6)
    assert parts[0].numbers["nfe"] == parts[1].numbers["nfe"] == whole.numbers["nfe"]


def test_seconds_of_best_of_n_are_those_of_the_candidates_so_far():
    """And of their choice, which takes well below a second here; of blocks without their seconds there are none."""
    mfm = model(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=0))
    target = Target(mfm, mfm_rewards.build("brightness"), PixelDecoder())
    pool = BestOfNPool([1, 3, 10], steps=2)
    cells = list(pool.cells(lambda: target, 4, 0, torch.device("cpu"), {}))
    blocks = [cell.compute() for cell in cells]
    assert "wall_time" not in pool.choose(target, blocks, torch.device("cpu"), None).numbers
    for k, block in enumerate(blocks):
        block.numbers["cell_seconds"] = 400.0 * 10**k
    found = pool.choose(target, blocks, torch.device("cpu"), None).numbers["wall_time"]
    for seconds, of_pool in zip(found, (100, 1_100, 11_100), strict=True):
        assert of_pool < seconds < of_pool + 10


def test_a_report_on_nothing_says_whether_it_failed_or_is_not_there_yet():
    results = Results()
    assert "Every run failed" in no_result(results).paragraphs[0]
    results.missing = ["a result"]
    assert "is there yet" in no_result(results).paragraphs[0]
