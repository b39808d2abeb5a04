"""`mfm data`: counts and picture of a config, against what was put in the folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mfm_lightning.commands.data import data
from mfm_lightning.commands.errors import CommandLineError
from mfm_lightning.commands.main import call

IMAGES = "mfm_lightning.data.ImageDataModule"


def config(folder: Path, **section) -> str:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(section))
    return str(path)


def images(root: Path, **counts: int) -> Path:
    for name, number in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(np.full((12, 10 + i % 2, 3), 20 * i, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_it_shows_counts_sizes_and_a_batch(tmp_path, capsys):
    root = images(tmp_path / "x", cat=10, dog=5)
    section = {
        "class_path": IMAGES,
        "init_args": {"source": str(root), "size": 8, "batch_size": 11, "val_fraction": 0.2, "test_fraction": 0},
    }
    path = config(tmp_path, data=section)
    call(data, "data", ["--config", path, "--output", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().out.split())
    assert "15 images of 2 classes: 0 cat, 1 dog" in said
    assert "15 of the images: 10 x 12 colour (8), 11 x 12 colour (7)" in said
    assert "states 3 x 8 x 8, 2 classes, batches of 11" in said
    rows = json.loads((tmp_path / "out/classes.json").read_text())
    assert rows == [
        {"label": 0, "name": "cat", "train": 8, "val": 2, "test": 2},
        {"label": 1, "name": "dog", "train": 4, "val": 1, "test": 1},
    ]
    picture = Image.open(tmp_path / "out/batch.png")
    assert min(picture.size) > 100
    assert len(picture.convert("L").getcolors()) > 10


def test_a_source_in_place_of_the_configs_own(tmp_path, capsys):
    """Of a packaged config, whose own folder is not there; and of data that have no such option."""
    root = images(tmp_path / "x", cat=10, dog=5, owl=7)
    call(data, "data", ["--config", "pictures/mfm", "--source", str(root), "--output", str(tmp_path / "out")])
    assert "22 images of 3 classes: 0 cat, 1 dog, 2 owl" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(CommandLineError, match="give --config, too"):
        call(data, "data", ["--source", str(root), "--prompts", "geneval"])
    with pytest.raises(ValueError, match=r"gmm/mfm\.yaml.*source"):
        call(data, "data", ["--config", "gmm/mfm", "--source", str(root)])


def test_it_shows_other_data(tmp_path, capsys, uneven, made):
    for name in ("digits/flow", "digits/finetune", "gmm/mfm"):
        call(data, "data", ["--config", name, "--output", str(tmp_path / name)])
    rows = json.loads((tmp_path / "digits/finetune/classes.json").read_text())
    assert sum(row["train"] + row["val"] + row["test"] for row in rows) == 1797
    assert "no picture: states of shape (2,)" in capsys.readouterr().out
    section = {"class_path": "mfm_lightning.data.LatentShards", "init_args": {"folder": str(made / "shards")}}
    section["init_args"] |= {"batch_size": 4, "num_workers": 0}
    call(data, "data", ["--config", config(tmp_path, data=section), "--output", str(tmp_path / "latents")])
    rows = json.loads((tmp_path / "latents/classes.json").read_text())
    assert sum(row["train"] + row["val"] for row in rows) == 18
    assert "need a decoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "has no data section"),
        ({"data": {"class_path": IMAGES, "init_args": {"sorce": "x"}}}, "sorce"),
        (
            {"data": {"class_path": IMAGES, "init_args": {"source": "x"}}},
            "no images at x",
        ),
        (
            {"data": {"class_path": "mfm_lightning.data.NoiseDataModule", "init_args": {"state_shape": [1, 8, 8]}}},
            "NoiseDataModule has no training batches",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(section, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, trainer={}, **section)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(data, "data", ["--config", path])
    assert message in str(caught.value)
