"""The suite of training recipes: the time to a distance in closed form, step times, and the suite on the mixture."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from mfm_benchmarks.blocks import Table
from mfm_benchmarks.parts import reference_draws
from mfm_benchmarks.parts.recipe_samples import RecipeSamples
from mfm_benchmarks.parts.reference_draws import ReferenceDraws
from mfm_benchmarks.quality import Quality
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suite import Outcome, Results
from mfm_benchmarks.suites import training_recipes
from mfm_benchmarks.suites.training_recipes import Recipe, TrainingRecipesSuite, steps_to
from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.commands.main import main
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.networks.decoders import Decoder
from mfm_lightning.oracles import GaussianMixture
from tests.closed_form import gaussian_model
from tests.fashion_mnist import as_torchvision

ROOT = Path(__file__).parents[2]
MODES = {"means": [[-3.0, 0.0], [3.0, 0.0]], "covariances": 0.5}
ORACLE = Spec({"class_path": "mfm_lightning.oracles.GaussianMixture", "init_args": MODES})


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_time_to_a_distance_is_exact_for_a_power_law(power):
    steps = [100, 200, 400]
    distances = [s**-power for s in steps]
    for wanted in (100, 150, 300, 400):
        assert steps_to(wanted**-power, steps, distances) == pytest.approx(wanted)
    assert steps_to(80**-power, steps, distances) == 100  # the first training has it: at most so many
    assert steps_to(500**-power, steps, distances) == pytest.approx(500)  # beyond the last one
    assert steps_to(801**-power, steps, distances) == math.inf  # at most twice
    assert steps_to(0.01, [100, 200], [0.5, 0.6]) == math.inf  # a line that does not fall
    assert steps_to(0.01, [100], [0.5]) == math.inf


def test_the_precision_of_all_recipes_is_not_that_of_one_with_its_own():
    recipes = {"plain": Recipe(), "own": Recipe(Spec({"trainer.precision": "32-true"}))}
    draws = ReferenceDraws(oracle=ORACLE, times=[0.5], num_states=2, num_draws=4)
    for given, expected in ((None, [None, "32-true"]), ("bf16-mixed", ["bf16-mixed", "32-true"])):
        suite = TrainingRecipesSuite("configs/gmm/mfm.yaml", recipes, draws, steps=[100], precision=given)
        assert [suite._job(name, 100, 0).options.get("trainer.precision") for name in recipes] == expected


def test_distances_are_told_where_times_are_not_there():
    settings = yaml.safe_load((ROOT / "configs/benchmarks/training-recipes.yaml").read_text())
    recipes = {name: Recipe(**settings["recipes"][name] | {"options": Spec({})}) for name in ("released", "Muon")}
    draws = ReferenceDraws(oracle=ORACLE, times=[0.5], num_states=2, num_draws=4)
    suite = TrainingRecipesSuite(str(ROOT / "configs/gmm/mfm.yaml"), recipes, draws, steps=[100, 200], seeds=[0, 1])
    suite.device = torch.device("cpu")
    suite.prepare()
    suite.cells()

    def told(**distances: list[float]) -> list[dict]:
        of = {(name, 200, seed): value for name, values in distances.items() for seed, value in enumerate(values)}
        done = Results()
        for key in of:
            done.add(suite._trained[key], Outcome({"distance": of[key]}))
        (block,) = suite.report(done)
        return block.rows if isinstance(block, Table) else block.heading

    (row,) = told(Muon=[0.25, 0.75])
    assert (row["recipe"], row["distance, 200 steps"].value) == ("Muon", 0.5)
    assert len(told(Muon=[0.25], released=[0.5])) == 2
    assert told() == "No result"


def test_distances_without_times_are_paired_by_the_seed_and_have_the_samples_beside():
    """Ratios of 1/2 and 1/8 have the mean 1/4; the other recipe's third seed has no partner."""
    settings = yaml.safe_load((ROOT / "configs/benchmarks/training-recipes.yaml").read_text())
    recipes = {name: Recipe(**settings["recipes"][name] | {"options": Spec({})}) for name in ("released", "Muon")}
    draws = ReferenceDraws(oracle=ORACLE, times=[0.5], num_states=2, num_draws=4)
    suite = TrainingRecipesSuite(
        str(ROOT / "configs/gmm/mfm.yaml"), recipes, draws, steps=[200], seeds=[0, 1, 2],
        samples=RecipeSamples(OwnFeatures(), num_samples=4, steps=2),
    )  # fmt: skip
    suite.device = torch.device("cpu")
    suite.prepare()
    suite.cells()
    done = Results()
    for (name, seed), distance in {
        ("released", 0): 1.0, ("released", 1): 2.0, ("Muon", 0): 0.5, ("Muon", 1): 0.25, ("Muon", 2): 9.0,
    }.items():  # fmt: skip
        done.add(suite._trained[name, 200, seed], Outcome({"distance": distance, "frechet": 10 * distance}))
    (table,) = suite.report(done)
    assert isinstance(table, Table)
    released, muon = table.rows
    assert muon["to released's, 200 steps"].value == pytest.approx(0.25)
    assert muon["to released's, 200 steps"].high > 1  # of two runs
    assert "to released's, 200 steps" not in released
    assert [row["Fréchet, 2 steps"].value for row in table.rows] == [15.0, pytest.approx(32.5)]


def test_exact_draws_are_at_the_floor_and_others_are_not(monkeypatch):
    draws = ReferenceDraws(oracle=ORACLE, times=[0.2, 0.6], num_states=4, num_draws=2000)
    draws.prepare(torch.device("cpu"))
    references = [cell.compute() for cell in draws.cells()]
    oracle, other = GaussianMixture(**MODES), draws.judge(MetaFlowMap(MLP(2, 4, 1)), references)

    def own(source, target, t, x_t, noise, max_rows):
        """Draws that are the posterior's own."""
        return oracle.sample_posterior(x_t, t, noise.shape[1], generator=torch.Generator().manual_seed(7))

    monkeypatch.setattr(reference_draws, "draw", own)
    exact = draws.judge(MetaFlowMap(MLP(2, 4, 1)), references)
    assert exact.numbers["distance"] < 0.2 < 1 < other.numbers["distance"]
    assert {name: len(d) for name, d in exact.tensors.items()} == {"t=0.2": 4, "t=0.6": 4}
    with pytest.raises(ValueError, match="give an oracle, or a base flow and the data"):
        ReferenceDraws(base="mnist/flow")
    with pytest.raises(ValueError, match="give an oracle, or a base flow and the data"):
        ReferenceDraws()


@pytest.mark.long
@pytest.mark.slow
def test_recipes_are_trained_timed_and_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((ROOT / "configs/benchmarks/training-recipes.yaml").read_text())
    names = ["released", "one term, p = 0, Muon", "semigroup"]
    settings |= {"steps": [30, 60], "seeds": [1], "rounds": 1}
    settings["recipes"] = {name: settings["recipes"][name] for name in names}
    settings["draws"] |= {"num_states": 4, "num_draws": 64, "times": [0.5]}
    Path("small.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    args = ["benchmark", "training-recipes", "--config", "small.yaml", "--output", "out"]
    main(args)
    with open("out/report/recipes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == names
    assert not json.loads(Path("out/report/environment.json").read_text())["failures"]
    assert float(rows[0]["time of a step"]) == 1
    assert float(rows[0]["time to the same distance"]) == pytest.approx(1)  # its own last distance: after its last step
    assert float(rows[2]["time of a step"]) > 0
    config = yaml.safe_load(Path("out/models/one_term,_p_=_0,_Muon_60_1/config.yaml").read_text())
    optimization = config["model"]["init_args"]["optimization"]
    assert (config["seed_everything"], config["trainer"]["max_steps"]) == (1, 60)
    assert (optimization["optimizer"], optimization["learning_rate"]) == ("muon", 4e-3)
    config = yaml.safe_load(Path("out/models/released_30_1/config.yaml").read_text())
    assert config["model"]["init_args"]["optimization"]["final_learning_rate"] is None
    assert config["model"]["init_args"]["objective"]["backend"] == "functorch"
    before = {path.name: path.stat().st_mtime_ns for path in Path("out/models").glob("*/model.safetensors")}
    main(args)  # nothing is trained again
    assert {path.name: path.stat().st_mtime_ns for path in Path("out/models").glob("*/model.safetensors")} == before


class OwnFeatures(Quality):
    """States are their own features; the real ones are a Gaussian N((1.5, -0.5), 0.3 I)."""

    def prepare(self, device):
        self.ready = True

    def features(self, images):
        return images

    @property
    def real(self):
        raise NotImplementedError

    @property
    def gaussian(self):
        return Gaussian.of_moments(torch.tensor([1.5, -0.5]), 0.3 * torch.eye(2))

    @property
    def identity(self):
        return {"features": "own"}


class NoDecoder(Decoder):
    def forward(self, x):
        return x


@pytest.mark.parametrize("steps", [1, 4])
def test_the_frechet_distance_of_exact_samples_is_that_of_the_means(steps):
    """The exact flow map of N((1, -0.5), 0.3 I): equal covariances, so that the distance is the squared gap of 0.25."""
    samples = RecipeSamples(OwnFeatures(), NoDecoder(), num_samples=20_000, steps=steps, batch_size=5_000)
    samples.prepare(torch.device("cpu"))
    assert samples.judge(gaussian_model()) == pytest.approx(0.25, abs=0.03)  # 5 standard errors: 2 * 0.5 * 0.55 / 141
    assert samples.column == f"Fréchet, {steps} steps"
    assert samples.identity != RecipeSamples(OwnFeatures(), NoDecoder(), 20_000, steps + 1).identity


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_recipes_of_images_as_packaged(tmp_path, monkeypatch, name):
    """Every recipe trains, on a few real images in torchvision's files; draws are judged by rollouts, samples by
    Fréchet distance."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_recipes, "WARM_UP", 1)  # 120 steps of each recipe take a quarter of an hour
    monkeypatch.setattr(training_recipes, "TIMED_STEPS", 3)
    as_torchvision(Path("data"), "MNIST" if name == "mnist" else "FashionMNIST")
    settings = yaml.safe_load((ROOT / f"configs/benchmarks/training-recipes-{name}.yaml").read_text())
    settings |= {"steps": [3], "seeds": [1], "rounds": 1}
    settings["draws"] |= {"num_states": 2, "num_draws": 4, "times": [0.5], "rollout_steps": 3}
    settings["samples"] |= {"num_samples": 32, "steps": 2}
    if name == "fashion":  # its base flow is trained by a job of its own: here that of MNIST stands in
        Path("outputs/fashion/flow").mkdir(parents=True)
        save_model(load_model("mnist/flow"), Path("outputs/fashion/flow/model.safetensors"))
        settings["recipes"] = {k: settings["recipes"][k] for k in ("released", "together, Muon")}
        settings["samples"]["quality"]["init_args"]["steps"] = 5
    Path("small.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["benchmark", "training-recipes", "--config", "small.yaml", "--output", "out"])
    assert not json.loads(Path("out/report/environment.json").read_text())["failures"]
    with open("out/report/recipes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == list(settings["recipes"])
    assert all(float(row["Fréchet, 2 steps"]) > 0 and float(row["distance, 3 steps"]) > 0 for row in rows)
    assert len({row["distance, 3 steps"] for row in rows}) > 1
