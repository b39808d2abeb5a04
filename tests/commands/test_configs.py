"""Every config runs, in the order in which they build on each other, made short."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mfm_benchmarks.parts.shard_readers import random_shards
from mfm_lightning.checkpoints import (
    CheckpointError,
    import_checkpoint,
    load_classifier,
    load_model,
    load_value,
    save_model,
)
from mfm_lightning.commands.main import run
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.networks import DiT
from tests.latent_data import small_vae
from tests.parity import NOT_IN_SHAPES, weights
from tests.short_jobs import DATA_MODULE, EVALUATION, short
from tests.tiny_rewards import tiny_rewards

ROOT = Path(__file__).parents[2]
# a config that is not here is a config that is not tested
FIT = ["digits/flow", "digits/mfm", "digits/mfm_from_data", "digits/value", "gmm/mfm", "gmm/mean_flow", "gmm/semigroup"]
FIT += ["digits/finetune", "gmm/value", "gmm/finetune"]
FIT += [f"mnist/{name}" for name in ("flow", "mfm", "mfm_from_data", "classifier", "features", "value", "finetune")]
FIT += ["fashion/flow", "fashion/mfm"]
PREDICT = ["digits/steer", "mnist/steer", "mnist/search", "fashion/steer"]
SHAPES = {"digits": (1, 8, 8), "gmm": (2,), "mnist": (1, 28, 28), "fashion": (1, 28, 28)}


def test_every_config_is_tested():
    # benchmarks are test_benchmarks.py's, pictures are docs/test_own_data.py's
    jobs = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "configs").glob("*/*.yaml")
        if p.parent.name not in ("benchmarks", "imagenet256", "pictures")
    }
    assert jobs == {f"configs/{name}.yaml" for name in FIT + PREDICT}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIT)
def test_every_config_runs(name, folder, fitted):
    fitted(name)
    output = Path(yaml.safe_load(Path(f"configs/{name}.yaml").read_text())["trainer"]["default_root_dir"])
    assert (output / "last.ckpt").is_file()
    exported = output / ("value.safetensors" if "value" in name else "model.safetensors")
    classifier = name in ("mnist/classifier", "mnist/features")
    if classifier:
        assert load_classifier(str(exported))(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    else:
        load = load_value if "value" in name else load_model
        assert tuple(load(exported).state_shape) == SHAPES[name.split("/")[0]]
    rows = list(csv.DictReader((output / "logs/csv/metrics.csv").read_text().splitlines()))
    assert any(row["train/loss"] for row in rows)
    assert classifier or "value" in name or list((output / "pictures").rglob("*.png"))


@pytest.mark.slow
def test_a_run_may_be_shorter_than_an_interval_of_validation(folder, fitted):
    fitted("gmm/mfm")
    run(["fit", "--config", "configs/gmm/mfm.yaml", "--trainer.max_steps=2", "--overwrite"])
    assert torch.load("outputs/gmm/mfm/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_imagenet_configs_run_at_a_small_width(folder, caplog):
    """Each on shards of the same layout, with smaller latents, networks, VAE and reward networks, on one device."""
    shape = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2}
    network = [f"--model.init_args.network.init_args.{k}={v}" for k, v in shape.items()]
    encoder = ["--model.init_args.network.init_args.encoder_depth=1"]
    random_shards(Path("data/imagenet256/latents"), 32, 16, (4, 8, 8))
    torch.manual_seed(0)
    for name, source in (("sit_b2", "sit"), ("dmf_xl2", "dmf")):  # with the convention of time that importing gives
        save_file(weights(source), f"{source}.safetensors")
        flip = import_checkpoint(f"{source}.safetensors", source, **NOT_IN_SHAPES).network.flip_time
        model = MetaFlowMap(DiT(**shape, in_channels=4, encoder_depth=1, num_classes=1000, flip_time=flip))
        save_model(model, f"checkpoints/imagenet256/{name}.safetensors")
    small_vae(Path("checkpoints/sd-vae-ft-mse"), blocks=1)
    small = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
    small += ["--trainer.limit_val_batches=1", "--trainer.devices=1", "--trainer.strategy=auto"]
    small += [f"{DATA_MODULE}.batch_size=4", f"{DATA_MODULE}.num_workers=0"]
    zoo = {name: {"name": name, **options} for name, options in tiny_rewards(Path("rewards")).items()}

    def reward(job, name):
        assert name in Path(f"configs/imagenet256/{job}.yaml").read_text()  # the config's own reward, but for its size
        return f"--model.init_args.target.reward={json.dumps(zoo[name])}"

    eager = ["--model.init_args.execution.compile=false"]
    base = ["flow_b2", "mfm_b2", "mfm_xl2", "mfm_b2_from_data"]
    configs = {p.stem for p in Path("configs/imagenet256").glob("*.yaml")}
    assert configs == {*base, "value", "steer", "search", "finetune"}
    other_time = "--model.init_args.network.init_args.flip_time=false"
    with pytest.raises(ValueError, match=r"sit_b2.safetensors: another architecture .* flip_time True there, False"):
        run(["fit", "--config", "configs/imagenet256/mfm_b2.yaml", *small, *network, *encoder, *eager, other_time])
    for name in base:
        run(["fit", "--config", f"configs/imagenet256/{name}.yaml", *small, *network, *encoder, *eager])
        assert load_model(f"outputs/imagenet256/{name}/model.safetensors").state_shape == (4, 8, 8)
    run(["fit", "--config", "configs/imagenet256/value.yaml", *small, *network, reward("value", "image_reward")])
    held_out = {"ImageReward": zoo["image_reward"], "PickScore": zoo["pickscore"]}
    policy = [f"{EVALUATION}.{o}" for o in ("num_samples=4", "ode_steps=2", f"held_out={json.dumps(held_out)}")]
    run(["fit", "--config", "configs/imagenet256/finetune.yaml", *small, reward("finetune", "hpsv2"), *policy])
    table = next(Path("outputs/imagenet256/finetune/pictures").rglob("policy.json"))
    assert {"reward", "ImageReward", "PickScore"} < set(json.loads(table.read_text())[1])
    steps = {"steer": "grid.steps", "search": "steps"}
    for job in ("steer", "search"):
        options = [f"{DATA_MODULE}.num_samples=2", f"{DATA_MODULE}.batch_size=2", f"{DATA_MODULE}.state_shape=[4,8,8]"]
        options += [f"--model.init_args.method.init_args.{steps[job]}=2", "--model.init_args.base_steps=2"]
        config = f"configs/imagenet256/{job}.yaml"
        run(["predict", "--config", config, *options, reward(job, "image_reward"), "--return_predictions=false"])
        assert Path(f"outputs/imagenet256/{job}/predict/summary.json").is_file()


@pytest.mark.slow
def test_value_and_steering_on_digits(folder, digits_outputs, fitted):
    run(short("test", "digits/value"))
    table = Path("outputs/digits/value/test/value_estimates.json")
    names = ["MFM 1", "MFM 2", "MFM 4", "GLASS 1", "GLASS 2", "SDE 3", "DPS point estimate"]
    assert [row["estimator"] for row in json.loads(table.read_text())] == names
    fitted("digits/value")
    run([*short("test", "digits/value"), "--ckpt_path=outputs/digits/value/last.ckpt"])
    assert [row["estimator"] for row in json.loads(table.read_text())] == [*names, "network"]
    assert (table.parent / "r_against_nfe.png").stat().st_size > 1000
    checkpoint = torch.load("outputs/digits/value/last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"network"}
    assert checkpoint["frozen"]["model"] == "outputs/digits/mfm/model.safetensors"
    steer = ["predict", "--config", "configs/digits/steer.yaml", "--return_predictions=false"]
    steer += ["--data.init_args.num_samples=4", "--model.init_args.method.init_args.grid.steps=3"]
    run(steer)
    summary = json.loads(Path("outputs/digits/steer/predict/summary.json").read_text())
    assert summary["samples"] == 4
    assert summary["nfe_per_sample"] == 3 + 4 * 4 * 3  # K + 4 N K
    network = "--model.init_args.method.init_args.estimator={class_path: mfm_lightning.alignment.NetworkGradient, "
    run([*steer, "--overwrite", network + "init_args: {network: outputs/digits/value/value.safetensors}}"])
    summary = json.loads(Path("outputs/digits/steer/predict/summary.json").read_text())
    assert summary["method"]["estimator"] == "NetworkGradient"
    assert summary["nfe_per_sample"] == 3 + 2 * 3  # no draws, no reward


@pytest.mark.slow
def test_another_teacher_than_the_one_of_the_run_is_refused(folder, digits_outputs):
    again = ["--config", "configs/digits/mfm.yaml", "--ckpt_path", "outputs/digits/mfm/last.ckpt"]
    checkpoint = torch.load("outputs/digits/mfm/last.ckpt", weights_only=True)
    assert not [k for k in checkpoint["state_dict"] if "teacher" in k]
    assert checkpoint["frozen"]["teacher"]["path"] == "outputs/digits/flow/model.safetensors"
    save_model(load_model("outputs/digits/mfm/model.safetensors"), "outputs/digits/flow/model.safetensors")
    with pytest.raises(CheckpointError, match="was trained with teacher"):
        run(["fit", *again, "--trainer.max_steps=8"])
