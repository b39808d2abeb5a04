"""Numbers that say what they are of: whose data, sums or means, from the store, and features that are kept."""

import json
import logging
import re
import shutil

import pytest
import torch

from mfm_lightning.commands.main import run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data.digits import DigitsDataModule
from mfm_lightning.metrics.classifier import fitted_features
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import MLP
from mfm_lightning.objectives import Objective, WeightedTerm
from tests.short_jobs import short


class Other(DigitsDataModule):
    """Data of somebody else."""

    name = None


@pytest.mark.long
def test_features_of_the_training_images_are_kept_and_said(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 2
    path = tmp_path / "features.safetensors"
    first, fitted = fitted_features(images, labels, 2, path)
    features = first.features(images).double()
    torch.testing.assert_close(fitted.mean, features.mean(0))
    torch.testing.assert_close(fitted.root @ fitted.root, torch.cov(features.T), atol=1e-9, rtol=1e-6)
    assert f"kept in {path}" in caplog.text
    caplog.clear()
    again, same = fitted_features(images, labels, 2, path)
    assert f"from {path}" in caplog.text
    assert torch.equal(again.features(images), first.features(images))
    assert torch.equal(same.mean, fitted.mean)
    for changed in ((images.flip(0), labels), (images, 1 - labels), (images[:60], labels[:60])):
        caplog.clear()
        fitted_features(*changed, 2, path)
        assert "from" not in caplog.text.replace(str(path), "")
    path.write_bytes(path.read_bytes()[:100])
    caplog.clear()
    fitted_features(images, labels, 2, path)
    assert "kept in" in caplog.text


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 4, 4)])
def test_the_mean_squared_error_is_a_coordinates(shape):
    """Beside the loss, a sum over the coordinates: by 2 terms of known residuals."""
    from math import prod

    torch.manual_seed(0)
    objective = Objective([WeightedTerm("data_diagonal", p=0.0), WeightedTerm("mean_flow", weight=3.0, p=0.0)])
    x1 = torch.randn(16, prod(shape))
    found = objective(MetaFlowMap(MLP(prod(shape), 16, 1)), None, x1, Conditions(label=0))
    both = found["error/data_diagonal"], found["error/mean_flow"]
    torch.testing.assert_close(found["loss"], both[0] + 3 * both[1])
    torch.testing.assert_close(found["mse"], (both[0] + both[1]) / 2 / prod(shape))


@pytest.mark.long
@pytest.mark.slow
def test_the_test_names_its_data_and_the_bar_an_error_a_coordinate(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    options = [
        "--trainer.default_root_dir",
        "run",
        "--trainer.log_every_n_steps",
        "1",
        *short("fit", "digits/flow")[3:],
    ]
    run(["fit", "--config", "digits/flow", *options])
    bar = re.search(r"train/loss ([\d.]+), train/mse ([\d.]+)", caplog.text)
    assert bar is not None
    assert float(bar[1]) == pytest.approx(64 * float(bar[2]), rel=0.01)  # 8x8 pixels
    tests = ["test", "--config", "digits/flow", *options, "--ckpt_path", "run/last.ckpt"]
    for data, name in (("mfm_lightning.data.DigitsDataModule", "digits"), (f"{__name__}.Other", "Other")):
        shutil.rmtree("run/test", ignore_errors=True)
        run([*tests, "--data", data])
        rows = json.loads((tmp_path / "run/test/frechet.json").read_text())
        assert rows[0]["samples"] == f"held-out {name}"
