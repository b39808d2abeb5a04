"""docs/own_data.md as written: its commands in their order, on digits in class folders, and its YAML."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from mfm_lightning.commands.data import data
from mfm_lightning.commands.data_report import data_of_config
from mfm_lightning.commands.main import call, run, spelled
from mfm_lightning.networks import DiT
from tests.data.test_latent_files import edm2
from tests.data.web_shards import sample, write

PAGE = (Path(__file__).parents[2] / "docs/own_data.md").read_text()
SHORT = {
    "fit": ["--trainer.max_steps=4", "--trainer.val_check_interval=4"],
    "predict": ["--model.init_args.method.init_args.grid.steps=3", "--model.init_args.base_steps=5"],
}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """`pictures/` of 200 digits, in the current folder."""
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:200], digits.target[:200], strict=True)):
        path = Path(f"pictures/{label}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
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
    assert Path("outputs/pictures/steer/predict/before_after.png").is_file()
    assert json.loads(Path("outputs/pictures/steer/predict/summary.json").read_text())["samples"] == 32
    assert list(Path("outputs/pictures/mfm").rglob("samples.png"))
    evaluation = "--model.init_args.evaluation.init_args"
    few = [f"{evaluation}.num_samples=32", f"{evaluation}.ode_steps=3", f"{evaluation}.glass_steps=2"]
    run(["test", "--config", "pictures/mfm", "--ckpt_path", "outputs/pictures/mfm/last.ckpt", *few])
    assert list(Path("outputs/pictures/mfm").rglob("frechet.json"))


def test_the_source_with_options_is_one_of_the_data_module(tmp_path):
    from mfm_lightning.data.images import TorchvisionImages

    text = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if block.startswith("source:"))
    section = {"class_path": "mfm_lightning.data.ImageDataModule", "init_args": yaml.safe_load(text)}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": section}))
    source = data_of_config(tmp_path / "a.yaml").sources["train"]
    assert isinstance(source, TorchvisionImages)
    assert (source.name, source.root, source.download) == ("MNIST", "data", True)


def block(word: str) -> dict:
    """The YAML of the page that names this."""
    return yaml.safe_load(next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if word in text))


def test_shards_of_others_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(["train-000", "train-001", "train-002", "train-003", "val"]):
        write(tmp_path / f"shards/{name}.tar", [sample(i) for i in range(20 * k, 20 * k + 20)])
    Path("a.yaml").write_text(yaml.safe_dump(block("WebDatasetDataModule")))
    data = data_of_config(Path("a.yaml"))
    assert (data.state_shape, data.num_classes, data.num_samples) == ((3, 16, 16), 3, 80)
    assert data.train_batch(0)[0].shape == (64, 3, 16, 16)
    assert sum(len(x) for x, _ in data.val_dataloader()) == 20


@pytest.mark.parametrize("zipped", [False, True])
def test_latents_of_others_as_written(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    found = edm2(tmp_path / "latents", 160, zipped=zipped)
    section = block("LatentDataModule")
    section["data"]["init_args"]["source"] = found if zipped else section["data"]["init_args"]["source"]
    Path("a.yaml").write_text(yaml.safe_dump(section))
    x, label = data_of_config(Path("a.yaml")).train_batch(0)
    i = (x.mean(dim=(1, 2, 3)) / 0.18215).round().int()
    assert (i % 3).tolist() == label.tolist()
    assert i.unique().numel() == 64


def test_a_size_by_name_as_written():
    network = block("DiT.B")["network"]
    with torch.device("meta"):
        made = DiT.B((4, 32, 32), num_classes=10, **network["init_args"])
    assert network["class_path"] == "mfm_lightning.networks.DiT.B"
    assert (made.patch_size, made.config["hidden_size"]) == (2, 768)


def test_scales_of_edm2_are_those_of_its_encoder():
    """0.5 over `raw_std` of its StabilityVAEEncoder."""
    row = next(line for line in PAGE.splitlines() if line.startswith("| EDM2"))
    shift, scale = (json.loads(numbers) for numbers in re.findall(r"\[.*?\]", row))
    np.testing.assert_allclose(scale, 0.5 / np.array([4.17, 4.62, 3.71, 3.28]), atol=5e-5)
    assert shift == [5.81, 3.25, 0.12, -2.15]
