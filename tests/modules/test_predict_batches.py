"""`mfm predict` gives each sample what it is, in batches of any size and on any number of devices."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from mfm_lightning.alignment import BestOfN, FeynmanKac, Search, Steering, TimeGrid
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.alignment.values import DrawGradientFree
from mfm_lightning.checkpoints import load_model, save_model
from mfm_lightning.data import DigitsDataModule, GaussianMixtureDataModule, NoiseDataModule
from mfm_lightning.evaluation import ImageEvaluation, MixtureEvaluation
from mfm_lightning.interpolant import noise_seed
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, RewardAlignment, RewardFinetuning
from mfm_lightning.modules.predicting import SampleNumbers
from mfm_lightning.networks import MLP, DiT
from mfm_lightning.networks.decoders import PixelDecoder
from mfm_lightning.objectives.objective import Objective, WeightedTerm
from tests.processes import torchrun

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums round otherwise in other batches
LINEAR = {"name": "linear_gaussian", "operator": [1.2, -0.8], "observation": -1.0, "noise_std": 1.0}


@pytest.fixture
def images(tmp_path):
    torch.manual_seed(0)
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=()))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return str(save_model(model, tmp_path / "images.safetensors"))


@pytest.fixture
def vectors(tmp_path):
    torch.manual_seed(0)
    model = MetaFlowMap(MLP(2, 16, 1))
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return str(save_model(model, tmp_path / "vectors.safetensors"))


def predicted(folder: Path) -> dict[str, torch.Tensor]:
    """All that was written, in the order of the samples' index."""
    parts = [load_file(path) for path in sorted(folder.glob("batch_*.safetensors"))]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = whole["index"].argsort()
    assert torch.equal(whole["index"][order], torch.arange(len(order)))  # each sample once
    return {name: value[order] for name, value in whole.items()}


def predict(folder: Path, module: L.LightningModule, data: L.LightningDataModule) -> dict[str, torch.Tensor]:
    trainer = L.Trainer(
        default_root_dir=folder, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.predict(module, data, return_predictions=False)
    return predicted(folder / "predict")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        if name not in ("index", "label", "rewards", "best_rewards"):  # and no two samples are alike
            assert len(value.flatten(1).unique(dim=0)) == len(value), name


METHODS = [
    Steering(DrawGradientFree(4), TimeGrid(4), "sde"),
    Search(2, 2, steps=3),
    BestOfN(5, steps=3, max_rows=7),
    FeynmanKac(num_particles=3, grid=TimeGrid(4)),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_aligned_samples_do_not_depend_on_the_batch_size(tmp_path, images, method):
    found = {}
    for size in (1, 3, 8):
        settings = TargetSettings(images, "brightness", PixelDecoder(), reward_scale=5.0)
        data = NoiseDataModule([1, 8, 8], 8, 10, [7, 3, 5], size)
        found[size] = predict(tmp_path / str(size), RewardAlignment(settings, method, 3, pictures=0, seed=0), data)
        assert_same(found[size], found[1])
    settings = TargetSettings(images, "brightness", PixelDecoder(), reward_scale=5.0)
    other = predict(tmp_path / "other", RewardAlignment(settings, method, 3, pictures=0, seed=1), data)
    assert not torch.allclose(other["states"], found[8]["states"], **CLOSE)


def test_noise_is_that_of_the_sample():
    """Sample i's is drawn from the seed and i, as in `mfm sample`; labels come in turn."""
    data = NoiseDataModule([1, 8, 8], 7, 10, [7, 3, 5], 3, seed=4)
    batches = list(data.predict_dataloader())
    assert [len(x0) for x0, _ in batches] == [3, 3, 1]
    x0, index, label = (
        torch.cat([x0 for x0, _ in batches]),
        *(torch.cat([given[name] for _, given in batches]) for name in ("index", "label")),
    )
    assert index.tolist() == list(range(7))
    assert label.tolist() == [7, 3, 5, 7, 3, 5, 7]
    wanted = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(noise_seed(4, i))) for i in range(7)]
    assert torch.equal(x0, torch.stack(wanted))


def test_samples_of_policies_do_not_depend_on_the_batch_size(tmp_path, vectors):
    found = {}
    for size in (1, 3, 8):
        data = GaussianMixtureDataModule(batch_size=size, num_test=8)
        found[size] = predict(tmp_path / str(size), RewardFinetuning(TargetSettings(vectors, LINEAR)), data)
        assert_same(found[size], found[1])
    assert found[1]["base"].shape == (8, 2)


@pytest.mark.parametrize("kind", ["mixture", "images"])
def test_draws_of_evaluations_do_not_depend_on_the_batch_size(tmp_path, vectors, images, kind):
    found = {}
    for size in (1, 3, 8):
        if kind == "mixture":
            network, data = load_model(vectors).network, GaussianMixtureDataModule(batch_size=size, num_test=8)
            evaluation = MixtureEvaluation([0.3])
        else:
            network, data = load_model(images).network, DigitsDataModule(batch_size=size)
            evaluation = ImageEvaluation(refinement_steps=(2,), ode_steps=3, times=(0.3,))
            data.setup()
            data.splits["test"] = tuple(part[:8] for part in data.splits["test"])
            data.setup = lambda stage: None
        module = MFMPretraining(
            network, Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")]), evaluation=evaluation
        )
        found[size] = predict(tmp_path / str(size), module, data)
        assert_same(found[size], found[1])


def test_batches_without_an_index_are_numbered_as_they_are_dealt_out():
    """Ten samples in batches of three, on one device and on two, each sample with its number as its value."""

    class Rank:
        def __init__(self, rank, world_size):
            self.global_rank, self.world_size = rank, world_size

    for world_size in (1, 2):
        for rank in range(world_size):
            x = torch.arange(rank, 10, world_size)
            numbers, batches = SampleNumbers(), DataLoader(TensorDataset(x, x % 2), batch_size=3)
            for k, batch in enumerate(batches):
                found, given = numbers(batch, k, Rank(rank, world_size))
                assert torch.equal(given["index"], found)
                assert torch.equal(given["label"], found % 2)


@pytest.mark.slow
def test_aligned_samples_do_not_depend_on_the_number_of_devices(tmp_path, images):
    """Two processes (gloo), batches of three, against one, batches of eight."""
    config = {
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False},
        "model": {
            "class_path": "mfm_lightning.modules.RewardAlignment",
            "init_args": {
                "target": {"model": images, "reward": "brightness", "reward_scale": 5.0,
                           "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"}},
                "method": {"class_path": "mfm_lightning.alignment.FeynmanKac",
                           "init_args": {"num_particles": 3, "grid": {"steps": 4}}},
                "base_steps": 3,
            },
        },
        "data": {
            "class_path": "mfm_lightning.data.NoiseDataModule",
            "init_args": {"state_shape": [1, 8, 8], "num_samples": 11, "num_classes": 10, "labels": [7, 3, 5]},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for ranks, size in ((1, 8), (2, 3)):
        options = [f"--trainer.default_root_dir={ranks}", f"--trainer.devices={ranks}"]
        options += ["--trainer.strategy=ddp"] if ranks > 1 else []
        torchrun(tmp_path, ranks, "predict", "--config=config.yaml", *options, f"--data.init_args.batch_size={size}")
    found, wanted = predicted(tmp_path / "2/predict"), predicted(tmp_path / "1/predict")
    assert len(wanted["states"]) == 11
    assert_same(found, wanted)
