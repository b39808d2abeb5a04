"""A network, term, optimiser, data module, evaluation, reward, method and suite of a user's own, each in a file outside
the package, through fit, test, predict, sample, benchmark and reload."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mfm_lightning.checkpoints import CheckpointError, check_network, load_model, read_metadata, save_model
from mfm_lightning.commands.main import main, run
from mfm_lightning.models import MetaFlowMap

OWN = Path(__file__).parents[1] / "own"
MODEL = "outputs/own/model.safetensors"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the user's module and config, as the current one."""
    for name in ("my_parts.py", "own.yaml"):
        shutil.copy(OWN / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    yield tmp_path
    sys.modules.pop("my_parts", None)
    from mfm_rewards import registry

    registry._FACTORIES.pop("left_half", None)


def settings() -> dict:
    return yaml.safe_load(Path("own.yaml").read_text())


def write(name: str, config: dict) -> str:
    Path(name).write_text(yaml.safe_dump(config))
    return name


@pytest.mark.slow
def test_all_of_the_users_own(workplace, capsys):
    run(["fit", "--config", "own.yaml"])
    header = read_metadata(MODEL)
    assert (header["network"], json.loads(header["config"])) == (
        "my_parts.SmallNet",
        {"side": 8, "width": 16, "num_classes": 10},
    )
    rows = list(csv.DictReader(Path("outputs/own/logs/csv/metrics.csv").read_text().splitlines()))
    assert any(row["train/Huber"] for row in rows)
    assert len([row for row in rows if row["val/loss"]]) == 2
    # SGD with StepLR of 0.1 every two steps: 0.5, 0.5, 0.05, 0.05, 0.005, 0.005, then 0.0005
    state = torch.load("outputs/own/last.ckpt", weights_only=True)
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"]) == (pytest.approx(0.0005), 0.5)
    # in another process, which has not imported it
    code = f"import mfm_lightning; m = mfm_lightning.load_model('{MODEL}'); print(type(m.network).__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "my_parts\n"

    # tested with its own last checkpoint
    main(["test", "--config", "own.yaml"])
    found = capsys.readouterr().out
    assert "test/range" in found or Path("outputs/own/test").exists()

    # a teacher and a start for others
    distilled = settings()
    arguments = distilled["model"]["init_args"]
    distilled["trainer"]["default_root_dir"] = "outputs/distilled"
    arguments["objective"] = {"terms": [{"name": "eulerian_teacher"}]}
    arguments |= {
        "teacher": {"class_path": "mfm_lightning.CheckpointTeacher", "init_args": {"path": MODEL}},
        "initial": MODEL,
    }
    run(["fit", "--config", write("distilled.yaml", distilled)])
    model = load_model("outputs/distilled/model.safetensors")
    assert model.sample_posterior(torch.zeros(2, 1, 8, 8), 0.5, 3).shape == (2, 3, 1, 8, 8)

    # sampled, steered by a reward and a method of the user's
    run(["sample", "outputs/distilled/model.safetensors", "--output", "samples", "--num_samples", "3", "--steps", "2"])
    assert len(list(Path("samples").glob("*.png"))) == 3
    steer = ["predict", "--config", "digits/steer", "--data.init_args.num_samples=4", "--imports", "my_parts"]
    steer += ["--model.init_args.target.model=outputs/distilled/model.safetensors", "--model.init_args.base_steps=2"]
    steer += ["--model.init_args.target.reward=left_half", "--return_predictions=false"]
    run([*steer, "--model.init_args.method=my_parts.Ascent", "--model.init_args.method.init_args.size=2.0"])
    summary = json.loads(Path("outputs/digits/steer/predict/summary.json").read_text())
    assert summary["mean_reward"] > summary["mean_reward_before"]
    assert summary["method"]["name"] == "ascent"

    # a suite
    run(["benchmark", "my_parts.MySuite", "--throws", "7"])
    assert "heads of 7" in Path("outputs/benchmarks/coin/report/index.html").read_text()


def test_a_reward_by_its_path_and_by_its_name(workplace, capsys):
    run(["rewards", "--check", "my_parts.left_half"])
    assert "left_half" in capsys.readouterr().out
    run(["rewards", "--imports", "my_parts"])
    assert "left_half" in capsys.readouterr().out
    run(["rewards", "--imports", "my_parts", "--check", "left_half"])


def test_what_a_network_lacks_is_said_before_training(workplace, capsys):
    text = Path("my_parts.py").read_text()
    for removed, message in {
        "    @property\n    def null_conditions(self) -> Conditions:\n"
        "        return Conditions(label=self.num_classes, guidance=1.0)\n": "a SmallNet has no null_conditions",
        "    guidance_scales = ()\n": "a SmallNet has no guidance_scales",
    }.items():
        assert removed in text
        Path("my_parts.py").write_text(text.replace(removed, ""))
        sys.modules.pop("my_parts", None)
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", "own.yaml"])
        assert message in str(stopped.value)
        assert not Path("outputs/own/last.ckpt").exists()


@pytest.mark.parametrize(
    ("part", "line", "command"),
    [
        ("network", "        times, label = torch.stack([s, u, t], dim=1), self.embedding(conditions.label)", "fit"),
        ("data", "        digits = load_digits()", "fit"),
        ("term", "        return residual.clamp(-self.bound, self.bound)", "fit"),
    ],
)
def test_what_raises_in_a_part_is_shown_with_its_line(part, line, command, workplace):
    text = Path("my_parts.py").read_text()
    assert text.count(line) == 1
    Path("my_parts.py").write_text(text.replace(line, f"        raise ValueError('no such {part}')\n{line}"))
    number = text[: text.index(line)].count("\n") + 1
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", "own.yaml"])
    said = str(stopped.value.code)
    assert f"no such {part}" in said
    assert f"my_parts.py:{number} in " in said
    assert f"raise ValueError('no such {part}')" in said


def test_a_network_that_a_file_could_not_make_again_is_refused(workplace):
    import my_parts

    network = my_parts.SmallNet(width=16)
    with pytest.raises(CheckpointError, match=r"a SmallNet has no config.*dictionary of its constructor's arguments"):
        save_model(MetaFlowMap(network), "model.safetensors")
    network.config = {"width": 32}
    with pytest.raises(CheckpointError, match=r"embedding.weight has shape \(11, 32\), the network's \(11, 16\)"):
        check_network(network)
    network.config = {"breadth": 16}
    with pytest.raises(CheckpointError, match=r"does not make a my_parts\.SmallNet again"):
        check_network(network)
    network.config = {"width": 16}
    check_network(network)

    # a constructor that reads numbers, as of torch.linspace(...).item(), cannot be called without memory
    class Looks(my_parts.SmallNet):
        def __init__(self, width: int = 16) -> None:
            super().__init__(width=width)
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
            self.config = {"width": width}

    Looks.__module__, Looks.__qualname__ = "my_parts", "Looks"
    check_network(Looks())

    class Local(my_parts.SmallNet):
        config: dict = {}  # noqa: RUF012

    with pytest.raises(CheckpointError, match="its class must stand in a module of its own"):
        check_network(Local())


@pytest.mark.parametrize(
    "name", ["torch.nn.Linear", "subprocess.Popen", "my_parts.left_half", "my_parts.gone", "gone.Net"]
)
def test_a_file_cannot_have_anything_else_made(workplace, name):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, "model.safetensors", {"network": name, "config": "{}"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model("model.safetensors")


def test_a_plain_data_module_lacks_what_an_evaluation_needs(workplace, capsys):
    config = settings()
    config["model"]["init_args"]["evaluation"] = {"class_path": "mfm_lightning.evaluation.ImageEvaluation"}
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", write("images.yaml", config)])
    said = str(stopped.value)
    assert "ImageEvaluation needs of PlainDigits also splits: data that fit in memory" in said
    assert "decode(x): images in [0, 1] of states" in said
    assert not Path("outputs/own/last.ckpt").exists()


def test_the_cli_without_a_run(workplace):
    from mfm_lightning.commands.fit import MFMCLI

    cli = MFMCLI(["--config", "own.yaml"], run=False)
    assert cli.model.state_shape == (1, 8, 8)
    assert cli.trainer.max_steps == 6
    cli.trainer.fit(cli.model, cli.datamodule)
    assert Path(MODEL).is_file()
