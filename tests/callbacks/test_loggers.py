"""What a run gives its loggers: pictures, hyperparameters, learning rate, throughput; and its summary."""

import csv
import json
import logging
import struct
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mfm_lightning.callbacks.record import RunRecord, new_in_mlflow
from mfm_lightning.callbacks.throughput import TrainingThroughput
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.evaluation.base import Evaluation
from mfm_lightning.training.pictures import log_picture, logged_pictures
from tests.inputs.tiny_runs import CONFIG, job

LOGGERS = [
    {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "run", "name": "logs", "version": "tensorboard"}},
    {"class_path": "CSVLogger", "init_args": {"save_dir": "run", "name": "logs", "version": "csv"}},
    {"class_path": "WandbLogger", "init_args": {"save_dir": "run", "project": "tiny"}},
    {"class_path": "MLFlowLogger", "init_args": {"tracking_uri": "file:run/mlruns", "run_name": "tiny"}},
]
STEPS = 4
PICTURES = ("noise", "samples")


class Noise(Evaluation):
    """Pictures of noise, which are other ones each time."""

    def draw(self, module, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")

    def measure(self, module, folder):
        """A figure beside the numbers, as of values."""
        Image.new("RGB", (4, 4)).save(folder / "measured.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with all loggers: its folder has run/, and what it said is in `said`."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("loggers")
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "logger": LOGGERS, "log_every_n_steps": 1}}
    model = CONFIG["model"]
    evaluation = {"class_path": f"{__name__}.Noise"}
    model = {**model, "init_args": {**model["init_args"], "evaluation": evaluation}}
    said = logging.getLogger("mfm_lightning.commands.fit")
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    said.addHandler(handler)
    before = said.level
    said.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DISABLE_CODE", "true")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        subprocess.run(["git", "init", "-q"], check=True)
        Path("tracked").write_text("1")
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "add", "tracked"], check=True)
        subprocess.run(["git", *who, "commit", "-qm", "1"], check=True)
        Path("tiny.yaml").write_text(yaml.safe_dump({**config, "model": model}))
        options = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=2"]
        job("fit", "run", *options)
        Path("tracked").write_text("2")  # the test's commit has changes
        job("test", "run")
        import wandb

        wandb.finish()
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        yield SimpleNamespace(folder=folder, said=texts, commit=head, options=options)
    said.removeHandler(handler)
    said.setLevel(before)


def pixels(data) -> np.ndarray:
    """Of a PNG in a file or in bytes."""
    return np.asarray(Image.open(BytesIO(data) if isinstance(data, bytes) else data).convert("RGB"))


def wandb_records(path: Path) -> Iterator[bytes]:
    """Of a `.wandb` file, a log in the format of LevelDB: blocks of 32 KiB, a head of 7 bytes before each part."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)  # behind a checksum
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            yield whole
            whole = b""


def wandb_runs(folder: Path) -> dict[str, list]:
    """The configs and the history of offline runs: what `wandb sync` would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    def plain(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    found = {"config": [], "history": []}
    for path in sorted(folder.rglob("*.wandb")):
        for data in wandb_records(path):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind in ("run", "config"):
                found["config"].append(plain((record.run.config if kind == "run" else record.config).update))
            elif kind == "history":
                found["history"].append(plain(record.history.item))
    return found


@pytest.fixture(scope="module")
def mlflow_run(place):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{place.folder}/run/mlruns")
    experiments = [e.experiment_id for e in client.search_experiments()]
    fit, test = sorted(client.search_runs(experiments), key=lambda run: run.info.start_time)
    return SimpleNamespace(client=client, fit=fit, test=test)


@pytest.mark.slow
def test_tensorboard_has_the_files_pictures(place):
    events = EventAccumulator(str(place.folder / "run/logs/tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"val/{name}" for name in PICTURES}
    for name in PICTURES:
        images = events.Images(f"val/{name}")
        assert [image.step for image in images] == [1, 3]  # as Lightning counts the metrics of steps 2 and 4
        assert [image.step for image in images] == [event.step for event in events.Scalars("val/loss")]
        for image, step in zip(images, (2, 4), strict=True):
            written = pixels(place.folder / f"run/pictures/step_{step:07d}/{name}.png")
            assert np.array_equal(pixels(image.encoded_image_string), written)


@pytest.mark.slow
def test_wandb_has_them_offline(place):
    history = wandb_runs(place.folder / "run/wandb")["history"]
    for name in PICTURES:
        logged = [row for row in history if f"val/{name}/filenames" in row]
        assert [row["trainer/global_step"] for row in logged] == [1, 3]
        for row, step in zip(logged, (2, 4), strict=True):
            (kept,) = row[f"val/{name}/filenames"]
            (path,) = place.folder.glob(f"run/wandb/offline-run-*/files/{kept}")
            assert np.array_equal(pixels(path), pixels(place.folder / f"run/pictures/step_{step:07d}/{name}.png"))
    assert any("test/measured/filenames" in row for row in history)
    ((last,),) = [row["test/noise/filenames"] for row in history if "test/noise/filenames" in row]
    (path,) = place.folder.glob(f"run/wandb/offline-run-*/files/{last}")
    assert np.array_equal(pixels(path), pixels(place.folder / "run/test/noise.png"))


@pytest.mark.slow
def test_mlflow_has_them_in_its_store(place, mlflow_run):
    kept = sorted(place.folder.glob(f"run/mlruns/*/{mlflow_run.fit.info.run_id}/artifacts/images/*.png"))
    assert len(kept) == 2 * len(PICTURES)
    for name in PICTURES:
        for step in (2, 4):
            begin = f"val~{name}+step+{step - 1}+"
            (path,) = [path for path in kept if path.name.startswith(begin)]
            assert np.array_equal(pixels(path), pixels(place.folder / f"run/pictures/step_{step:07d}/{name}.png"))


@pytest.mark.slow
def test_hyperparameters_are_the_config_the_code_and_the_data(place, mlflow_run):
    """As MLflow and the folder have them."""
    params = mlflow_run.fit.data.params
    assert params["model/init_args/network/init_args/hidden_size"] == "16"
    assert params["ema/decay"] == "0.9"
    assert (
        params["run/command"] == f"mfm fit --config tiny.yaml --trainer.default_root_dir=run {' '.join(place.options)}"
    )
    assert params["run/commit"] == place.commit
    assert mlflow_run.test.data.params["run/commit"] == f"{place.commit} with changes"
    of_files = yaml.safe_load((place.folder / "run/logs/csv/hparams.yaml").read_text())
    assert of_files == yaml.safe_load((place.folder / "run/logs/tensorboard/hparams.yaml").read_text())
    data = DigitsDataModule(batch_size=16)
    data.setup()
    x, _ = data.splits["train"]
    assert of_files["data_fingerprint"]["train"] == {**data.fingerprint["train"], "samples": len(x)}
    configs = wandb_runs(place.folder / "run/wandb")["config"]
    (run,) = [config["run"] for config in configs if "run" in config][:1]
    assert run["commit"] == place.commit


@pytest.mark.slow
def test_the_learning_rate_and_the_rate_are_in_the_rows_of_the_loss(place):
    with open(place.folder / "run/logs/csv/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = [row for row in rows if row["train/loss"]]
    assert [int(row["step"]) for row in trained] == list(range(STEPS))
    assert len(rows) == STEPS + 2  # and the two validations
    assert [float(row["lr-AdamW"]) for row in trained] == [1e-3] * STEPS
    rates = [row["train/device/samples_per_sec"] for row in trained]
    assert not rates[0]
    assert all(float(rate) > 0 for rate in rates[1:])
    assert [int(row["train/samples"]) for row in trained] == [16, 32, 48, 64]


@pytest.mark.slow
def test_the_summary_says_where_things_are(place):
    fit, test = (text for text in place.said if text.startswith("mfm "))
    lines = dict(line.strip().split("  ", 1) for line in fit.splitlines()[1:] if line.strip().partition("  ")[1])
    lines = {name: text.strip() for name, text in lines.items()}
    assert fit.startswith("mfm fit is done after step 4, in ")
    for name, path in {"weights": "run/model.safetensors", "checkpoint": "run/last.ckpt"}.items():
        assert lines[name].startswith(path)
        assert (place.folder / path).is_file()
    folder, _, names = lines["pictures"].partition(": ")
    assert folder == "run/pictures/step_0000004/"
    assert all((place.folder / folder / name).is_file() for name in names.split(", "))
    with open(place.folder / "run/logs/csv/metrics.csv", newline="") as file:
        losses = {int(row["step"]) + 1: float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}
    best = min(losses, key=lambda step: losses[step])
    assert f"val/loss {losses[4]:.4g}," in lines["metrics"]
    assert f"lowest val/loss {losses[best]:.4g} at step {best}" in lines["metrics"]
    for text in (
        "run/logs/tensorboard",
        "run/logs/csv",
        "Wandb: run/wandb/offline-run-",
        "MLflow: file:run/mlruns, run ",
    ):
        assert text in fit
    assert "next        mfm test --config tiny.yaml --trainer.default_root_dir=run" in fit
    assert "mfm sample run/model.safetensors --output run/samples" in fit
    assert test.startswith("mfm test is done, in ")
    assert "pictures    run/test/: measured.png, noise.png, samples.png" in test


# -- parts, without a run ----------------------------------------------------------------------------------------------


def trainer_with(*loggers, rank: int = 0) -> SimpleNamespace:
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    return SimpleNamespace(loggers=loggers, fit_loop=loop, is_global_zero=rank == 0)


class Album(DummyLogger):
    """Some other logger with `log_image`."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def log_image(self, key, images, step=None):
        self.kept.append((key, images, step))


def test_another_logger_gets_pictures_and_csv_is_passed_over(tmp_path):
    path, album = tmp_path / "a.png", Album()
    Image.new("RGB", (2, 2)).save(path)
    log_picture(trainer_with(CSVLogger(tmp_path), album), "val/a", path)
    assert album.kept == [("val/a", [str(path)], 7)]


def test_only_pictures_that_were_written_meanwhile_are_logged_by_rank_0(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "old.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "again.png")
    for rank, expected in ((1, []), (0, ["val/again", "val/new"])):
        album = Album()
        with logged_pictures(trainer_with(album, rank=rank), tmp_path, "val"):
            for name in ("again", "new"):
                Image.new("RGB", (3, 2)).save(tmp_path / f"{name}.png")
        assert [key for key, *_ in album.kept] == expected


def test_mlflow_keeps_first_values_and_says_so(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}")
    logger.log_hyperparams(new_in_mlflow(logger, {"a": {"b": 1, "c:d": 2}}))
    with caplog.at_level(logging.INFO):
        new = new_in_mlflow(logger, {"a": {"b": 3, "c:d": 2}, "e": 4})
    assert new == {"e": "4"}
    assert "first values of a/b" in caplog.text
    logger.log_hyperparams(new)
    run = logger.experiment.get_run(logger.run_id)
    assert run.data.params == {"a/b": "1", "a/c_d": "2", "e": "4"}


def test_the_best_validation_outlives_a_resume():
    record, again = RunRecord({}, "mfm fit"), RunRecord({}, "mfm fit")
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), sanity_checking=False)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        trainer.global_step, trainer.callback_metrics = step, {"val/loss": torch.tensor(loss)}
        record.on_validation_end(trainer, L.LightningModule())
    again.load_state_dict(record.state_dict())
    assert again.best == (1.0, 20)


def test_the_rate_is_of_training_alone(monkeypatch):
    """By a clock of its own: 0.5 s a step of 8 samples, and a validation of 100 s after the second."""
    now, logged = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Kept(DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append({k: v for k, v in metrics.items() if k == "train/device/samples_per_sec"})

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, _):
            now[0] += 0.5
            return self.weight * batch[0].sum()

        def validation_step(self, batch, _):
            now[0] += 100.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(32, 1)), batch_size=8)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=2, logger=Kept(), callbacks=[TrainingThroughput()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        num_sanity_val_steps=1, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(Module(), loader, loader)
    assert [row for row in logged if row] == [{"train/device/samples_per_sec": pytest.approx(16.0)}] * 3
