"""Training as a user runs it: through the command line, interrupted, resumed, and given bad input."""

import csv
import json
import pickle
import re
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mfm_benchmarks.parts.shard_readers import random_shards
from mfm_lightning.callbacks import EMA
from mfm_lightning.checkpoints import CheckpointError, import_checkpoint, load_model, load_value, save_model
from mfm_lightning.commands.main import main, run
from mfm_lightning.conditions import Conditions
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, NonFiniteLossError, Optimization, check_batch
from mfm_lightning.networks import MLP, DiT
from mfm_lightning.objectives import Objective, WeightedTerm
from tests.latent_data import small_vae
from tests.parity import ARCHITECTURE, DATA, NOT_IN_SHAPES, weights
from tests.short_jobs import FOUR_STEPS
from tests.tiny_rewards import tiny_rewards

ROOT = Path(__file__).parents[2]
EVALUATION, DATA_MODULE = "--model.init_args.evaluation.init_args", "--data.init_args"
FITS = {  # by config: what makes the rest of a fit short
    "digits/finetune": [
        f"{EVALUATION}.samples_per_class=3", f"{EVALUATION}.ode_steps=3", f"{EVALUATION}.pictures=10",
        f"{DATA_MODULE}.buffer_size=64", f"{DATA_MODULE}.ode_steps=2",
    ],
    "gmm/finetune": [
        f"{EVALUATION}.num_samples=64", f"{EVALUATION}.ode_steps=3",
        f"{DATA_MODULE}.buffer_size=64", f"{DATA_MODULE}.ode_steps=2",
    ],
}  # fmt: skip
SMALL_IMAGES = [f"{EVALUATION}.{option}" for option in ("num_samples=64", "ode_steps=10", "glass_steps=5")]


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mfm"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the configs in it, as the current one."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# the order in which they build on each other; a config that is not here is a config that is not tested
FIT = ["digits/flow", "digits/mfm", "digits/mfm_from_data", "digits/value", "gmm/mfm", "gmm/mean_flow", "gmm/semigroup"]
FIT += ["digits/finetune", "gmm/value", "gmm/finetune"]
PREDICT = ["digits/steer"]


@pytest.mark.slow
def test_every_config_runs(folder):
    # benchmarks are test_benchmarks.py's
    jobs = {str(p) for p in Path("configs").glob("*/*.yaml") if p.parent.name not in ("benchmarks", "imagenet256")}
    assert jobs == {f"configs/{name}.yaml" for name in FIT + PREDICT}
    for name in FIT:
        config = f"configs/{name}.yaml"
        run(["fit", "--config", config, *FOUR_STEPS, *FITS.get(name, [])])
        output = Path(yaml.safe_load(Path(config).read_text())["trainer"]["default_root_dir"])
        assert (output / "last.ckpt").is_file()
        exported = output / ("value.safetensors" if "value" in name else "model.safetensors")
        load = load_value if "value" in name else load_model
        assert tuple(load(exported).state_shape) == ((1, 8, 8) if "digits" in name else (2,))
        rows = list(csv.DictReader((output / "logs/csv/metrics.csv").read_text().splitlines()))
        assert any(row["train/loss"] for row in rows)
        assert "value" in name or list((output / "pictures").rglob("*.png"))
    run(["fit", "--config", "configs/gmm/mfm.yaml", "--trainer.max_steps=2"])  # less than an interval of validation


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
        model = MetaFlowMap(DiT(**shape, encoder_depth=1, flip_time=flip))
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
    with pytest.raises(ValueError, match=r"sit_b2.safetensors has another architecture .* flip_time True there, False"):
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
def test_value_and_steering_on_digits(folder, digits_outputs):
    value = ["--config", "configs/digits/value.yaml"]
    options = ["num_states=8", "num_draws=4", "rollout_draws=4", "rollout_steps=3", "times=[0.3]", "glass_steps=[1, 2]"]
    small = [f"{EVALUATION}.{option}" for option in options]
    run(["test", *value, *small])
    table = Path("outputs/digits/value/test/value_estimates.json")
    names = ["MFM 1", "MFM 2", "MFM 4", "GLASS 1", "GLASS 2", "SDE 3", "DPS point estimate"]
    assert [row["estimator"] for row in json.loads(table.read_text())] == names
    run(["fit", *value, *FOUR_STEPS])
    run(["test", *value, *small, "--ckpt_path=outputs/digits/value/last.ckpt"])
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
    run([*steer, network + "init_args: {network: outputs/digits/value/value.safetensors}}"])
    summary = json.loads(Path("outputs/digits/steer/predict/summary.json").read_text())
    assert summary["method"]["estimator"] == "NetworkGradient"
    assert summary["nfe_per_sample"] == 3 + 2 * 3  # no draws, no reward


@pytest.mark.slow
def test_fit_test_predict_on_digits(folder, digits_outputs):
    again = ["--config", "configs/digits/mfm.yaml", "--ckpt_path", "outputs/digits/mfm/last.ckpt"]
    run(["test", *again, *SMALL_IMAGES])
    rows = json.loads(Path("outputs/digits/mfm/test/frechet.json").read_text())
    assert {"MFM, refinement 1", "MFM, refinement 4", "posterior, MFM 1"} <= {row["samples"] for row in rows}
    held_out = next(row for row in rows if row["samples"].startswith("held-out"))
    assert held_out["as labelled"] > 0.95  # the classifier's accuracy
    assert all(row["Fréchet"] > 3 * held_out["Fréchet"] for row in rows if row is not held_out)  # four steps: noise
    assert len(list(Path("outputs/digits/mfm/test").glob("*.png"))) == 5
    run(["predict", *again, "--return_predictions=false"])
    saved = torch.load("outputs/digits/mfm/predict/batch_0000.pt", weights_only=True)
    assert saved["draws/t=0.2"].shape == (len(saved["x1"]), 8, 1, 8, 8)
    checkpoint = torch.load("outputs/digits/mfm/last.ckpt", weights_only=True)
    assert not [k for k in checkpoint["state_dict"] if "teacher" in k]
    assert checkpoint["frozen"]["teacher"]["path"] == "outputs/digits/flow/model.safetensors"
    # another teacher than the one that the run was trained with is refused
    save_model(load_model("outputs/digits/mfm/model.safetensors"), "outputs/digits/flow/model.safetensors")
    with pytest.raises(CheckpointError, match="was trained with teacher"):
        run(["fit", *again, *FOUR_STEPS[1:], "--trainer.max_steps=8"])


@pytest.mark.slow
def test_the_readme_works_as_written(folder, capsys):
    """Its `mfm` commands in their order, made short, then its Python, all of it, in one session."""
    readme = (ROOT / "README.md").read_text()
    lines = [line for line in readme.splitlines() if re.match(r"mfm \w+ --config configs/(?!imagenet)", line)]
    commands = [line.split("#")[0].split() for line in lines]
    assert [c[1] for c in commands[:4]] == ["fit", "fit", "test", "predict"]
    tests = {  # by config: what makes its evaluation short
        "digits/mfm": ["num_samples=64", "ode_steps=5", "glass_steps=3"],
        "digits/value": ["num_states=4", "num_draws=2", "rollout_draws=2", "rollout_steps=2", "times=[0.3]"],
        "digits/finetune": ["samples_per_class=3", "steering.init_args.grid.steps=2"],
        "gmm/mfm": ["num_states=2"],
    }
    for command in commands:
        name, config = command[1], command[3].removeprefix("configs/").removesuffix(".yaml")
        small = [*FOUR_STEPS, *FITS.get(config, [])] if name == "fit" else []
        if name == "test":
            small = [f"{EVALUATION}.{option}" for option in tests[config]]
        elif config == "digits/steer":
            small = ["--data.init_args.num_samples=4", "--model.init_args.method.init_args.grid.steps=2"]
        run([*command[1:], *small])
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, namespace)
    assert namespace["draws"].shape == (4, 8, 1, 8, 8)
    assert Path("steered.png").stat().st_size > 100
    assert namespace["result"].rewards.shape == (16,)
    run(["validate", "--config", "configs/digits/mfm.yaml", "--ckpt_path", "outputs/digits/mfm/last.ckpt"])
    assert "val/loss" in capsys.readouterr().out


def digits_module() -> MFMPretraining:
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, guidance_scales=())
    return MFMPretraining(
        network,
        Objective([WeightedTerm("data_diagonal"), WeightedTerm("mean_flow")]),
        optimization=Optimization(learning_rate=1e-3, warmup_steps=3),
    )


class Interrupt(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "five.ckpt")


def trained(folder, steps: int, resume=None, callbacks=()):
    ema = EMA(0.9)
    module = digits_module()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=1, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", callbacks=[ema, *callbacks],
    )  # fmt: skip
    trainer.fit(module, DigitsDataModule(batch_size=32), ckpt_path=resume, weights_only=True if resume else None)
    return module, ema


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, whole_ema = trained(tmp_path, 10, callbacks=[Interrupt()])
    resumed, resumed_ema = trained(tmp_path, 10, resume=tmp_path / "five.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name, tensor in whole_ema.average.items():
        assert torch.equal(tensor, resumed_ema.average[name]), name
        assert not name.endswith("linear.weight") or not torch.equal(tensor, whole.state_dict()[name])


def test_ema_is_the_recursion_and_steps_aside(tmp_path):
    class Record(L.Callback):
        history: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, module, *_):
            self.history.append(module.model.network.final_layer.linear.bias.detach().clone())

    record = Record()
    start = digits_module().model.network.final_layer.linear.bias.detach().clone()
    module, ema = trained(tmp_path, 6, callbacks=[record])
    average = start
    for k, value in enumerate(record.history, start=1):
        decay = min(0.9, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * value
    name = "model.network.final_layer.linear.bias"
    torch.testing.assert_close(ema.average[name], average)
    assert "model.network.pos_embed" not in ema.average  # not trained, not averaged
    with ema.applied(module):
        torch.testing.assert_close(module.state_dict()[name], average)
    assert torch.equal(module.state_dict()[name], record.history[-1])


def test_non_finite_loss_stops_with_a_description(tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                batch[0][0] = float("nan")

    with pytest.raises(NonFiniteLossError, match=r"step 2 in data_diagonal.*batch of 32: mean nan"):
        trained(tmp_path, 10, callbacks=[Poison()])


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_fit_continues_from(folder, monkeypatch):
    step = MFMPretraining.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    config = ["fit", "--config", "configs/gmm/mfm.yaml", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
    monkeypatch.setattr(MFMPretraining, "training_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(config)
    assert stopped.value.code == 128 + signal.SIGINT
    assert torch.load("outputs/gmm/mfm/last.ckpt", weights_only=True)["global_step"] == 4
    monkeypatch.setattr(MFMPretraining, "training_step", step)
    run([*config, "--ckpt_path", "outputs/gmm/mfm/last.ckpt"])
    assert torch.load("outputs/gmm/mfm/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.objective.terms=[{name: eulerian}]"], "unknown objective 'eulerian'"),
        (["--model.init_args.network.class_path=mfm_lightning.networks.UNet"], "UNet"),
        (["--model.init_args.learning_rte=1"], "learning_rte"),
        (["--model.init_args.teacher=null"], "needs a teacher"),
        (["--model.init_args.network.init_args.dim=3"], "the teacher's states have shape (2,)"),
        (["--model.init_args.optimization.optimizer=sgd"], "unknown optimizer 'sgd'"),
    ],
)
def test_bad_configs_are_refused_before_training(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/gmm/mfm.yaml", *FOUR_STEPS, *arguments])
    assert message in str(stopped.value) + capsys.readouterr().err
    assert not Path("outputs/gmm/mfm/last.ckpt").exists()


def test_missing_teacher_says_what_to_run(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "configs/digits/mfm.yaml", *FOUR_STEPS])
    assert "fit the base flow first" in str(stopped.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 11])), "labels in 0..11, outside 0..10"),
        ((torch.zeros(4, 8, 8), torch.zeros(4).long()), r"expected float \(B, 1, 8, 8\)"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), "expected integers"),
        (torch.zeros(4, 1, 8, 8), r"must be \(x1, label\)"),
    ],
)
def test_bad_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch, (1, 8, 8), 10)


def test_bad_checkpoints_are_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "code.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"weights": Code()}, tmp_path / "code.ckpt")
    for name in ("code.pt", "code.ckpt"):
        with pytest.raises(CheckpointError, match="not a file of plain tensors"):
            import_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        import_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="unknown source 'edm'"):
        import_checkpoint(DATA / "official_mfm.safetensors", source="edm")
    save_model(MetaFlowMap(MLP()), tmp_path / "mlp.safetensors")
    with pytest.raises(CheckpointError, match="names missing"):
        import_checkpoint(tmp_path / "mlp.safetensors", **ARCHITECTURE)
    torch.save(MetaFlowMap(DiT(8, 2, 4, 32, 4, 4, 3, 10)).network.state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match=r"of another shape, first pos_embed: \(1, 16, 32\) in the file"):
        import_checkpoint(tmp_path / "narrow.pt", **ARCHITECTURE)


def test_save_and_load_are_exact(tmp_path):
    model = MetaFlowMap(DiT(8, 4, 1, 16, 2, 2, 1, num_classes=10, qk_norm=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    loaded = load_model(save_model(model, tmp_path / "model.safetensors"))
    x = torch.randn(3, 1, 8, 8)
    arguments = (0.2, 0.9, x, 0.4, x.flip(0), Conditions(label=5))
    assert torch.equal(loaded.velocity(*arguments), model.velocity(*arguments))
    with pytest.raises(ValueError, match=r"this network takes \(B, 1, 8, 8\)"):
        model.velocity(0.2, 0.9, x[:, 0], 0.4, x[:, 0])
    with pytest.raises(ValueError, match="not a scale that this network knows"):
        model.velocity(*arguments, guidance=4.0)
