"""A run of two ranks that goes on with one: the same samples a step where the data allow it, and a line where not."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from mfm_lightning.commands.main import run
from mfm_lightning.modules import MFMPretraining
from tests.inputs.tiny_runs import CONFIG
from tests.latent_data import shards
from tests.processes import torchrun

GOES_ON = "the order of batches goes on exactly: 8 samples a step, by 1 ranks with 8 each, before by 2 with 4"
ANOTHER = "the order of batches is another one than before, for it went from batch_size 4 to 8, world_size 2 to 1"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Sixty digits in class folders, shards of latents, and configs of both; each rank notes its steps' samples."""
    monkeypatch.chdir(tmp_path)
    digits: Any = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:60], digits.target[:60], strict=True)):
        path = Path(f"pictures/{label}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    shards(tmp_path / "shards", [7, 12, 9, 20, 6], num_classes=10, state_shape=(1, 8, 8))
    data = {
        "images": {"class_path": "mfm_lightning.data.ImageDataModule", "init_args": {"source": "pictures"}},
        "shards": {
            "class_path": "mfm_lightning.data.LatentShards",
            "init_args": {"folder": "shards", "num_workers": 1, "val_shards": 1},
        },
    }
    for name, given in data.items():
        given["init_args"]["batch_size"] = 4
        config = {**CONFIG, "data": given, "checkpoint": {"every_n_steps": 100}}
        config["trainer"] = {**CONFIG["trainer"], "logger": False, "limit_val_batches": 0}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    step = MFMPretraining.training_step

    def noted(self, batch, batch_idx):
        found = [round(float(x), 3) for x in batch[0].double().flatten(1).mean(dim=1)]
        with open(f"{self.trainer.default_root_dir}_{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([self.global_step, found]) + "\n")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MFMPretraining, "training_step", noted)
    return tmp_path


def seen(folder: str) -> dict[int, list[float]]:
    """The samples of each step on all ranks."""
    found: dict[int, list[float]] = {}
    for path in Path().glob(f"{folder}_*.jsonl"):
        for step, samples in map(json.loads, path.read_text().splitlines()):
            found[step] = sorted(found.get(step, []) + samples)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more", "level", "message"),
    [
        ("images", [], logging.INFO, GOES_ON),
        (
            "images",
            ["--data.init_args.mirror=true"],
            logging.WARNING,
            f"{GOES_ON}; which of them are mirrored is another",
        ),
        ("shards", [], logging.WARNING, ANOTHER),
    ],
)
def test_two_ranks_then_one(workplace, caplog, kind, more, level, message):
    fit = ["fit", f"--config={kind}.yaml", *more]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    torchrun(workplace, 2, *fit, *two, "--trainer.max_steps=6", "--trainer.default_root_dir=whole")
    torchrun(workplace, 2, *fit, *two, "--trainer.max_steps=3", "--trainer.default_root_dir=parts")
    caplog.set_level("INFO")
    one = ["--data.init_args.batch_size=8", "--ckpt_path=last"]
    run([*fit, *one, "--trainer.max_steps=6", "--trainer.default_root_dir=parts"])
    found = [record for record in caplog.records if message in record.getMessage()]
    assert [record.levelno for record in found] == [level], caplog.text
    assert "goes on with 1 rank, before with 2: noise is drawn anew from here" in caplog.text
    whole, parts = seen("whole"), seen("parts")
    assert sorted(parts) == sorted(whole) == list(range(6))
    assert [len(samples) for samples in parts.values()] == [8] * 6
    same = [parts[step] == whole[step] for step in range(6)]
    # a mirrored image has the mean of the image
    assert same == [True] * 6 if kind == "images" else not all(same)


@pytest.mark.slow
def test_another_number_of_samples_a_step_is_said(workplace, caplog):
    fit = ["fit", "--config=images.yaml", "--trainer.default_root_dir=parts"]
    torchrun(workplace, 2, *fit, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2")
    run([*fit, "--trainer.max_steps=4", "--ckpt_path=last"])
    assert "the order of batches is another one than before, for it went from world_size 2 to 1" in caplog.text
