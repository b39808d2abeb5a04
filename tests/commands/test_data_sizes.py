"""A network's sizes are said once: what a config leaves out is the data's, in every command, and in what is saved."""

import json
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from mfm_lightning.checkpoints import load_model, load_value, read_metadata, save_model
from mfm_lightning.commands.config_plan import plan_config
from mfm_lightning.commands.data_sizes import fill_sizes, missing_sizes
from mfm_lightning.commands.main import run
from mfm_lightning.data import DigitsDataModule, NoiseDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT, UNet, ValueDiT
from tests.inputs.tiny_runs import CONFIG, NETWORK

SIZES = {"input_size": 8, "in_channels": 1, "num_classes": 10}
LEFT_OUT = {k: v for k, v in NETWORK.items() if k not in SIZES}
DIT = {"class_path": "mfm_lightning.networks.DiT", "init_args": LEFT_OUT}
TARGET = {"reward": "brightness", "decoder": {"class_path": "mfm_lightning.networks.PixelDecoder"}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(network: dict, **more) -> str:
    """The path of a config with this network."""
    model = CONFIG["model"] | {"init_args": CONFIG["model"]["init_args"] | {"network": network}}
    Path("job.yaml").write_text(yaml.safe_dump(CONFIG | {"model": model} | more))
    return "job.yaml"


def fit(path: str, steps: int, *more: str):
    return run(["fit", "--config", path, "--trainer.default_root_dir=out", f"--trainer.max_steps={steps}", *more])


def test_a_fit_takes_them_from_the_data_and_saves_them(caplog):
    with caplog.at_level(logging.INFO):
        fit(job(DIT), 2)
    said = "network: input_size 8, in_channels 1, num_classes 10, of the data (DigitsDataModule)"
    assert caplog.text.count(said) == 1
    assert load_model("out/model.safetensors").network.config == DiT(**NETWORK).config
    saved = yaml.safe_load(Path("out/logs/tensorboard/config.yaml").read_text())
    assert SIZES.items() <= saved["model"]["init_args"]["network"]["init_args"].items()
    assert saved["data"]["class_path"] == "mfm_lightning.data.DigitsDataModule"
    assert fit("job.yaml", 4, "--ckpt_path=last").trainer.global_step == 4
    assert fit("out/logs/tensorboard/config.yaml", 6, "--ckpt_path=last").trainer.global_step == 6
    assert torch.load("out/last.ckpt", weights_only=True)["global_step"] == 6
    run(["validate", "--config", "job.yaml", "--trainer.default_root_dir=out"])


def test_the_same_network_comes_of_sizes_that_are_given(caplog):
    """What is trained does not depend on who says them; nothing is said then."""
    fit(job(DIT), 2)
    ours = load_model("out/model.safetensors").network.state_dict()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        fit(job({**DIT, "init_args": NETWORK}), 2, "--overwrite")
    assert "of the data" not in caplog.text
    for name, weight in load_model("out/model.safetensors").network.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)


def test_some_may_be_given_and_must_fit():
    fit(job({**DIT, "init_args": LEFT_OUT | {"num_classes": 10}}), 1)
    for wrong, message in (
        ({"num_classes": 7}, "data of 10 classes, but the network has 7"),
        ({"in_channels": 3}, r"data of shape \(1, 8, 8\), but the network takes \(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(job({**DIT, "init_args": LEFT_OUT | wrong}), 1, "--overwrite")


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ({"class_path": "mfm_lightning.networks.UNet.small"}, UNet),
        (
            {"class_path": "mfm_lightning.networks.UNet", "init_args": {"channels": 16, "channel_multipliers": [1, 1]}},
            UNet,
        ),
        ({"class_path": "mfm_lightning.networks.DiT.S", "init_args": {"patch_size": 4, "guidance_scales": []}}, DiT),
    ],
)
def test_sizes_by_name(network, kind):
    fit(job(network), 1)
    made = load_model("out/model.safetensors").network
    assert isinstance(made, kind)
    assert (made.state_shape, made.num_classes) == ((1, 8, 8), 10)
    header = read_metadata("out/model.safetensors")
    assert header["network"] == kind.__name__
    assert SIZES.items() <= json.loads(header["config"]).items()


def test_a_value_network_and_noise(caplog):
    """The network of values by the data, the noise of `mfm predict` by the model."""
    save_model(MetaFlowMap(DiT(**NETWORK)), "model.safetensors")
    target = {"model": "model.safetensors", **TARGET}
    network = {"class_path": "mfm_lightning.networks.ValueDiT"}
    network["init_args"] = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = {"class_path": "mfm_lightning.modules.ValueEstimation", "init_args": {"network": network, "target": target}}
    fit(job(DIT, model=model, export={"filename": "value.safetensors"}), 1)
    made = load_value("out/value.safetensors")
    assert isinstance(made, ValueDiT)
    assert (made.state_shape, made.num_classes) == ((1, 8, 8), 10)

    method = {"class_path": "mfm_lightning.alignment.BestOfN", "init_args": {"num_candidates": 2, "steps": 2}}
    config = {
        "trainer": {"default_root_dir": "steer", "logger": False, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {
            "class_path": "mfm_lightning.modules.RewardAlignment",
            "init_args": {"target": target, "method": method, "base_steps": 2},
        },
        "data": {"class_path": "mfm_lightning.data.NoiseDataModule", "init_args": {"num_samples": 3, "labels": [4, 2]}},
    }
    Path("steer.yaml").write_text(yaml.safe_dump(config))
    with caplog.at_level(logging.INFO):
        done = run(["predict", "--config", "steer.yaml", "--return_predictions", "false"])
    assert "noise: state_shape (1, 8, 8), of the model" in caplog.text
    same = NoiseDataModule([1, 8, 8], 3, 10, [4, 2])
    for i in range(3):
        assert torch.equal(done.datamodule.sample(i)[0], same.sample(i)[0])
        assert done.datamodule.sample(i)[1] == same.sample(i)[1]
    with pytest.raises(ValueError, match=r"labels \[11\] must lie in 0..10"):
        run(["predict", "--config", "steer.yaml", "--data.init_args.labels=[11]"])
    with pytest.raises(ValueError, match="the noise has no sizes yet"):
        NoiseDataModule().sample(0)
    with pytest.raises(ValueError, match="noise of no state_shape: give it"):
        NoiseDataModule().setup()


def test_a_plan_takes_them_from_the_data_and_needs_them_there():
    plan, given = plan_config(job(DIT)), plan_config(job({**DIT, "init_args": NETWORK}))
    assert (plan.parameters, plan.flops) == (given.parameters, given.flops)
    data = {"class_path": "mfm_lightning.data.ImageDataModule", "init_args": {"source": "nowhere", "batch_size": 4}}
    with pytest.raises(ValueError, match=r"leaves the network's input_size, .* to its data: no images at nowhere"):
        plan_config(job(DIT, data=data))
    assert plan_config(job({**DIT, "init_args": NETWORK}, data=data)).batch_size == 4


class Counted(DigitsDataModule):
    made = 0

    def __init__(self, batch_size: int = 4):
        super().__init__(batch_size)
        type(self).made += 1


class Silent(L.LightningDataModule):
    """Says nothing."""


def test_the_data_are_made_once(monkeypatch):
    monkeypatch.setattr(Counted, "made", 0)
    done = fit(job(DIT, data={"class_path": f"{__name__}.Counted"}), 1)
    assert Counted.made == 1
    assert isinstance(done.datamodule, Counted)


def test_data_that_do_not_say_them_are_named():
    with pytest.raises(ValueError, match=r"DiT needs input_size, in_channels, num_classes, and the data \(Silent\)"):
        fit(job(DIT, data={"class_path": f"{__name__}.Silent"}), 1)
    vectors = {"class_path": "mfm_lightning.data.GaussianMixtureDataModule"}
    with pytest.raises(ValueError, match=r"of square images, and the data \(.*\) have states \(2,\)"):
        fit(job(DIT, data=vectors), 1)
    network = {"class_path": "a.Network", "init_args": {"num_classes": None, "width": None}}
    assert missing_sizes(network) == ["num_classes"]
    fill_sizes(network, DigitsDataModule())
    assert network["init_args"] == {"num_classes": 10, "width": None}
    assert missing_sizes(network) == missing_sizes(None) == []


@pytest.mark.parametrize("kind", [DiT, UNet, ValueDiT])
def test_in_python_they_are_not_guessed(kind):
    with pytest.raises(ValueError, match=rf"a {kind.__name__} needs in_channels, num_classes \(0: none\): give them"):
        kind(8)
    if kind is not ValueDiT:
        with pytest.raises(ValueError, match=rf"a {kind.__name__} needs state_shape"):
            getattr(kind, "S" if kind is DiT else "small")()


def test_sizes_of_a_dit_by_name_are_those_of_the_paper():
    for name, parameters in (("B", 134.65e6), ("XL", 683.99e6)):  # of the release, at patch 2
        with torch.device("meta"):
            network = getattr(DiT, name)((4, 32, 32), num_classes=1000)
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == pytest.approx(parameters, rel=1e-4)
        assert (network.state_shape, network.num_classes, network.patch_size) == ((4, 32, 32), 1000, 2)
    with pytest.raises(ValueError, match=r"a DiT takes square images"):
        DiT.S((4, 32, 16), num_classes=3)
