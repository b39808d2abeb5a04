"""`mfm predict` that is stopped at any moment goes on: the same samples on any number of ranks, of one run alone."""

import json
import os
import shutil
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import mfm_lightning.sampling.batch_folder as batch_folder
from mfm_lightning.alignment import BestOfN, FeynmanKac, TimeGrid
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.commands.main import run
from mfm_lightning.data import DigitsDataModule, GaussianMixtureDataModule, NoiseDataModule
from mfm_lightning.evaluation import MixtureEvaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, RewardAlignment, RewardFinetuning
from mfm_lightning.networks import MLP, DiT
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_lightning.objectives.objective import Objective, WeightedTerm
from mfm_lightning.sampling.resumable import compare_settings, dealt
from mfm_lightning.utils.atomic import save_tensors
from mfm_lightning.utils.folder_lock import FolderInUseError, FolderLock
from tests.modules.test_predict_batches import LINEAR, assert_same, predicted
from tests.processes import ended, forked, one_thread, torchrun, torchrun_statuses

N = 11


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A model of random weights, and a config that steers it by particles, as the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    save_model(model, "model.safetensors")
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "default_root_dir": "one"},
        "model": {
            "class_path": "mfm_lightning.modules.RewardAlignment",
            "init_args": {
                "target": {"model": "model.safetensors", "reward": "brightness", "reward_scale": 5.0,
                           "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"}},
                "method": {"class_path": "mfm_lightning.alignment.FeynmanKac",
                           "init_args": {"num_particles": 3, "grid": {"steps": 4}}},
                "base_steps": 3,
                "pictures": 6,
            },
        },
        "data": {
            "class_path": "mfm_lightning.data.NoiseDataModule",
            "init_args": {"num_samples": N, "labels": [7, 3, 5], "batch_size": 4},
        },
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def command(folder: str = "one", *more: str) -> list[str]:
    options = ["--config=config.yaml", f"--trainer.default_root_dir={folder}", "--return_predictions=false"]
    return ["predict", *options, *more]


def kill_in_write(number: int) -> None:
    """SIGKILL in the writing of so manieth batch, when its record is there and half of its tensors are."""
    count = [0]

    def save(tensors, path, metadata=None):
        count[0] += 1
        if count[0] == number:
            Path(f"{path}.partial-0123456789ab").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return save_tensors(tensors, path, metadata)

    setattr(batch_folder, "save_tensors", save)  # noqa: B010


def made(folder: str) -> dict[str, int]:
    """When each batch was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(folder, "predict").glob("batch_*.safetensors")}


def summary(folder: str) -> dict:
    return json.loads(Path(folder, "predict/summary.json").read_text())


def test_one_process_two_and_a_killed_one_that_is_gone_on_with_by_two(workplace, monkeypatch, caplog):
    with one_thread():
        torchrun(workplace, 1, *command())
        two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
        torchrun(workplace, 2, *command("two", *two, "--data.init_args.batch_size=3"))

        def killed() -> None:
            kill_in_write(2)
            run(command("killed"))

        assert ended(forked(killed)) == -signal.SIGKILL
        left = made("killed")
        assert set(left) == {"batch_0000.safetensors"}  # the batch in work is lost, and no more
        assert not Path("killed/predict/summary.json").exists()
        shutil.copytree("killed", "again")
        torchrun(workplace, 1, *command("again"))
        torchrun(workplace, 2, *command("killed", *two, "--data.init_args.batch_size=3"))
        assert made("killed")["batch_0000.safetensors"] == left["batch_0000.safetensors"]
    wanted = predicted(Path("one/predict"))
    assert len(wanted["states"]) == N
    for name, value in predicted(Path("again/predict")).items():  # in the same batches: bit for bit
        assert torch.equal(value, wanted[name]), name
    for folder in ("two", "killed"):
        assert_same(predicted(Path(folder, "predict")), wanted)
        for key in ("samples", "missing", "mean_reward", "mean_reward_before", "nfe_per_sample"):
            assert summary(folder)[key] == pytest.approx(summary("one")[key], rel=1e-5), (folder, key)
        assert summary(folder)["method"] == summary("one")["method"]
        assert not list(Path(folder, "predict").glob("*partial*"))
        assert {path.stem for path in Path(folder, "predict").glob("batch_*.json")} == {
            path.stem for path in Path(folder, "predict").glob("batch_*.safetensors")
        }
        # the same picture, of the first samples by index, whoever made them
        pictures = [Image.open(f"{name}/predict/before_after.png").size for name in ("one", folder)]
        assert pictures[0] == pictures[1]
    assert summary("one")["mean_reward"] == pytest.approx(wanted["rewards"].double().mean().item(), rel=1e-6)
    # finished: it says so, and nothing is computed
    caplog.set_level("INFO")
    before = made("one")
    monkeypatch.setattr(FeynmanKac, "__call__", None)
    run(command())
    assert f"one/predict: {N} of {N} samples are there; there is nothing to do" in caplog.text
    assert made("one") == before


@pytest.mark.slow
def test_a_rank_that_is_killed_loses_its_batch_alone(workplace, monkeypatch):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=2"]

    def save(tensors, path, metadata=None):
        if os.environ.get("RANK") == "1" and "batch_0005" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return save_tensors(tensors, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(batch_folder, "save_tensors", save)
        found = torchrun_statuses(workplace, 2, *command("two", *two))
    assert found[1] == -signal.SIGKILL
    assert found[0] != 0  # it waited for the other, and says that it is gone
    assert "batch_0001.safetensors" in made("two")
    run(command("two"))
    run(command("one"))
    assert_same(predicted(Path("two/predict")), predicted(Path("one/predict")))
    # one sample is lost, and a rank has nothing to do
    shutil.rmtree("two")
    run(command("two", "--data.init_args.batch_size=5"))
    Path("two/predict/batch_0010.safetensors").unlink()
    Path("two/predict/summary.json").unlink()
    torchrun(workplace, 2, *command("two", *two))
    assert (summary("two")["samples"], summary("two")["missing"]) == (N, 0)
    assert_same(predicted(Path("two/predict")), predicted(Path("one/predict")))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("--model.init_args.seed=1", "seed"),
        ("--model.init_args.target.reward=contrast", "reward"),
        ("--model.init_args.target.reward_scale=2", "reward_scale"),
        ("--model.init_args.method.init_args.num_particles=2", "method"),
        ("--model.init_args.target.model=other.safetensors", "model"),
        ("--data.init_args.seed=3", "data"),
        ("--data.init_args.labels=[1]", "data"),
        ("--trainer.precision=bf16-mixed", "precision"),
    ],
)
def test_another_run_in_the_folder_is_refused_and_written_over_where_it_is_asked_for(workplace, more, key):
    few = ["--data.init_args.num_samples=3", "--model.init_args.base_steps=1"]
    run(command("one", *few))
    model = load_model("model.safetensors")
    model.network.requires_grad_(False)
    next(model.parameters()).add_(1.0)
    save_model(model, "other.safetensors")
    before = made("one")
    with pytest.raises(
        ValueError,
        match=rf"one/predict has samples of other settings, which differ in {key} \({key}: .* there, .* now\): "
        r"take another folder by --trainer.default_root_dir, or write over it by --overwrite",
    ):
        run(command("one", *few, more))
    assert made("one") == before
    run(command("one", *few, more, "--overwrite"))
    assert made("one") != before
    assert summary("one")["samples"] == 3


def test_another_command_in_the_folder_at_once_is_refused(workplace):
    other = FolderLock("one/predict", "mfm predict")
    other.acquire()
    with pytest.raises(FolderInUseError, match="one/predict is being written to by mfm predict, process"):
        run(command())
    other.release()


def test_samples_may_grow_in_number(workplace):
    run(command("grown", "--data.init_args.num_samples=3"))
    first = made("grown")
    run(command("grown"))
    assert summary("grown")["samples"] == N
    assert made("grown").items() > first.items()
    run(command())
    assert_same(predicted(Path("grown/predict")), predicted(Path("one/predict")))
    run(command("grown", "--data.init_args.num_samples=5"))  # the summary is of what was asked for
    assert (summary("grown")["samples"], summary("grown")["missing"]) == (5, 0)


def trainer(folder: Path | str) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip


def test_all_particles_of_a_sample_belong_to_it(workplace):
    """The unit is the sample: with `keep: all` it has three states, which are made again together."""

    def predict(folder: str, size: int) -> dict[str, torch.Tensor]:
        settings = TargetSettings("model.safetensors", "brightness", PixelDecoder(), reward_scale=5.0)
        module = RewardAlignment(settings, FeynmanKac(num_particles=3, grid=TimeGrid(4), keep="all"), 3)
        trainer(folder).predict(module, NoiseDataModule(num_samples=5, batch_size=size), return_predictions=False)
        parts = [load_file(path) for path in sorted(Path(folder, "predict").glob("batch_*.safetensors"))]
        index = torch.cat([part["index"] for part in parts])
        states = torch.cat([part["states"] for part in parts]).reshape(len(index), 3, 1, 8, 8)
        return {"states": states[index.argsort()], "index": index.sort().values}

    wanted = predict("whole", 5)
    predict("parts", 2)
    Path("parts/predict/batch_0002.safetensors").unlink()
    found = predict("parts", 3)
    assert found["index"].tolist() == wanted["index"].tolist() == [0, 1, 2, 3, 4]
    assert_same(found, wanted)
    assert summary("parts")["samples"] == 15
    assert summary("parts")["mean_reward"] == pytest.approx(summary("whole")["mean_reward"], rel=1e-5)


class Unnumbered(L.LightningDataModule):
    """Of a user's own, that gives `(x, label)` and no index."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def predict_dataloader(self) -> DataLoader:
        x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.arange(6)), batch_size=self.batch_size)


def test_data_that_do_not_number_their_samples_are_gone_on_with_as_they_were_dealt_out(workplace):
    def predict(folder: str, size: int) -> None:
        settings = TargetSettings("model.safetensors", "brightness", PixelDecoder())
        module = RewardAlignment(settings, BestOfN(2, steps=2), 2, pictures=2)
        trainer(folder).predict(module, Unnumbered(size), return_predictions=False)

    predict("whole", 2)
    wanted = predicted(Path("whole/predict"))
    Path("whole/predict/batch_0002.safetensors").unlink()
    before = made("whole")
    with pytest.raises(
        ValueError, match=r"does not number by itself, and of other settings.*batch_size: 2 there, 3 now"
    ):
        predict("whole", 3)
    predict("whole", 2)
    assert made("whole").items() > before.items()
    assert_same(predicted(Path("whole/predict")), wanted)


@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_samples_of_trained_models_are_gone_on_with(workplace, kind):
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 16, 1))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    save_model(model, "vectors.safetensors")

    def module(times=(0.3,)):
        if kind == "finetuning":
            return RewardFinetuning(TargetSettings("vectors.safetensors", LINEAR))
        terms = [WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")]
        network = load_model("vectors.safetensors").network
        return MFMPretraining(network, Objective(terms), evaluation=MixtureEvaluation(times))

    def predict(folder: str, size: int, made_by: L.LightningModule, data=None) -> None:
        data = data or GaussianMixtureDataModule(batch_size=size, num_test=8)
        trainer(folder).predict(made_by, data, return_predictions=False)

    predict("whole", 8, module())
    predict("parts", 3, module())
    Path("parts/predict/batch_0003.safetensors").unlink()
    kept = made("parts")
    predict("parts", 2, module())
    assert set(made("parts")) == {*kept, "batch_0003.safetensors", "batch_0005.safetensors"}
    assert kept.items() < made("parts").items()
    assert_same(predicted(Path("parts/predict")), predicted(Path("whole/predict")))
    with pytest.raises(ValueError, match=r"which differ in data \(data: .*--overwrite"):
        predict("parts", 2, module(), GaussianMixtureDataModule(num_test=9))
    changed = module()
    next(changed.exported.parameters()).data.add_(1.0)
    with pytest.raises(ValueError, match="which differ in weights"):
        predict("parts", 2, changed)
    if kind == "pretraining":
        with pytest.raises(ValueError, match="which differ in evaluation"):
            predict("parts", 2, module((0.4,)))


def test_a_file_that_is_damaged_is_named(workplace):
    few = ["--data.init_args.num_samples=3", "--model.init_args.base_steps=1"]
    run(command("one", *few))
    path = Path("one/predict/batch_0000.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"batch_0000.safetensors cannot be read \(.*\): delete it, and its samples"):
        run(command("one", *few))


def test_samples_are_dealt_to_ranks():
    missing = [0, 3, 4, 7, 9]
    assert [dealt(missing, rank, 2) for rank in (0, 1)] == [[0, 4, 9], [3, 7]]
    # of a group of which one is missing all are made again
    assert [dealt(missing, rank, 2, together=2) for rank in (0, 1)] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]
    # ranks that compute together get as many each, every sample among them
    for world in (1, 2, 3, 8):
        shares = [dealt(missing, rank, world, even=True) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        assert {index for share in shares for index in share} == set(missing)
    assert [dealt([], rank, 2, even=True) for rank in (0, 1)] == [[], []]


def test_digits_are_told_from_others_by_their_content(workplace):
    data = DigitsDataModule()
    data.setup()
    other = DigitsDataModule()
    other.setup()
    assert data.samples_identity == other.samples_identity
    other.splits["test"][0][0] += 1
    assert data.samples_identity != other.samples_identity


@pytest.mark.slow
def test_samples_of_a_model_in_shards_also_where_ranks_have_not_as_many(workplace):
    """51 images in batches of 25 on two ranks of FSDP2, which compute each step together; then some are lost."""
    network = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    network |= {"encoder_depth": 1, "num_classes": 10, "guidance_scales": []}
    evaluation = {"refinement_steps": [2], "ode_steps": 2, "times": [0.3], "picture_times": []}
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "logger": False},
        "model": {
            "class_path": "mfm_lightning.modules.MFMPretraining",
            "init_args": {
                "network": {"class_path": "mfm_lightning.networks.DiT", "init_args": network},
                "objective": {"terms": [{"name": "data_diagonal"}, {"name": "mean_flow"}]},
                "initial": "model.safetensors",
                "evaluation": {"class_path": "mfm_lightning.evaluation.ImageEvaluation", "init_args": evaluation},
            },
        },
        "data": {"class_path": "tests.distributed_parts.OddDigits", "init_args": {"batch_size": 25}},
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    fsdp = ["--trainer.devices=2", "--trainer.strategy=fsdp2"]
    torchrun(workplace, 1, *command("one"))
    torchrun(workplace, 2, *command("two", *fsdp))
    wanted = predicted(Path("one/predict"))
    assert len(wanted["x1"]) == 51

    def assert_all_there() -> None:
        rows = batch_folder.BatchFolder("two/predict").rows(range(51), wanted)
        for name, value in wanted.items():
            torch.testing.assert_close(
                torch.stack([rows[i][name] for i in range(51)]), value, rtol=1e-4, atol=1e-5, msg=name
            )

    assert_all_there()
    Path("two/predict/batch_0001.safetensors").unlink()  # of rank 1, all of its samples
    torchrun(workplace, 2, *command("two", *fsdp, "--data.init_args.batch_size=4"))
    assert_all_there()


def test_a_note_of_settings_that_says_something_else_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json is no JSON object of settings \(\[1\]\): delete it"):
        compare_settings(tmp_path / "settings.json", {"a": 1}, "samples", "delete it")
