"""Pictures of what a model draws, on data whose numbers of classes are at the ends."""

import csv
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mfm_lightning.data.base import ArrayDataModule
from mfm_lightning.evaluation import ImageEvaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT


class Dots(ArrayDataModule):
    state_shape, num_classes = (1, 4, 4), 1

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.splits = {"test": (torch.rand(6, 1, 4, 4), torch.arange(6) % num_classes)}

    def train_batch(self, step):
        return self.splits["test"]


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("refinement_steps", [[2], []])
def test_one_class_a_row(tmp_path, num_classes, refinement_steps):
    model = MetaFlowMap(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=num_classes))
    trainer = SimpleNamespace(datamodule=Dots(num_classes))
    module = SimpleNamespace(model=model, teacher=None, device=torch.device("cpu"), trainer=trainer)
    ImageEvaluation(refinement_steps=refinement_steps, ode_steps=2, picture_times=[0.5]).draw(module, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"samples.png", "posterior_t0.5.png"} if refinement_steps else {"samples.png"})
    width, height = Image.open(tmp_path / "samples.png").size
    assert width / height > 10 / num_classes * 0.5


def test_without_classes_on_labelled_data(tmp_path):
    """A network without classes is drawn without labels; the data's classes only make the features."""
    data = Dots(3)
    x, y = torch.rand(60, 1, 4, 4) * 2 - 1, torch.arange(60) % 3
    data.splits = dict.fromkeys(("train", "val", "test"), (x, y))
    module = SimpleNamespace(
        model=MetaFlowMap(DiT(4, 2, 1, 16, 2, 2, 1, num_classes=0)), teacher=None, device=torch.device("cpu"),
        trainer=SimpleNamespace(datamodule=data), log=lambda *_, **__: None,
    )  # fmt: skip
    evaluation = ImageEvaluation(num_samples=20, refinement_steps=[1], ode_steps=2, times=[0.5], glass_steps=2)
    evaluation.measure(module, tmp_path)
    evaluation.draw(module, tmp_path)
    header, *rows = (tmp_path / "frechet.csv").read_text().splitlines()
    assert header == "samples,t,evaluations,Fréchet,low,high,over the flow's"
    assert len(rows) == 5  # held-out images, the ODE, one step, and two kinds of draws
    found = list(csv.DictReader([header, *rows]))
    assert [row["low"] == "" for row in found] == [True, False, False, False, False]
    for row, flow in ((found[2], found[1]), (found[4], found[3])):
        ratio = float(row["over the flow's"].split()[0])
        assert ratio == pytest.approx(float(row["Fréchet"]) / float(flow["Fréchet"]), rel=0.01)
        assert float(row["low"]) < float(row["Fréchet"]) < float(row["high"])
    assert [bool(row["over the flow's"]) for row in found] == [False, False, True, False, True]
    assert (tmp_path / "samples.png").is_file()
