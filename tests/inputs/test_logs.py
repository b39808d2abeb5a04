"""Logs and configs that later parts of a run leave as they are."""

import csv
import logging
import os
import signal
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mfm_lightning.callbacks import LastCheckpoint
from mfm_lightning.training.logs import AppendingWriter
from tests.inputs.tiny_runs import fit, job
from tests.processes import ended, forked

OWN = "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: run, name: mine, version: 3}}]"


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(path: str, column: str = "train/loss") -> list[int]:
    return [int(row["step"]) for row in rows(path) if row.get(column)]


@pytest.mark.parametrize(
    ("options", "path"),
    [([], "run/logs/csv"), ([f"--trainer.logger={OWN}"], "run/mine/version_3")],
    ids=["default", "the user's own"],
)
def test_a_resume_appends_and_other_stages_have_their_own(tmp_path, monkeypatch, options, path):
    monkeypatch.chdir(tmp_path)
    fit("run", 6, *options)
    first = rows(f"{path}/metrics.csv")
    assert steps(f"{path}/metrics.csv") == [1, 3, 5]
    # with a validation, whose columns are new
    fit("run", 10, "--trainer.val_check_interval=4", "--ckpt_path=last", *options)
    assert steps(f"{path}/metrics.csv") == [1, 3, 5, 7, 9]
    assert steps(f"{path}/metrics.csv", "val/loss") == [7]
    after = rows(f"{path}/metrics.csv")
    assert [row["train/loss"] for row in after[:3]] == [row["train/loss"] for row in first]
    before = Path(f"{path}/metrics.csv").read_bytes()
    job("validate", "run", *options)
    for _ in range(2):
        job("test", "run", *options)
    assert Path(f"{path}/metrics.csv").read_bytes() == before
    assert len(rows(f"{path}_test/metrics.csv")) == 2
    assert len(rows(f"{path}_validate/metrics.csv")) == 1


def test_rows_after_the_checkpoint_go_and_are_counted(tmp_path, monkeypatch, caplog):
    """A run that was killed had logged more than it had saved, and half a line at the end."""
    monkeypatch.chdir(tmp_path)
    fit("run", 4)
    path = Path("run/logs/csv/metrics.csv")
    header = path.read_text().splitlines()[0].split(",")
    extra = [{"step": step, "train/loss": 99.0} for step in (4, 5, 7)]
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, header).writerows(extra)
        file.write("1")
    with caplog.at_level(logging.INFO):
        fit("run", 8, "--ckpt_path=last")
    assert steps(str(path)) == [1, 3, 5, 7]
    assert "99.0" not in path.read_text()
    assert "3 rows of step 4 and later left out" in caplog.text
    assert "1 rows left out, which are not whole" in caplog.text


def test_a_run_that_begins_anew_puts_the_curve_aside(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    fit("run", 6)
    old = Path("run/logs/csv/metrics.csv").read_bytes()
    with caplog.at_level(logging.INFO):
        fit("run", 2, "--overwrite")
    assert Path("run/logs/csv/metrics.before.csv").read_bytes() == old
    assert steps("run/logs/csv/metrics.csv") == [1]
    assert "is metrics.before.csv now" in caplog.text


def test_tensorboard_shows_each_step_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit("run", 6, "--checkpoint.every_n_steps=4")
    kept = Path("run/last.ckpt").read_bytes()
    fit("run", 10, "--ckpt_path=last")
    Path("run/last.ckpt").write_bytes(kept)  # as if it had been killed after that one
    fit("run", 8, "--ckpt_path=last")
    job("test", "run")
    events = EventAccumulator("run/logs/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3, 5, 7]
    assert "test/loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize("options", [[], ["--trainer.logger=false"]], ids=["loggers", "none"])
def test_each_stage_has_its_config(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    fit("run", 2, "--ema.decay=0.5", *options)
    (config,) = [p for p in Path("run").rglob("config.yaml")]
    before = config.read_bytes()
    for stage in ("validate", "test"):
        job(stage, "run", *options)
        assert yaml.safe_load(Path(f"run/{stage}/config.yaml").read_text())["ema"]["decay"] == 0.9
    assert config.read_bytes() == before


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    writer = AppendingWriter(str(tmp_path))
    writer.log_metrics({"x": 1.0}, 0)
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(OSError, match=r"metrics\.csv could not be written: Is a directory"):
        writer.save()


def test_each_curve_that_is_put_aside_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curves = []
    for steps in (2, 4, 6):
        fit("run", steps, "--overwrite")
        curves.append(Path("run/logs/csv/metrics.csv").read_text())
    assert Path("run/logs/csv/metrics.before.csv").read_text() == curves[0]
    assert Path("run/logs/csv/metrics.before2.csv").read_text() == curves[1]


def test_a_validation_that_is_done_again_has_one_row(tmp_path, monkeypatch):
    """Killed after a validation was logged, with the checkpoint from before it."""
    monkeypatch.chdir(tmp_path)
    settings = ["--trainer.val_check_interval=4", "--checkpoint.every_n_steps=4", "--trainer.log_every_n_steps=1"]

    def killed():
        after = LastCheckpoint.on_validation_end

        def kill(self, trainer, module):
            after(self, trainer, module)
            if not trainer.sanity_checking:
                for logger in trainer.loggers:
                    logger.save()
                os.kill(os.getpid(), signal.SIGKILL)

        LastCheckpoint.on_validation_end = kill
        fit("run", 8, *settings)

    assert ended(forked(killed)) == -signal.SIGKILL
    fit("run", 8, *settings, "--ckpt_path=last")
    assert steps("run/logs/csv/metrics.csv", "val/loss") == [3, 7]
    assert steps("run/logs/csv/metrics.csv") == list(range(8))
