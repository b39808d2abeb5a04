"""A signal ends a command within seconds, with 128 + its number, and `fit` goes on from there."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from mfm_lightning.modules import MFMPretraining
from tests.inputs.test_logs import rows
from tests.inputs.tiny_runs import fit, job, last
from tests.processes import ended, forked

VALIDATED = ["--trainer.val_check_interval=4", "--trainer.limit_val_batches=5"]


def slow_at(name: str, place: Path, seconds: float = 3.0, from_call: int = 0) -> None:
    """Make a step of the module slow, and leave a file when it is there."""
    step, calls = getattr(MFMPretraining, name), []

    def slow(self, *arguments):
        calls.append(0)
        if len(calls) > from_call:
            (place / "there").touch()
            time.sleep(seconds)
        return step(self, *arguments)

    setattr(MFMPretraining, name, slow)


def stopped(place: Path, number: int, work) -> tuple[int, float, str]:
    """Status, seconds from the signal to the end, and what was written, of `work` in a process of its own."""

    def alone() -> None:
        log = os.open(place / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest's own is another
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
        work()

    (place / "there").unlink(missing_ok=True)
    process = forked(alone)
    while not (place / "there").exists():
        assert process.is_alive(), (place / "output").read_text()
        time.sleep(0.02)
    begin = time.monotonic()
    os.kill(process.pid, number)
    status = ended(process)
    return status, time.monotonic() - begin, (place / "output").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_in_a_validation(tmp_path, monkeypatch, number):
    """15 s of it are left; the weights and the validation are those of a run that was not stopped."""
    monkeypatch.chdir(tmp_path)
    fit("whole", 6, *VALIDATED)

    def work() -> None:
        slow_at("validation_step", tmp_path, from_call=1)
        fit("run", 6, *VALIDATED)

    status, seconds, text = stopped(tmp_path, number, work)
    assert (status, seconds < 5) == (128 + number, True), text
    assert "Traceback" not in text
    assert f"stopped by {number.name} after step 4 in a validation, which is done again" in text
    assert last("run")["global_step"] == 4
    fit("run", 6, *VALIDATED, "--ckpt_path=last")
    ours, expected = last("run"), last("whole")
    torch.testing.assert_close(ours["state_dict"], expected["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        ours["callbacks"]["EMA"]["average"], expected["callbacks"]["EMA"]["average"], rtol=0, atol=0
    )
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(ours["rng_state"], expected["rng_state"], strict=True))
    found, wanted = (
        [(row["step"], row["val/loss"]) for row in rows(f"{run}/logs/csv/metrics.csv") if row["val/loss"]]
        for run in ("run", "whole")
    )
    assert found == wanted
    assert len(found) == 1


def test_between_the_step_and_its_validation(tmp_path, monkeypatch):
    """SIGTERM in the step before: the step ends, and its validation is done when the run goes on."""
    monkeypatch.chdir(tmp_path)

    def work() -> None:
        slow_at("training_step", tmp_path, seconds=1.0, from_call=3)
        fit("run", 6, *VALIDATED)

    status, _, text = stopped(tmp_path, signal.SIGTERM, work)
    assert status == 128 + signal.SIGTERM, text
    assert last("run")["global_step"] == 4
    fit("run", 6, *VALIDATED, "--ckpt_path=last")
    validated = [row["step"] for row in rows("run/logs/csv/metrics.csv") if row["val/loss"]]
    assert validated == ["3"]


@pytest.mark.parametrize(
    ("command", "number"),
    [("test", signal.SIGTERM), ("test", signal.SIGINT), ("validate", signal.SIGHUP), ("validate", signal.SIGTERM)],
)
def test_what_only_measures(tmp_path, monkeypatch, command, number):
    monkeypatch.chdir(tmp_path)
    fit("run", 2)
    step = {"test": "test_step", "validate": "validation_step"}[command]

    def work() -> None:
        slow_at(step, tmp_path)
        job(command, "run")

    status, seconds, text = stopped(tmp_path, number, work)
    assert (status, seconds < 5) == (128 + number, True), text
    assert f"mfm {command}: stopped by {number.name}" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_predict(tmp_path, monkeypatch, number):
    from tests.inputs.tiny_runs import NETWORK

    monkeypatch.chdir(tmp_path)
    fit("run", 2)
    assert NETWORK["input_size"] == 8

    def work() -> None:
        slow_at("predict_step", tmp_path)
        job("predict", "run")

    status, seconds, text = stopped(tmp_path, number, work)
    assert (status, seconds < 5) == (128 + number, True), text
    assert f"mfm predict: stopped by {number.name}" in text


def test_before_training_begins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work() -> None:
        import mfm_lightning.data.digits as digits

        setup = digits.DigitsDataModule.setup

        def slow(self, stage=None):
            (tmp_path / "there").touch()
            time.sleep(10)
            setup(self, stage)

        digits.DigitsDataModule.setup = slow
        fit("run", 6)

    status, seconds, text = stopped(tmp_path, signal.SIGTERM, work)
    assert (status, seconds < 5) == (128 + signal.SIGTERM, True), text
    assert "mfm fit: stopped by SIGTERM" in text


def test_in_the_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work() -> None:
        import mfm_lightning.callbacks.export as export

        def slow(*_, **__):
            (tmp_path / "there").touch()
            time.sleep(10)

        export.save_network = slow
        fit("run", 4)

    status, seconds, text = stopped(tmp_path, signal.SIGTERM, work)
    assert (status, seconds < 5) == (128 + signal.SIGTERM, True), text
    assert last("run")["global_step"] == 4
    fit("run", 4, "--ckpt_path=last")
    assert Path("run/model.safetensors").exists()


def test_nohup_keeps_its_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slow_at("training_step", tmp_path, seconds=0.5, from_call=1)
        fit("run", 4)

    status, _, text = stopped(tmp_path, signal.SIGHUP, work)
    assert status == 0, text
    assert last("run")["global_step"] == 4
