"""The README's commands and its Python, in its order."""

import re
from pathlib import Path

import pytest

from mfm_lightning.commands.main import run
from tests.short_jobs import short

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_readme_works_as_written(folder, digits_outputs, capsys):
    """Its `mfm` commands in their order, made short, then its Python, all of it, in one session."""
    readme = (ROOT / "README.md").read_text()
    lines = [line for line in readme.splitlines() if re.match(r"mfm \w+ --config configs/(?!imagenet)", line)]
    commands = [line.split("#")[0].split() for line in lines]
    assert [c[1] for c in commands[:4]] == ["fit", "fit", "test", "predict"]
    for command in commands:
        name, config = command[1], command[3].removeprefix("configs/").removesuffix(".yaml")
        made = name == "fit" and Path(f"outputs/{config}").exists()  # by `digits_outputs`, with the same command
        if not made:
            run([*short(name, config), *command[4:]])
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, namespace)
    assert namespace["draws"].shape == (4, 8, 1, 28, 28)
    assert Path("steered.png").stat().st_size > 100
    assert namespace["result"].rewards.shape == (16,)
    run([*short("validate", "digits/mfm"), "--ckpt_path", "outputs/digits/mfm/last.ckpt"])
    assert "val/loss" in capsys.readouterr().out
