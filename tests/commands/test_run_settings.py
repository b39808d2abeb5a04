"""What a run has when its config does not say: the trainer's settings, callbacks and loggers; and where configs are."""

import itertools
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar, ThroughputMonitor
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from mfm_lightning.callbacks import (
    EMA,
    ExportModel,
    LastCheckpoint,
    PlainProgress,
    RunRecord,
    SampleFID,
    StepProgressBar,
    TrainingThroughput,
    progress,
)
from mfm_lightning.commands import fit
from mfm_lightning.commands.config_plan import plan_config
from mfm_lightning.commands.fit import MFMCLI
from mfm_lightning.commands.main import run
from mfm_lightning.utils import configs
from mfm_lightning.utils.configs import default_settings, find_config
from mfm_lightning.utils.console import duration

ROOT = Path(__file__).parents[2]
EMA_PATH, FID_PATH = "mfm_lightning.callbacks.EMA", "mfm_lightning.callbacks.SampleFID"


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """The trainer of a config, whose model and data need no files, with more options; nothing is run."""
    monkeypatch.setattr(sys, "argv", ["mfm"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MFMCLI, "_run_subcommand", lambda self, subcommand: None)

    def trainer(name, *options, subcommand="fit"):
        settings = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        for key, kind in {"model": "BoringModel", "data": "BoringDataModule"}.items():
            settings[key] = {"class_path": f"lightning.pytorch.demos.boring_classes.{kind}"}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
        return run([subcommand, "--config", "job.yaml", *options]).trainer

    return trainer


def callback(trainer, kind):
    (found,) = [c for c in trainer.callbacks if isinstance(c, kind)]
    return found


JOBS = {  # max_steps, val_check_interval, log_every_n_steps, precision, devices, EMA, exported file, steps of last.ckpt
    "digits/flow": (1000, 1000, 25, "32-true", 1, (0.995, 0), "model.safetensors", 500),
    "digits/value": (1200, 1200, 25, "32-true", 1, (0.995, 0), "value.safetensors", 500),
    "gmm/mfm": (4000, 4000, 25, "32-true", 1, (0.999, 0), "model.safetensors", 500),
    "imagenet256/mfm_b2": (100000, 10000, 50, "bf16-mixed", 8, (0.9999, 0), "model.safetensors", 5000),
    "imagenet256/finetune": (10000, 500, 50, "bf16-mixed", 8, (0.999, 100), "model.safetensors", 500),
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_its_own_settings_and_the_defaults(trainer_of, name):
    trainer = trainer_of(name, "--trainer.accelerator=cpu")
    ema, checkpoint = callback(trainer, EMA), callback(trainer, LastCheckpoint)
    assert JOBS[name] == (
        trainer.max_steps, trainer.val_check_interval, trainer.log_every_n_steps, trainer.precision,
        trainer.num_devices, (ema.decay, ema.start_step), callback(trainer, ExportModel).filename,
        checkpoint._every_n_train_steps,
    )  # fmt: skip
    assert (trainer.max_epochs, trainer.check_val_every_n_epoch, trainer.num_sanity_val_steps) == (-1, None, 0)
    # checkpoints come last by themselves
    monitors = [LearningRateMonitor, TrainingThroughput, RunRecord]
    kinds = [PlainProgress, EMA, ExportModel, *monitors, SaveConfigCallback, LastCheckpoint]  # no terminal here: no bar
    assert [type(c) for c in trainer.callbacks] == kinds
    assert trainer.default_root_dir == f"outputs/{name}"
    logs = [(TensorBoardLogger, f"outputs/{name}/logs/tensorboard"), (CSVLogger, f"outputs/{name}/logs/csv")]
    assert [(type(logger), logger.log_dir) for logger in trainer.loggers] == logs


def test_loggers_and_callbacks_of_the_users_own(trainer_of):
    assert trainer_of("digits/steer", subcommand="predict").loggers == []
    silent = trainer_of("digits/flow", "--trainer.logger=false")
    assert silent.loggers == []
    assert not [c for c in silent.callbacks if isinstance(c, LearningRateMonitor | ThroughputMonitor)]
    (logger,) = trainer_of("digits/flow", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine").loggers
    assert Path(logger.save_dir) == Path("mine")
    trainer = trainer_of("digits/flow", "--ema.decay=0.9", f"--trainer.callbacks+={FID_PATH}",
                         "--trainer.callbacks.reference=r.npz", "--trainer.callbacks.weights=w.pth")  # fmt: skip
    assert callback(trainer, EMA).decay == 0.9
    assert callback(trainer, SampleFID)
    # one of the same kind takes the place of the run's
    assert (
        callback(
            trainer_of("digits/flow", f"--trainer.callbacks={EMA_PATH}", "--trainer.callbacks.decay=0.5"), EMA
        ).decay
        == 0.5
    )
    bare = trainer_of("digits/flow", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")
    assert not [c for c in bare.callbacks if isinstance(c, (Checkpoint, ProgressBar))]


def test_a_terminal_has_a_bar(trainer_of, monkeypatch):
    monkeypatch.setattr(fit, "console", lambda: Console(force_terminal=True))
    assert callback(trainer_of("digits/flow"), StepProgressBar)


class Quarter(BoringModel):
    """A loss of 0.25, on the bar."""

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 0.25, prog_bar=True)
        return super().training_step(batch, batch_idx)["loss"]


def test_without_a_terminal_progress_is_lines(tmp_path, caplog, monkeypatch):
    """Of a clock that goes on by 10 s at each look: a line for each 30 s, with what is left at the rate so far."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=12, default_root_dir=tmp_path, callbacks=[PlainProgress(30.0)], **options)
    with caplog.at_level("INFO", "mfm_lightning"):
        trainer.fit(Quarter(), BoringDataModule())
    lines = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    steps = [line for line in lines if line.startswith("step ")]
    assert all("train/loss 0.25" in line and "v_num" not in line for line in steps)
    assert steps[-1].startswith("step 12 of 12")
    assert "left" not in steps[-1]
    done, left = re.match(r"step (\d+) of 12, .* a second, (.*) left", steps[0]).groups()
    assert 2 <= int(done) <= 4
    assert re.fullmatch(r"\d+ min( \d+ s)?", left)
    assert 2 <= len(steps) <= 6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (3599.6, "1 h"), (7500, "2 h 5 min")],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_leaves_all_of_it_there(tmp_path, monkeypatch):
    """By a config that comes with the package: the current folder is empty."""
    monkeypatch.setattr(sys, "argv", ["mfm"])
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    small += [f"--model.init_args.evaluation.init_args.{option}" for option in ("num_states=2", "num_draws=8")]
    run(["fit", "--config", "configs/gmm/mfm.yaml", "--trainer.default_root_dir=elsewhere", *small])
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    found = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert found == {"last.ckpt", "logs", "model.safetensors", "pictures"}
    assert {path.name for path in (tmp_path / "elsewhere/logs").iterdir()} == {"csv", "tensorboard"}


def test_configs_are_found_here_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/digits/flow.yaml") == ROOT / "configs/digits/flow.yaml"
    (tmp_path / "configs/digits").mkdir(parents=True)
    Path("configs/digits/flow.yaml").write_text("{}")
    assert find_config("configs/digits/flow.yaml") == Path("configs/digits/flow.yaml")
    assert find_config("digits/mfm") == find_config("digits/mfm.yaml") == ROOT / "configs/digits/mfm.yaml"
    assert find_config("digits/flow") == Path("configs/digits/flow.yaml")  # the copy here
    for name in ("configs/digits/none.yaml", "none.yaml"):
        with pytest.raises(FileNotFoundError, match=f"no config at {name}"):
            find_config(name)
        with pytest.raises(FileNotFoundError, match=f"no config at {name}"):
            run(["fit", "--config", name])


def test_the_plan_knows_the_defaults(tmp_path, monkeypatch):
    assert plan_config("configs/gmm/mfm.yaml").devices == default_settings()["trainer"]["devices"] == 1
    other = tmp_path / "defaults.yaml"
    other.write_text(yaml.safe_dump({"trainer": {"devices": 3, "precision": "bf16-mixed"}}))
    monkeypatch.setattr(configs, "DEFAULTS", other)
    assert plan_config("configs/gmm/mfm.yaml").devices == 3


def test_help_of_the_demo_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(["demo", "--help"])
    assert "Usage: mfm demo" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("null", ["null", "None"])
def test_null_reaches_a_setting_inside_of_the_models_settings(tmp_path, monkeypatch, null):
    """jsonargparse hands it on to the class inside as the text None."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MFMCLI, "_run_subcommand", lambda self, subcommand: None)
    config = str(ROOT / "configs/gmm/mfm.yaml")
    made = run(["fit", "--config", config, "--model.optimization.final_learning_rate", null])
    assert made.model.optimization.final_learning_rate is None
    assert run(["fit", "--config", config]).model.optimization.final_learning_rate == 1e-5
