"""docs/own_data.md as written: its YAML files and its commands in their order, on digits in class folders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from mfm_lightning.commands.data import data
from mfm_lightning.commands.main import call, run, spelled

PAGE = (Path(__file__).parents[2] / "docs/own_data.md").read_text()
SHORT = {
    "fit": ["--trainer.max_steps=4", "--trainer.val_check_interval=4"],
    "predict": ["--model.init_args.method.init_args.grid.steps=3", "--model.init_args.base_steps=5"],
}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """`pictures/` of 200 digits, the page's configs beside it, as the current folder."""
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:200], digits.target[:200], strict=True)):
        path = Path(f"pictures/{label}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    for name, text in re.findall(r"`(\w+\.yaml)`[^`]*```yaml\n(.*?)```", PAGE, re.DOTALL):
        Path(name).write_text(text)
    return tmp_path


def commands() -> list[list[str]]:
    return [line.split() for line in re.findall(r"^mfm (.*)$", PAGE, re.MULTILINE)]


@pytest.mark.slow
def test_the_page_works_as_written(pictures):
    assert [command[0] for command in commands()] == ["data", "fit", "sample", "predict"]
    for name, *options in commands():
        if name == "data":  # by itself: the command is there once the package is installed again
            call(data, name, spelled(options))
        else:
            run([name, *options, *SHORT.get(name, [])])
    rows = json.loads(Path("outputs/data/classes.json").read_text())
    assert sum(row["train"] + row["val"] + row["test"] for row in rows) == 200
    assert Path("outputs/data/batch.png").is_file()
    assert len(list(Path("samples").glob("*.png"))) == 64
    assert Image.open(next(Path("samples").glob("*.png"))).size == (16, 16)
    assert Path("outputs/steer/predict/before_after.png").is_file()
    assert json.loads(Path("outputs/steer/predict/summary.json").read_text())["samples"] == 32
    assert list(Path("outputs/pictures").rglob("samples.png"))
    evaluation = "--model.init_args.evaluation.init_args"
    few = [f"{evaluation}.num_samples=32", f"{evaluation}.ode_steps=3", f"{evaluation}.glass_steps=2"]
    run(["test", "--config", "pictures.yaml", "--ckpt_path", "outputs/pictures/last.ckpt", *few])
    assert list(Path("outputs/pictures").rglob("frechet.json"))


def test_the_source_with_options_is_one_of_the_data_module(tmp_path):
    from mfm_lightning.commands.data_report import data_of_config
    from mfm_lightning.data.images import TorchvisionImages

    text = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if block.startswith("source:"))
    section = {"class_path": "mfm_lightning.data.ImageDataModule", "init_args": yaml.safe_load(text)}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": section}))
    source = data_of_config(tmp_path / "a.yaml").sources["train"]
    assert isinstance(source, TorchvisionImages)
    assert (source.name, source.root, source.download) == ("MNIST", "data", True)
