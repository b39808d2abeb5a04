"""The commands of README and docs/commands.md, and the README's Python, in their order."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mfm_lightning.commands.main import run
from tests.short_jobs import short

ROOT = Path(__file__).parents[2]


def written_by_test_and_predict():
    """Of `mfm test` and `mfm predict` with configs/digits/mfm.yaml."""
    rows = json.loads(Path("outputs/digits/mfm/test/frechet.json").read_text())
    assert {"MFM, refinement 1", "MFM, refinement 4", "posterior, MFM 1"} <= {row["samples"] for row in rows}
    held_out = next(row for row in rows if row["samples"].startswith("held-out"))
    assert held_out["as labelled"] > 0.95  # the classifier's accuracy
    assert all(row["Fréchet"] > 3 * held_out["Fréchet"] for row in rows if row is not held_out)  # four steps: noise
    assert len(list(Path("outputs/digits/mfm/test").glob("*.png"))) == 5
    saved = load_file("outputs/digits/mfm/predict/batch_0000.safetensors")
    assert saved["draws/t=0.2"].shape == (len(saved["x1"]), 8, 1, 8, 8)


@pytest.mark.slow
def test_commands_and_python_work_as_written(folder, fitted, capsys):
    """`mfm` commands with a config of the folder, each once, made short; then the Python of README and methods.md."""
    pages = {name: (ROOT / name).read_text() for name in ("docs/commands.md", "README.md", "docs/methods.md")}
    lines = re.findall(r"^mfm \w+ --config configs/(?!imagenet).*", "\n".join(pages.values()), re.MULTILINE)
    commands = [command.split() for command in dict.fromkeys(line.split("#")[0].strip() for line in lines)]
    assert [c[1] for c in commands[:4]] == ["fit", "fit", "test", "predict"]
    assert len(commands) >= 11
    for command in commands:
        name, config = command[1], command[3].removeprefix("configs/").removesuffix(".yaml")
        if name == "fit" and not command[4:]:
            fitted(config)  # by the same command
        else:
            run([*short(name, config), *command[4:]])
    written_by_test_and_predict()
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", pages["README.md"] + pages["docs/methods.md"], re.DOTALL):
        exec(block, namespace)
    assert Path("steered.png").stat().st_size > 100
    assert namespace["result"].rewards.shape == (16,)
    run([*short("validate", "digits/mfm"), "--ckpt_path", "outputs/digits/mfm/last.ckpt"])
    assert "val/loss" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reward_of_readme_steers(folder):
    """The reward of README in its file, with README's command, made short: upper halves become brighter."""
    text = (ROOT / "README.md").read_text()
    for name in ("top_heavy", "my_rewards"):  # names of this test alone: the process may have run README's Python
        text = text.replace(name, f"{name}_of_a_file")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "register" in block)
    Path("my_rewards_of_a_file.py").write_text(code)
    command = next(line.split() for line in text.splitlines() if line.startswith("mfm predict --config mnist/steer"))
    run([*command[1:], "--data.num_samples", "8", "--model.method.grid.steps", "10", "--model.base_steps", "10"])
    found = json.loads(Path("outputs/mnist/steer/predict/summary.json").read_text())
    assert found["mean_reward"] > found["mean_reward_before"] + 0.02


def test_commands_of_readme_are_those_of_the_pages():
    """What a page explains, and its test runs, is what README says."""
    text = (ROOT / "README.md").read_text()
    commands = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("mfm ")]
    assert len(commands) == 7
    pages = "\n".join((ROOT / f"docs/{name}.md").read_text() for name in ("own_data", "text_to_image"))
    for command in commands[1:4]:
        assert command.replace(" --data.source FOLDER", "") in pages, command
    assert [command.removeprefix("mfm benchmark ") for command in commands[4:]] == ["gmm", "mnist", "imagenet256"]
