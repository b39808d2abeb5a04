"""Each preference reward through the command line: steering, search, fine-tuning, a benchmark, scoring and checking."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mfm_rewards
from mfm_lightning.checkpoints import load_model
from mfm_lightning.commands.main import main
from mfm_rewards.prompts import class_prompts

ROOT = Path(__file__).parents[2]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPT = "a photograph of the digit {class}"


@pytest.fixture
def folder(folder):
    """With a file of class names, too."""
    (folder / "digits.txt").write_text("# names by label\n" + "\n".join(DIGITS))
    return folder


def target(name: str, options: dict, prompts: str | None = PROMPT, class_names: str | None = "digits.txt") -> list[str]:
    """What a user adds to a config to align to this reward."""
    prefix = "--model.init_args.target"
    reward = yaml.safe_dump({"name": name, **options}, default_flow_style=True, width=10_000).strip()
    given = {"reward": reward, "prompts": prompts, "class_names": class_names}
    return [f"{prefix}.{key}={value}" for key, value in given.items() if value is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "aesthetic", "image_reward"])
def test_steering_search_and_finetuning(tiny, folder, name):
    data = ["--data.init_args.num_samples=4", "--data.init_args.labels=[3, 7]", "--return_predictions=false"]
    steer = ["predict", "--config", "configs/digits/steer.yaml", *target(name, tiny[name]), *data]
    method = "--model.init_args.method"
    search = [f"{method}=mfm_lightning.alignment.Search", f"{method}.init_args.num_particles=2"]
    search += [f"{method}.init_args.num_draws=2", f"{method}.init_args.steps=2", "--trainer.default_root_dir=search"]
    reward = mfm_rewards.build(name, **tiny[name])
    for options, output in (([f"{method}.init_args.grid.steps=3"], "outputs/digits/steer"), (search, "search")):
        main([*steer, *options])
        found = load_file(f"{output}/predict/batch_0000.safetensors")
        images = found["images"]
        prompts = [class_prompts(PROMPT, DIGITS)[label] for label in (3, 7, 3, 7)]
        with torch.no_grad():  # the rewards of these images with the prompts of their classes
            expected = mfm_rewards.evaluate(reward, images, prompts)
        torch.testing.assert_close(found["rewards"], expected, rtol=1e-3, atol=1e-5)
        assert json.loads(Path(f"{output}/predict/summary.json").read_text())["reward"]["name"] == name
    evaluation, module = "--model.init_args.evaluation.init_args", "--data.init_args"
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", f"{module}.data.init_args.batch_size=8"]
    short += [f"{module}.buffer_size=16", f"{module}.ode_steps=2", f"{evaluation}.num_samples=4"]
    short += [f"{evaluation}.likeness=false", f"{evaluation}.ode_steps=2", f"{evaluation}.pictures=2"]
    main(["fit", "--config", "configs/digits/finetune.yaml", *target(name, tiny[name]), *short])
    before, after = (load_model(f"outputs/digits/{job}/model.safetensors") for job in ("mfm", "finetune"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    if name == "hpsv2":  # a run is not gone on with towards something else
        other = target(name, tiny[name], prompts="a drawing of the digit {class}")
        goes_on = ["--trainer.max_steps=3", "--ckpt_path=outputs/digits/finetune/last.ckpt"]
        with pytest.raises(SystemExit, match="a drawing of the digit"):
            main(["fit", "--config", "configs/digits/finetune.yaml", *other, *short, *goes_on])


@pytest.mark.slow
def test_a_benchmark_of_all(tiny, folder):
    settings = {
        "model": {
            "file": "outputs/digits/mfm/model.safetensors",
            "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"},
            "labels": [3, 7],
            "prompts": PROMPT,
            "class_names": "digits.txt",
        },
        "rewards": {name: {"reward": {"name": name, **options}} for name, options in tiny.items()},
        "methods": {
            "MFM-G": {"method": {"class_path": "Steering", "init_args": {"grid": {"steps": 2}}}},
            "MFM-Search": {"method": {"class_path": "Search", "init_args": {"num_particles": 2, "steps": 2}}},
        },
        "best_of_n": {"numbers": [1, 3], "steps": 2},
        "scales": [1.0],
        "num_samples": 4,
    }
    Path("zoo.yaml").write_text(yaml.safe_dump(settings))
    main(["benchmark", "alignment", "--config", "zoo.yaml", "--output", "zoo"])
    with open("zoo/report/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["reward"] for row in rows} == set(tiny)
    assert {row["method"] for row in rows} == {"MFM-G", "MFM-Search", "Best-of-N"}
    assert not json.loads(Path("zoo/report/environment.json").read_text())["failures"]


def test_scoring_showing_and_checking(tiny, folder, capsys):
    def scores() -> dict[str, float]:
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
        return {words[1]: float(words[3]) for words in lines}

    for i in range(3):
        Image.fromarray(torch.randint(256, (20 + i, 24, 3), dtype=torch.uint8).numpy()).save(f"{i}.png")
    Path("pictures").mkdir()
    for i in range(3):  # not square
        Image.fromarray(torch.randint(256, (40, 90, 3), dtype=torch.uint8).numpy()).save(f"pictures/{i}.png")
    options = [f"--option={key}={value}" for key, value in tiny["hpsv2"].items()]
    score = ["rewards", "--score", "hpsv2", "--images", ".", *options]
    main([*score, "--prompt", "a photo of a {class}", "--label", "281"])
    scored = scores()
    Path("prompts.json").write_text(json.dumps({f"{i}.png": "a photo of a tabby cat" for i in range(3)}))
    main([*score, "--prompts", "prompts.json"])
    assert scored == scores()
    assert len(set(scored.values())) == 3
    Path("prompts.json").write_text('{"0.png": "a"}')
    Path("list.json").write_text('["a", "b", "c"]')
    Path("broken.json").write_text("{")
    for arguments, message in (
        (["--prompts", "list.json"], r"list\.json must be an object of a text for each file"),
        (["--prompts", "broken.json"], r"broken\.json is no JSON"),
        (["--prompts", "prompts.json"], r"prompts\.json has no prompt for 2 images, first 1\.png"),
        (["--prompt", "a {class}"], r"needs --label, in 0\.\.999"),
        ([], "needs prompts"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*score, *arguments])
    main(["rewards", "--show", "image_reward"])
    shown = capsys.readouterr().out
    for what in (
        "Apache-2.0",
        "hf download THUDM/ImageReward ImageReward.pt",
        "execution.checkpoint_activations: bool = False",
    ):
        assert what in " ".join(shown.split())
    main(["rewards", "--check", "hpsv2", *options])
    assert capsys.readouterr().out.count("passed") == 8
    main(["rewards", "--check", "hpsv2", "--images", "pictures", "--prompt", "a cat", *options])
    assert capsys.readouterr().out.count("passed") == 8
    with pytest.raises(SystemExit, match=r"1\.png has shape .*, 0\.png .* a batch of one size"):
        main(["rewards", "--check", "hpsv2", "--images", ".", *options])
    Path("mine.py").write_text(
        "import mfm_rewards\nmfm_rewards.register('half', lambda images: images[:1].mean((1, 2, 3)))\n"
    )
    sys.path.insert(0, str(folder))
    try:
        import mine  # noqa: F401

        with pytest.raises(SystemExit) as stopped:
            main(["rewards", "--check", "half"])
    finally:
        sys.path.remove(str(folder))
        mfm_rewards.registry._FACTORIES.pop("half", None)
    assert stopped.value.code == 1
    assert re.search(r"returned shape[\s│]+\(1,\)[\s│]+for[\s│]+4", capsys.readouterr().out)


def test_templates_are_checked_before_any_work(tiny, folder):
    Path("two.txt").write_text("a\nb\n")
    for prompts, names, message in (
        (PROMPT, "two.txt", r"^mfm: ValueError: 2 class names, two\.txt, for a model of 10 classes$"),
        (PROMPT, None, r"1000 class names, ImageNet's \(set target\.class_names\), for a model of 10 classes$"),
        (PROMPT, "none.txt", r"no class names at none\.txt$"),
        ("a cat", "two.txt", r"class_names is for prompts with \{class\}, got 'a cat'$"),
        (None, None, r"needs prompts: set target\.prompts$"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["predict", "--config", "configs/digits/steer.yaml", *target("hpsv2", tiny["hpsv2"], prompts, names)])
