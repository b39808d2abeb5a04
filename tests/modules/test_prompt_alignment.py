"""Text-to-image alignment as a user runs it: a folder of diffusers, a file of prompts, one command; gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mfm_lightning.alignment import DrawGradient, Steering, Target, TimeGrid
from mfm_lightning.backbones import FlowAdapter, load_flow
from mfm_lightning.checkpoints import CheckpointError
from mfm_lightning.commands.main import run
from mfm_lightning.interpolant import sample_generators
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import PromptAlignment
from mfm_lightning.networks.files import save_network
from mfm_lightning.samplers import integrate
from mfm_rewards import RewardError, build
from tests.backbones import encoders, tiny
from tests.backbones.fast import frozen  # noqa: F401
from tests.backbones.test_adapter import stirred

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder of SD3 with tiny text encoders."""
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3(**encoders.of_sd3(folder / "words")).save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture
def workplace(tmp_path, monkeypatch, pipeline):
    """Three prompts, one with a seed and a column of its own, and options of the tiny flow."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a red cat"}, {"prompt": "the dog", "seed": 7, "tag": "one"}, {"prompt": "a blue mat"}]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pipeline


def predict(pipeline, config, *more):
    flow = {"name": str(pipeline), "image_size": 16, "torch_dtype": "float32"}
    options = [f"--model.flow.init_args.{name}={value}" for name, value in flow.items()]
    run(
        ["predict", "--config", str(ROOT / f"configs/text_to_image/{config}.yaml"), *options,
         "--model.reward=brightness", "--model.base_steps=3", "--data.prompts=prompts.jsonl",
         "--trainer.default_root_dir=out", "--return_predictions=false", "--trainer.accelerator=cpu", *more]
    )  # fmt: skip


def lines(folder="out/predict"):
    texts = [text for path in sorted(Path(folder).glob("lines_*.jsonl")) for text in path.read_text().splitlines()]
    return sorted(map(json.loads, texts), key=lambda line: line["index"])


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).float()


@pytest.mark.slow
def test_prompts_are_steered_by_a_command_and_gone_on_with(workplace):
    more = ["--data.images_per_prompt=2", "--data.batch_size=2", "--model.held_out={contrast: contrast}"]
    steer = ["--model.method.init_args.grid.steps=4", "--model.reward_scale=20"]
    predict(workplace, "sd3/steer", *more, *steer)
    found = lines()
    assert [(line["prompt_index"], line["number"]) for line in found] == [(p, k) for p in range(3) for k in range(2)]
    assert [line["seed"] for line in found] == [0, 0, 7, 7, 0, 0]
    for line in found:
        image = pixels(Path("out/predict") / line["file"]) / 255
        assert image.shape == (16, 16, 3)
        assert line["rewards"]["brightness"] == pytest.approx(float(image.mean()), abs=3e-3)
        assert line["rewards"]["contrast"] == pytest.approx(float(image.mean(dim=2).std()), abs=2e-2)
        # DPS with guidance by two evaluations: at each of 4 steps two evaluations and their gradient
        assert line["nfe"] == {"network": 4 * 2 * 2, "reward": 4 * 2}
    gain = [line["rewards"]["brightness"] - line["rewards_before"]["brightness"] for line in found]
    assert sum(gain) > 0
    summary = json.loads(Path("out/predict/summary.json").read_text())
    assert (summary["images"], summary["missing"]) == (6, 0)
    assert [row["reward"] for row in summary["rewards"]] == ["brightness", "contrast"]
    assert float(summary["rewards"][0]["difference"].split()[0]) == pytest.approx(sum(gain) / 6, rel=0.02)
    assert Image.open("out/predict/before_after.png").size[0] > 500
    # the base flow's image, by hand: noise by seed and index alone (of a prompt with a seed: by that and the number)
    flow = load_flow(workplace, 16, "float32")
    for index, (seed, number) in {1: (0, 1), 3: (7, 1)}.items():
        (generator,) = sample_generators(seed, [number])
        x0 = torch.randn(flow.state_shape, generator=generator)[None]
        given = flow.encode(found[index]["prompt"])
        with torch.no_grad():
            base = flow.decoder(integrate(lambda t, x, c=given: flow.drift(t, x, c), x0, flow.time_grid(3)))[0]
        stored = pixels(f"out/predict/before/{index:06d}.png") / 255
        assert torch.allclose(stored.permute(2, 0, 1), base, atol=1 / 255)
        assert found[index]["rewards_before"]["brightness"] == pytest.approx(float(build("brightness")(base[None])), abs=1e-5)  # fmt: skip  # noqa: E501
    # a kill: a file and half a line are lost; the same command makes these two alone, as they were
    before = {line["index"]: pixels(Path("out/predict") / line["file"]) for line in found}
    text = Path("out/predict/lines_0.jsonl").read_text().splitlines()
    text[-1] = text[-1][:20]
    Path("out/predict/lines_0.jsonl").write_text("\n".join(text))
    lost = json.loads(text[-1]) if text[-1].endswith("}") else max(before)
    Path("out/predict/000002.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in Path("out/predict").glob("0*.png")}
    predict(workplace, "sd3/steer", *more, *steer)
    assert {path.name for path in times if path.stat().st_mtime_ns != times[path]} == {f"{lost:06d}.png"}
    summary = json.loads(Path("out/predict/summary.json").read_text())
    assert (summary["images"], summary["missing"]) == (6, 0)
    for index, image in before.items():
        assert (pixels(f"out/predict/{index:06d}.png") - image).abs().max() <= 1
    with pytest.raises(ValueError, match="has images of other settings, which differ in guidance"):
        predict(workplace, "sd3/steer", *more, *steer, "--model.guidance=2.0")


@pytest.mark.parametrize(
    ("family", "method", "small"),
    [
        ("sd3", "feynman_kac", ["--model.method.init_args.num_particles=2", "--model.method.init_args.grid.steps=3"]),
        ("flux", "search", ["--model.method.init_args.steps=2"]),
        ("sana", "best_of_n", ["--model.method.init_args.num_candidates=2", "--model.method.init_args.grid.steps=3"]),
    ],
)
def test_other_families_and_methods_by_their_configs(workplace, tmp_path, family, method, small):
    pipe, size = workplace, 64 if family == "sana" else 16
    if family != "sd3":
        build_pipe, words = {"flux": (tiny.flux, encoders.of_flux), "sana": (tiny.sana, encoders.of_gemma)}[family]
        build_pipe(**words(tmp_path / "words")).save_pretrained(tmp_path / "pipe")
        pipe = tmp_path / "pipe"
    command = f"--model.flow.init_args.image_size={size}", "--model.before=false", *small
    predict(pipe, f"{family}/{method}", *command)
    Path("out/predict/000001.png").unlink()
    Path("out/predict/summary.json").unlink()
    predict(pipe, f"{family}/{method}", *command)  # goes on, whatever the method is made of
    assert len(Path("out/predict/lines_0.jsonl").read_text().splitlines()) == 4
    Path("out/predict/summary.json").unlink()
    predict(pipe, f"{family}/{method}", *command)  # nothing is missing but the summary
    assert {line["prompt"] for line in lines()} == {"a red cat", "the dog", "a blue mat"}
    assert json.loads(Path("out/predict/summary.json").read_text())["images"] == 3
    assert not Path("out/predict/before_after.png").exists()


def test_an_evaluators_results_get_into_the_report_with_intervals_over_prompts(workplace, caplog):
    steer = ["--model.method.init_args.grid.steps=2", "--model.before=false", "--data.images_per_prompt=2"]
    predict(workplace, "sd3/steer", *steer, "--model.layout=geneval")
    correct = [[True, True], [False, True], [False, False]]
    rows = [
        {"filename": f"images/{p:05d}/samples/{k:04d}.png", "tag": "t", "correct": correct[p][k]}
        for p in (2, 0, 1)
        for k in (1, 0)
    ]
    Path("results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = ["--model.layout=geneval", "--model.evaluations={GenEval: results.jsonl}"]
    predict(workplace, "sd3/steer", *steer, *read)
    summary = json.loads(Path("out/predict/summary.json").read_text())
    assert summary["evaluations"] == {"GenEval": {"0": 1, "1": 1, "2": 0, "3": 1, "4": 0, "5": 0}}
    row = summary["rewards"][-1]
    # of three prompts' means 1, 0.5 and 0: Student's t with two degrees of freedom
    half = 4.302653 * 0.5 / 3**0.5
    assert (row["reward"], row["images"]) == ("GenEval", 6)
    assert row["mean"] == f"0.5 ({0.5 - half:.3g} to {0.5 + half:.3g})"
    assert "GenEval" in Path("out/predict/rewards.csv").read_text()
    Path("results.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
    predict(workplace, "sd3/steer", *steer, *read)
    assert "GenEval: 1 of 6 images have no row, and do not count" in caplog.text
    Path("results.jsonl").write_text(json.dumps({**rows[0], "filename": "000001.png"}))
    with pytest.raises(ValueError, match="1 of 1 rows are of no image in out/predict"):
        predict(workplace, "sd3/steer", *steer, *read)


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_share_the_images_also_where_there_are_fewer(workplace):
    """As a user starts them; the second run has one image to make, and a rank with nothing to do."""
    given = [
        sys.executable, "-m", "mfm_lightning", "predict",
        "--config", str(ROOT / "configs/text_to_image/sd3/feynman_kac.yaml"),
        f"--model.flow.init_args.name={workplace}", "--model.flow.init_args.image_size=16",
        "--model.flow.init_args.torch_dtype=float32", "--model.reward=brightness", "--model.base_steps=2",
        "--model.method.init_args.num_particles=2", "--model.method.init_args.grid.steps=2",
        "--data.prompts=prompts.jsonl", "--trainer.default_root_dir=out", "--return_predictions=false",
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp",
    ]  # fmt: skip
    subprocess.run(given, check=True, timeout=500)
    assert [line["index"] for line in lines()] == [0, 1, 2]
    assert len(list(Path("out/predict").glob("lines_*.jsonl"))) == 2
    before = pixels("out/predict/000001.png")
    Path("out/predict/000001.png").unlink()
    Path("out/predict/summary.json").unlink()
    subprocess.run(given, check=True, timeout=500)
    assert torch.equal(pixels("out/predict/000001.png"), before)  # whichever rank made it
    assert json.loads(Path("out/predict/summary.json").read_text())["images"] == 3


def test_configs_of_families_differ_in_the_flow_alone():
    for method in ("steer", "search", "best_of_n", "feynman_kac"):
        loaded = []
        for family in ("sd3", "flux", "sana"):
            config = yaml.safe_load((ROOT / f"configs/text_to_image/{family}/{method}.yaml").read_text())
            given = config["model"]["init_args"]
            assert given.pop("flow")["class_path"] == "mfm_lightning.backbones.load_flow"
            given.pop("base_steps")
            if "grid" in given["method"]["init_args"]:
                given["method"]["init_args"]["grid"].pop("steps")
            del config["trainer"]["default_root_dir"]
            loaded.append(config)
        assert loaded[0] == loaded[1] == loaded[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data.prompts=none.txt", "no prompts at none.txt"),
        ("--model.reward=jpeg_compressibility", "differentiates the reward, but 'jpeg_compressibility' is not"),
        (
            "--model.method={class_path: Steering, init_args: {estimator: DrawGradient}}",
            "Steering draws posteriors from the model, and a SD3Flow gives none: give it a posterior",
        ),
        (
            "--model.method={class_path: Steering, init_args: {estimator: FlowMapGradient}}",
            "FlowMapGradient needs a flow map, and a SD3Flow has none: use a method of its drift alone",
        ),
        (
            "--model.held_out={brightness: contrast}",
            "held_out has 'brightness', which is the name of what is optimised",
        ),
        ("--model.evaluations={brightness: prompts.jsonl}", "evaluations has 'brightness', which is the name of a"),
        ("--model.evaluations={GenEval: none.jsonl}", "evaluations, GenEval: no file none.jsonl; run without it"),
        ("--model.base_steps=0", "steps 0 must be at least 1"),
        ("--model.layout=gen", "unknown layout 'gen': expected one of flat, geneval, compbench, unigenbench"),
        ("--model.flow.init_args.true_guidance=2", "true_guidance is FLUX's"),
        ("--model.flow.init_args.name=none/here", "none/here"),
    ],
)
def test_bad_input_is_said_before_any_long_work(workplace, capsys, more, message):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        predict(workplace, "sd3/steer", more)
    assert message in " ".join(f"{error.value} {capsys.readouterr().err}".split())
    assert not list(Path().rglob("*.png"))


@pytest.mark.slow
def test_images_of_a_prompt_are_scored_beside_each_other(workplace):
    more = ["--model.reward=diversity", "--data.images_per_prompt=2", "--model.method.init_args.grid.steps=2"]
    predict(workplace, "sd3/steer", *more, "--data.batch_size=4")
    found = lines()
    assert len(found) == 6
    for first, second in zip(found[::2], found[1::2], strict=True):
        a, b = (pixels(Path("out/predict") / line["file"]) / 255 for line in (first, second))
        wanted = float((a - b).square().mean().sqrt())
        assert first["rewards"]["diversity"] == pytest.approx(wanted, abs=3e-3)
        assert second["rewards"]["diversity"] == pytest.approx(wanted, abs=3e-3)
        assert wanted > 0.01
    # one image is lost: both of its prompt are made again, for they are scored together
    times = {path: path.stat().st_mtime_ns for path in Path("out/predict").glob("0*.png")}
    Path("out/predict/000003.png").unlink()
    predict(workplace, "sd3/steer", *more, "--data.batch_size=4")
    changed = {path.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"000002.png", "000003.png"}
    with pytest.raises(RewardError, match=r"data\.batch_size 3 must be a multiple of data\.images_per_prompt, 2"):
        predict(workplace, "sd3/steer", *more, "--data.batch_size=3", "--trainer.default_root_dir=other")
    assert not Path("other/predict/prompts.json").exists()  # another batch size may follow
    with pytest.raises(RewardError, match=r"and there is one: set data\.images_per_prompt to 2 or more"):
        predict(workplace, "sd3/steer", *more, "--data.images_per_prompt=1", "--trainer.default_root_dir=one")


def test_steering_with_an_adapters_draws(workplace):
    """MFM-G on a flow with an adapter: the images are those of a target of two transformers, made in Python."""
    adapter = stirred(FlowAdapter(str(workplace), rank=2, image_size=16))
    save_network(adapter, Path("mfm.safetensors"))
    gradient = "--model.method.init_args.estimator=mfm_lightning.alignment.DrawGradient"
    options = [gradient, "--model.method.init_args.grid.steps=3", "--model.reward_scale=20"]
    given = ["--model.mfm=mfm.safetensors", "--model.guidance=1.0"]
    predict(workplace, "sd3/steer", *given, *options)
    flow, found = load_flow(workplace, 16, "float32"), lines()
    assert [line["prompt"] for line in found] == ["a red cat", "the dog", "a blue mat"]
    x0 = torch.randn(1, *flow.state_shape, generator=sample_generators(7, [0])[0])
    model = MetaFlowMap(adapter)
    model.time_grid = flow.time_grid
    conditions = flow.encode("the dog", guidance=1.0)
    target = Target(model, build("brightness"), flow.decoder, conditions, reward_scale=20, drift=flow.drift)
    result = Steering(DrawGradient(), grid=TimeGrid(3, of_model=True), clip=0.5)(
        target, x0, sample_generators((7, 1), [0])
    )
    stored = pixels(Path("out/predict") / found[1]["file"]) / 255
    assert (result.images[0] - stored.permute(2, 0, 1)).abs().max() < 1 / 255
    assert found[1]["nfe"] == {"network": result.nfe.network, "reward": result.nfe.reward}
    method = Steering(DrawGradient(), grid=TimeGrid(3, of_model=True))
    with pytest.raises(CheckpointError, match="draws posteriors from the model, and a SD3Flow gives none"):
        PromptAlignment(flow, "brightness", method)
    with pytest.raises(ValueError, match=r"guidance 7 is not a scale that this network knows: \[1.0\]"):
        PromptAlignment(flow, "brightness", method, mfm="mfm.safetensors")
