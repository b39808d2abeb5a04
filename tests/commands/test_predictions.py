"""`mfm predict` writes files, and keeps no predictions in memory unless it is asked to."""

from functools import wraps

import pytest
import yaml

from mfm_lightning.commands.main import run
from tests.short_jobs import short


@pytest.mark.parametrize(("given", "kept"), [([], False), (["--return_predictions", "true"], True)])
def test_predictions_are_kept_where_it_is_asked_for(folder, monkeypatch, given, kept):
    from lightning.pytorch import Trainer

    asked = []
    ours = Trainer.predict

    @wraps(ours)  # the options of the command are its signature
    def predict(*args, **kwargs):
        asked.append(kwargs)
        return ours(*args, **kwargs)

    monkeypatch.setattr(Trainer, "predict", predict)
    run([*short("predict", "mnist/steer"), *given])
    assert [kwargs["return_predictions"] for kwargs in asked] == [kept]
    config = yaml.safe_load((folder / "outputs/mnist/steer/predict/config.yaml").read_text())
    assert config["return_predictions"] is kept
