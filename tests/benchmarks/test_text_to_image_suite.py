"""Methods compared on a pretrained flow as a user runs it: a folder of diffusers, prompts, one command; read back."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from mfm_benchmarks.command import load_suite
from mfm_benchmarks.methods import MethodSettings, points
from mfm_benchmarks.parts.prompt_report import COLUMNS
from mfm_benchmarks.spec import Spec
from mfm_benchmarks.suites.text_to_image import TextToImageSuite
from mfm_lightning.alignment import BestOfN, DPSGradient, GlassPosterior, Search, Steering, Target, TimeGrid
from mfm_lightning.backbones import load_flow
from mfm_lightning.commands.main import main
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.utils.decoding import load_image
from mfm_rewards import build
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": "a red cat"}, {"prompt": "the dog", "seed": 7, "tag": "one"}, {"prompt": "a blue mat"}]
REWARDS = ("brightness", "bytes")
GLASS = {"class_path": "mfm_lightning.alignment.GlassPosterior", "init_args": {"steps": 2}}
METHODS = {
    "DPS": {
        "method": {
            "class_path": "Steering",
            "init_args": {
                "clip": 0.5,
                "grid": {"of_model": True},
                "estimator": {"class_path": "mfm_lightning.alignment.DPSGradient"},
                "return_best": True,
            },
        },
        "sweep": {"grid.steps": [2, 4]},
    },
    "search": {
        "method": {
            "class_path": "Search",
            "init_args": {"steps": 2, "num_particles": 2, "num_draws": 2, "posterior": GLASS},
        }
    },
    "FK": {"method": {"class_path": "FeynmanKac", "init_args": {"num_particles": 2, "grid": {"steps": 3}}}},
    "MFM-G": {"method": {"class_path": "Steering"}},
    "FMTT": {"method": {"class_path": "TrajectoryTilting", "init_args": {"grid": {"steps": 1}}}},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture(scope="module")
def settings(pipeline):
    options = {"name": str(pipeline), "image_size": 16, "torch_dtype": "float32"}
    return {
        "flow": {"class_path": "mfm_lightning.backbones.load_flow", "init_args": options},
        "prompts": "prompts.jsonl",
        "images_per_prompt": 2,
        "rewards": {
            "brightness": {"reward": "brightness", "scale": 20.0},
            "bytes": {"reward": "jpeg_compressibility", "scale": 10.0},  # a black box
        },
        "held_out": {"contrast": "contrast"},
        "best_of_n": {"numbers": [2, 3], "steps": 3, "max_rows": 4},
        "diversity": "pixels",
        "layout": "geneval",
        "evaluations": {"GenEval": "results.jsonl"},
        "methods": METHODS,
        "block": 2,
    }


def benchmark(settings, name, *args):
    Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    main(["benchmark", "text-to-image", "--config", f"{name}.yaml", "--device", "cpu", *map(str, args)])
    return Path(f"outputs/benchmarks/{name}")


def table(folder):
    with open(folder / "report/results.csv") as file:
        return {(r["reward"], r["method"], r["setting"]): r for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def first(settings, tmp_path_factory):
    """The first run, of which tests look at one thing each."""
    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        Path("prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        benchmark(settings, "first")
    return place


@pytest.fixture
def found(first, monkeypatch):
    monkeypatch.chdir(first)
    return Path("outputs/benchmarks/first")


def image_of(folder, row, index):
    return load_image(folder / row["images"] / f"{index // 2:05d}/samples/{index % 2:04d}.png")


def noise_and_generators(flow, keys):
    x0 = torch.cat([torch.randn((1, *flow.state_shape), generator=sample_generators(s, [n])[0]) for s, n in keys])
    return x0, [sample_generators((seed, 1), [number])[0] for seed, number in keys]


KEYS = [(0, 0), (0, 1), (7, 0), (7, 1), (0, 4), (0, 5)]  # seed and number of each image's noise


def test_every_image_is_that_of_the_method_by_hand(found, pipeline):
    """All methods from the same noise; NFE by the formulas: guidance by two evaluations doubles the transformer's."""
    rows, flow = table(found), load_flow(pipeline, 16, "float32").eval().requires_grad_(False)
    given = flow.encode([row["prompt"] for row in ROWS for _ in range(2)])
    glass = GlassPosterior(steps=2)
    methods = {
        ("base flow", ""): Steering(strength=0.0, grid=TimeGrid(3, of_model=True)),
        ("Best-of-N", "N 3"): BestOfN(3, grid=TimeGrid(3, of_model=True)),
        ("DPS", "steps 4"): Steering(DPSGradient(), TimeGrid(4, of_model=True), clip=0.5),
        ("search", ""): Search(steps=2, num_particles=2, num_draws=2, posterior=glass),
    }
    nfe = {"base flow": (6, 0), "Best-of-N": (18, 3), "DPS": (16, 8), "search": (None, None)}
    for (method, label), one in methods.items():
        row = rows["brightness", method, label]
        x0, generators = noise_and_generators(flow, KEYS)
        result = one(Target(flow, build("brightness"), flow.decoder, given, reward_scale=20.0), x0, generators)
        for index in range(6):
            assert (image_of(found, row, index) - result.images[index]).abs().max() <= 1.01 / 255
        assert float(row["mean reward"]) == pytest.approx(float(result.rewards.mean()), abs=1e-3)
        network, reward = nfe[method]
        if network is not None:
            assert (float(row["transformer evaluations"]), float(row["reward evaluations"])) == (network, reward)
        assert float(row["NFE"]) == pytest.approx(result.nfe_per_sample)


def test_numbers_of_the_table_are_those_of_the_images(found):
    """From the files, by hand: rewards, held-out ones, diversity, paired differences with Student's t over prompts."""
    rows = table(found)
    base = rows["brightness", "base flow", ""]
    images = {key: torch.stack([image_of(found, row, i) for i in range(6)]).double() for key, row in rows.items()}
    assert set(COLUMNS) < set(base)  # of a table that has all of them
    for (reward, method, label), row in rows.items():
        mine, values = images[reward, method, label], build("brightness")
        bright = mine.mean(dim=(1, 2, 3))
        column = "mean reward" if reward == "brightness" else "brightness"
        assert float(row[column]) == pytest.approx(float(bright.mean()), abs=1e-5)
        assert values(mine).tolist() == pytest.approx(bright.tolist())
        assert float(row["contrast"]) == pytest.approx(float(build("contrast")(mine.float()).mean()), abs=1e-5)
        spread = [(mine[2 * p] - mine[2 * p + 1]).square().mean().sqrt() for p in range(3)]
        assert float(row["diversity"]) == pytest.approx(float(sum(spread)) / 3, abs=1e-5)
        assert float(row["seconds"]) > 0
        if reward == "brightness" and method != "base flow":
            gain = (bright - images["brightness", "base flow", ""].mean(dim=(1, 2, 3))).reshape(3, 2).mean(dim=1)
            half = 4.302653 * float(gain.std()) / 3**0.5
            assert float(row["gain over the base flow"]) == pytest.approx(float(gain.mean()), abs=1e-5)
            assert float(row["gain over the base flow high"]) == pytest.approx(float(gain.mean()) + half, abs=1e-4)
    assert float(base["seconds"]) < float(rows["brightness", "Best-of-N", "N 3"]["seconds"])
    best = rows["brightness", "DPS", "steps 4"]
    assert float(best["best look-ahead"]) != float(best["mean reward"])
    assert rows["brightness", "search", ""]["best look-ahead"] == ""  # its endpoint is the best


def test_best_of_n_of_each_reward_is_chosen_from_one_pool(found):
    rows, pool = table(found), table(found)["brightness", "base flow", ""]["images"]
    for reward in REWARDS:
        of = {"brightness": build("brightness"), "bytes": build("jpeg_compressibility")}[reward]
        for number in (2, 3):
            for index in range(6):
                paths = [found / pool / f"candidate_{k:04d}/{index:06d}.png" for k in range(1, number)]
                candidates = [image_of(found, {"images": pool}, index), *map(load_image, paths)]
                best = max(candidates, key=lambda image: float(of(image[None])))
                assert torch.equal(image_of(found, rows[reward, "Best-of-N", f"N {number}"], index), best)


def words(page):
    """The page without the marks of terms."""
    return re.sub(r"</?abbr[^>]*>", "", page.read_text())


def test_what_does_not_fit_is_left_out_and_said(found):
    record = json.loads((found / "report/environment.json").read_text())
    assert record["failures"] == {}
    assert set(record["skipped"]) == {"DPS, bytes", "MFM-G", "MFM-G, bytes", "FMTT"}
    assert "needs a flow map, and a SD3Flow has none" in record["skipped"]["FMTT"]
    assert "is not differentiable" in record["skipped"]["DPS, bytes"]
    assert "a SD3Flow gives none" in record["skipped"]["MFM-G"]
    page = words(found / "report/index.html")
    assert (
        "Diversity is the mean distance between two images of one prompt: root mean square difference of pixels" in page
    )
    assert "GenEval: 11 of 11 settings have no results.jsonl in the folder of their images, such as outputs/" in page
    assert "brightness: DPS (steps 4), 24 NFE" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    for picture in ("reward_nfe", "reward_seconds", "images_brightness", "images_bytes"):
        assert (found / f"report/{picture}.png").stat().st_size > 5000


@pytest.mark.slow
def test_again_all_is_taken_from_the_store(found, settings):
    def times():
        return {p: p.stat().st_mtime_ns for p in found.rglob("*") if not {"report", "claims"} & set(p.parts)}

    before, stamps = table(found), times()
    benchmark(settings, "first")
    assert times() == stamps
    assert table(found) == before
    # one more reward is measured, and no image made again
    benchmark({**settings, "held_out": {"contrast": "contrast", "symmetry": "symmetry"}}, "first")
    images = {p: stamp for p, stamp in stamps.items() if p.suffix == ".png"}
    assert {p: p.stat().st_mtime_ns for p in found.rglob("*.png") if "report" not in p.parts} == images
    assert all(float(row["symmetry"]) <= 0 for row in table(found).values())


@pytest.mark.slow
def test_results_do_not_depend_on_the_block_size(found, settings):
    """Nor on where a run was stopped: a block is what may be lost."""
    before, few = table(found), {name: METHODS[name] for name in ("DPS", "FK")}
    few = {"methods": few, "rewards": {"brightness": settings["rewards"]["brightness"]}, "shown": 1}
    for block in (1, 3):
        after = table(benchmark({**settings, **few, "block": block}, f"block{block}"))
        assert set(after) == {key for key in before if key[0] == "brightness" and key[1] != "search"}
        for key, row in after.items():
            for name in ("mean reward", "mean reward low", "contrast", "diversity", "NFE", "gain over the base flow"):
                assert row[name] == before[key][name], (key, name)
            assert torch.equal(
                image_of(Path(f"outputs/benchmarks/block{block}"), row, 3), image_of(found, before[key], 3)
            )


def test_an_evaluators_results_become_a_column(found, settings):
    rows = table(found)
    correct = {"base flow": [0, 0, 0, 1, 1, 1], "DPS": [1, 1, 0, 1, 1, 1], "FK": [1, 1, 1]}
    for (reward, method, label), row in rows.items():
        if reward == "brightness" and (method, label) in (("base flow", ""), ("DPS", "steps 4"), ("FK", "")):
            lines = [
                {"filename": f"{row['images']}/{i // 2:05d}/samples/{i % 2:04d}.png", "correct": bool(value)}
                for i, value in enumerate(correct[method])
            ]
            (found / row["images"] / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    benchmark(settings, "first")
    after, page = table(found), words(found / "report/index.html")
    assert float(after["brightness", "DPS", "steps 4"]["GenEval"]) == pytest.approx(5 / 6)
    # prompts' means are 1, 0.5, 1 and 0, 0.5, 1: Student's t of their differences holds zero
    assert "GenEval not significantly different (0.333 (-1.1 to 1.77))" in page
    assert after["bytes", "base flow", ""]["GenEval"] == "0.5"
    assert after["brightness", "FK", ""]["GenEval"] == ""
    assert "GenEval is left out for FK, brightness: 3 of 6 images have no row" in page
    for path in found.rglob("results.jsonl"):
        path.unlink()


def test_packaged_methods_run_on_a_flow(pipeline, settings):
    """Each setting of each sweep: none is left out for a differentiable reward, and none fails; fewest steps."""
    given = yaml.safe_load((ROOT / "configs/benchmarks/text-to-image.yaml").read_text())
    assert given["flow"]["class_path"] == settings["flow"]["class_path"]
    flow = load_flow(pipeline, 16, "float32").eval().requires_grad_(False)
    target = Target(flow, build("brightness"), flow.decoder, flow.encode("a red cat"))
    made = []
    for name, method in given["methods"].items():
        for point in points(name, MethodSettings(Spec(method["method"]), method.get("sweep", {}))):
            one = point.build()
            one.check(target.reward, flow)
            made.append(point.name)
            setattr(getattr(one, "grid", one), "steps", 2)  # noqa: B010 # which of them have a grid is their affair
            result = one(target, torch.randn(1, *flow.state_shape), [torch.Generator().manual_seed(0)])
            assert torch.isfinite(result.images).all()
            assert len(result.images) == 1
    assert len(made) == len(set(made)) >= 10


def test_quick_has_few_prompts_and_the_cheapest_settings(found, settings):
    quick = {**settings, "methods": {"DPS": METHODS["DPS"], "FK": {**METHODS["FK"], "quick": False}}}
    Path("quick.yaml").write_text(yaml.safe_dump(quick))
    folder = settings["flow"]["init_args"]["name"]
    suite, _, _ = load_suite("text-to-image", ["--config", "quick.yaml", "--flow", folder])
    assert isinstance(suite, TextToImageSuite)
    suite.shrink()
    assert suite.missing() == []
    suite.prepare()
    assert suite._source.flow.state_shape == (4, 4, 4)  # of the pipeline's own size: the folder alone was given
    names = {cell.name for cell in suite.cells()}
    assert "DPS (steps 2), brightness: images, prompts 1 to 2" in names
    assert not any("steps 4" in name or "FK" in name or "prompts 3" in name for name in names)
    assert "quick: false" in suite.skipped["FK"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "none.txt"}, r"prompts: no prompts at none\.txt"),
        ({"prompts": "empty.txt"}, r"prompts: empty\.txt has no prompts"),
        ({"layout": "compbench", "prompts": ["a/b"]}, "prompts: prompt 0, 'a/b': T2I-CompBench's file names"),
        ({"held_out": {"far": "diversity"}}, "rewards, far: scores images beside others, which the suite's blocks"),
        ({"rewards": {"b": {"reward": "brightnes"}}}, "rewards, b: unknown reward 'brightnes': did you mean"),
        (
            {"flow": {"class_path": "mfm_lightning.backbones.load_flow", "init_args": {"name": "no/ne"}}},
            "flow: .*no/ne",
        ),
        ({"flow": {"class_path": "mfm_lightning.backbones.load_flow", "init_args": {"nam": "x"}}}, "flow.*nam"),
        ({"flow": "no/where"}, "flow: .*no/where"),
        ({"diversity": "lpips_alex"}, "diversity: lpips_alex: no weights of alexnet at"),
        ({"diversity": "lpips"}, "diversity: unknown diversity 'lpips'"),
        ({"best_of_n": {"numbers": [3, 2]}}, "smallest first"),
        (
            {"held_out": {"brightness": "contrast"}},
            "brightness: rewards, held_out, evaluations and alignment need names",
        ),
        ({"methods": {"base flow": {"method": {"class_path": "Steering"}}}}, "a method cannot be called base flow"),
        ({"held_out": {"seconds": "contrast"}}, "'seconds' is a column of the report already"),
        ({"block": 0}, "block 0 must be at least 1"),
        ({"guidance": 1.0, "negative": "bad"}, "a negative prompt is no use with guidance 1"),
        ({"methods": {"M": {"method": {"class_path": "Steerin"}}}}, "unknown class 'Steerin': did you mean 'Steering'"),
    ],
)
def test_bad_settings_are_refused_before_any_image(settings, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Path("empty.txt").write_text("\n")
    with pytest.raises((SystemExit, ValueError)) as stopped:
        benchmark({**settings, **change}, "bad")
    assert re.search(message, " ".join(f"{stopped.value} {capsys.readouterr().err}".split()))
    assert not list(Path().rglob("*.png"))
