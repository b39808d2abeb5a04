"""One door for models: paths, names of the package, Hugging Face ids; and files that are made to be published."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mfm_benchmarks.models import ModelSettings, Subject
from mfm_lightning.alignment.target import TargetSettings
from mfm_lightning.alignment.values import NetworkGradient
from mfm_lightning.checkpoints import (
    CheckpointError,
    find_weights,
    fingerprint,
    is_there,
    load_classifier,
    load_model,
    load_value,
    read_metadata,
    save_model,
    shipped,
)
from mfm_lightning.commands.main import main, run
from mfm_lightning.evaluation import MixtureEvaluation
from mfm_lightning.models import MetaFlowMap
from mfm_lightning.modules import MFMPretraining, RewardFinetuning
from mfm_lightning.networks import DiT, ImageClassifier, ValueDiT
from mfm_lightning.networks.files import save_network
from mfm_lightning.networks.results import measured_on
from mfm_lightning.objectives import CheckpointTeacher, Objective, WeightedTerm
from mfm_lightning.oracles import GaussianMixture

OPTIONS = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}


def small(seed: int = 0) -> MetaFlowMap:
    torch.manual_seed(seed)
    model = MetaFlowMap(DiT(**OPTIONS, encoder_depth=1, num_classes=0, guidance_scales=()))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that ships a model "tiny" with its flow, and a classifier; and an empty folder to work in."""
    folder = tmp_path / "weights/tiny"
    folder.mkdir(parents=True)
    for seed, name, kind in ((0, "mfm", "meta_flow_map"), (1, "flow", "base_flow")):
        save_model(small(seed), folder / f"{name}.safetensors", {"kind": kind, "decoder": "pixel"})
    save_network(ImageClassifier(1, 3, 4, 1), folder / "classifier.safetensors", {"kind": "classifier"})
    monkeypatch.setattr("mfm_lightning.checkpoints.names.SHIPPED", tmp_path / "weights")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_a_name_is_that_of_the_package_until_a_file_hides_it(package, caplog):
    assert sorted(shipped()) == ["tiny/classifier", "tiny/flow", "tiny/mfm"]
    assert find_weights("tiny") == package / "mfm.safetensors"
    assert find_weights("tiny/flow", "teacher") == package / "flow.safetensors"
    assert find_weights("tiny", "classifier") == package / "classifier.safetensors"
    assert not caplog.messages
    small(7).save_pretrained("tiny")  # a folder, as of Hugging Face
    assert find_weights("tiny") == Path("tiny/model.safetensors")
    assert "tiny is taken for the file tiny/model.safetensors here, not for the model of the package" in caplog.messages
    assert torch.equal(load_model("tiny").network.pos_embed, small(7).network.pos_embed)
    weight = load_model("tiny").network.final_layer.linear.weight
    assert torch.equal(weight, small(7).network.final_layer.linear.weight)


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("tyny", "model", "no model at tyny: did you mean tiny"),
        ("tiny/flwo", "teacher", "no teacher at tiny/flwo: did you mean tiny/flow"),
        ("tiny/flow/x", "classifier", "no classifier at tiny/flow/x: did you mean tiny/flow"),
        ("other", "model", "no model at other: fit it"),
        ("outputs/x/model.safetensors", "model", "no model at outputs/x/model.safetensors: fit it"),
        ("runs/mfm", "model", "no model at runs/mfm: fit it.*a checkpoint of runs/mfm is not in Hugging Face's cache"),
        ("tinny/flow", "model", r"did you mean tiny/flow\?.*a checkpoint of tinny/flow is not in Hugging Face's cache"),
        (
            "hf:tiny/flow",
            "model",
            "^no file at hf:tiny/flow, and a checkpoint of tiny/flow is not in Hugging Face's cache",
        ),
    ],
)
def test_what_is_nowhere_is_said_in_a_line(package, tmp_path, monkeypatch, name, what, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=message) as error:
        find_weights(name, what, "fit it")
    assert "\n" not in str(error.value)
    assert not is_there(name)


def test_without_huggingface_hub_the_hint_is_said_too(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no model at runs/mfm: fit it.*pip install huggingface-hub"):
        find_weights("runs/mfm", hint="fit it")


def test_a_repository_in_the_cache_is_loaded_by_its_id(package, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    small(3).save_pretrained(folder / "snapshots" / ("0" * 40))
    loaded = load_model("org/name")
    assert torch.equal(loaded.network.final_layer.linear.weight, small(3).network.final_layer.linear.weight)


def test_all_who_take_a_model_take_its_name(package):
    digest = fingerprint(package / "mfm.safetensors")
    target = TargetSettings("tiny", "brightness", None).load()
    assert (target.identity["model"], target.identity["sha256"]) == ("tiny", digest)
    teacher = CheckpointTeacher("tiny/flow")
    assert teacher.identity["sha256"] == fingerprint(package / "flow.safetensors")
    objective = Objective([WeightedTerm("eulerian_teacher")])
    module = MFMPretraining(small(5).network, objective, teacher, initial="tiny")
    assert torch.equal(module.model.network.final_layer.linear.weight, small(0).network.final_layer.linear.weight)
    settings = ModelSettings("tiny", decoder=None)
    assert not settings.missing()
    assert Subject(settings, torch.device("cpu")).identity["model"] == digest
    assert "no model at tyni" in ModelSettings("tyni").missing()[0]
    with pytest.raises(CheckpointError, match="is a base flow, which draws no posteriors"):
        TargetSettings("tiny/flow", "brightness").load()


def test_a_value_network_is_taken_by_its_name(package, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(6)
    network = ValueDiT(8, 4, 1, 16, 2, 2, num_classes=0)
    save_network(network, package / "value.safetensors", {"kind": "value"})
    Path("folder").mkdir()
    save_network(network, "folder/model.safetensors", {"kind": "value"})
    for name in ("tiny", "tiny/value", "folder"):
        loaded = NetworkGradient(name).network
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match="no value network at runs/value: fit it first"):
        load_value("runs/value")


def test_models_are_compared_by_their_names(package, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    caplog.set_level("INFO")
    evaluation = MixtureEvaluation([0.3], 2, 4, compare={"a": "tiny", "b": "runs/other"})
    module = SimpleNamespace(model=small(3), device=torch.device("cpu"))
    found = evaluation._sources(module, GaussianMixture([[0.0]]))
    assert "b-1" not in found
    weight = found["a-1"][1].model.network.final_layer.linear.weight
    assert torch.equal(weight, small(0).network.final_layer.linear.weight)
    assert "not in the table, as not fitted yet: b (runs/other)" in caplog.messages


def test_finetuning_starts_from_a_name(package):
    from mfm_lightning.networks import PixelDecoder

    module = RewardFinetuning(TargetSettings("tiny", "brightness", PixelDecoder()), base="tiny/flow")
    assert module.frozen["base_sha256"] == fingerprint(package / "flow.safetensors")
    assert torch.equal(module.policy.network.final_layer.linear.weight, small(1).network.final_layer.linear.weight)


def test_samples_of_a_name_are_pictures(package):
    how = ["--num-samples", "3", "--steps", "2", "--device", "cpu"]
    run(["sample", "tiny", *how])
    pictures = sorted(Path("outputs/samples/tiny").rglob("*.png"))
    assert len(pictures) == 3
    Path("first").mkdir()
    shutil.copy(package / "flow.safetensors", "first/model.safetensors")
    run(["sample", "first/model.safetensors", "--output", "samples", *how])
    assert len(sorted(Path("samples").rglob("*.png"))) == 3
    run(["sample", "first/model.safetensors", *how])
    assert len(sorted(Path("outputs/samples/first").rglob("*.png"))) == 3
    assert Image.open(pictures[0]).size == (8, 8)
    with pytest.raises(SystemExit, match="no model at tinny: did you mean tiny"):
        main(["sample", "tinny", "--output", "others"])


def test_a_published_file_has_16_bits_and_is_described(package, tmp_path):
    run_folder = tmp_path / "run"
    measure(small(2), run_folder / "test", "frechet", [{"samples": "ODE", "Fréchet": 1.23456}])
    file = save_model(small(2), run_folder / "model.safetensors", {"kind": "meta_flow_map", "step": "8000"})
    said = ["--data", "Noise of mine", "--licence", "MIT", "--decoder", "pixel", "--command", "mfm fit"]
    out = tmp_path / "published"
    for name in ("b", "a"):
        output = ["--output", str(out / f"{name}.safetensors")]
        run(["export", str(file), "--names", "own", "--dtype", "bf16", *output, *said])
    with safe_open(out / "a.safetensors", framework="pt") as opened:
        assert {opened.get_slice(k).get_dtype() for k in opened.keys()} == {"BF16"}  # noqa: SIM118
    loaded, original = load_model(out / "a.safetensors"), small(2)
    for name, tensor in original.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], tensor.bfloat16().float()), name
    header = read_metadata(out / "a.safetensors")
    assert {k: header[k] for k in ("kind", "step", "licence", "decoder")} == {
        "kind": "meta_flow_map", "step": "8000", "licence": "MIT", "decoder": "pixel",
    }  # fmt: skip
    text = (out / "README.md").read_text()
    assert text.index("## b.safetensors") < text.index("## a.safetensors")  # as they were made
    number = sum(p.numel() for p in original.state_dict().values())
    assert text.count(f"A Meta Flow Map: `DiT`, {number / 1e6:.2f} M parameters as BF16") == 2
    for line in ("- Data: Noise of mine", "- Licence: MIT", "8,000 steps", "| samples | Fréchet |", "| ODE | 1.235 |"):
        assert text.count(line) == 2
    assert text.count("- Measured on: the weights before they were rounded to bf16") == 2
    run(["export", "tiny/flow", "--names", "own", "--output", str(out / "a.safetensors")])
    text = (out / "README.md").read_text()  # its section anew, the other as it was
    assert text.count("## a.safetensors") == text.count("| ODE | 1.235 |") == 1
    assert "A base flow: `DiT`" in text


def measure(model, folder, name, rows):
    """As `mfm test` of a model writes a table."""
    with measured_on(model.network, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(rows))


def test_figures_of_other_weights_are_left_out_and_named(package, caplog):
    folder, changed = Path("run/test"), small(2)
    with torch.no_grad():
        changed.network.final_layer.linear.weight[0, 0] += 1e-6
    measure(small(2), folder, "own", [{"r": 1.0}])
    measure(changed, folder, "others", [{"r": 2.0}])
    measure(small(2), folder, "long", [{"r": 3.0}] * 41)
    measure(small(2), folder, "edited", [{"r": 4.0}])
    for name in ("edited", "unknown"):
        (folder / f"{name}.json").write_text(json.dumps([{"r": 5.0}]))
    file = save_model(small(2), "run/model.safetensors", {"kind": "meta_flow_map"})
    run(["export", str(file), "--names", "own", "--output", "out/a.safetensors"])
    assert json.loads(read_metadata("out/a.safetensors")["measured"]) == {"own": [{"r": 1.0}]}
    (said,) = [message for message in caplog.messages if "left out" in message]
    for part in ("others.json (measured on other weights", "long.json (41 rows", "edited.json (it is not noted",
                 "unknown.json (it is not noted"):  # fmt: skip
        assert part in said
    assert " own.json" not in said
    measure(changed, folder, "own", [{"r": 1.0}])  # the same table again, of other weights
    run(["export", str(file), "--names", "own", "--output", "out/b.safetensors"])
    assert "measured" not in read_metadata("out/b.safetensors")


def test_a_weight_that_fp16_cannot_hold_is_refused_before_a_file_is_written(package):
    model = small(4)
    with torch.no_grad():
        model.network.final_layer.linear.weight[0, 0] = 70000.0
    file, output = save_model(model, "large.safetensors"), ["--names", "own", "--output", "out/x.safetensors"]
    message = r"x\.safetensors is not written: weight final_layer\.linear\.weight of the DiT is 70000.*take bf16"
    with pytest.raises(SystemExit, match=message):
        main(["export", str(file), *output, "--dtype", "fp16"])
    assert not list(Path().glob("out/*"))
    run(["export", str(file), *output, "--dtype", "bf16"])
    assert load_model("out/x.safetensors").network.final_layer.linear.weight[0, 0] == 70144  # 8 bits


def test_a_readme_keeps_all_that_is_not_the_sections(package):
    def export(name):
        run(["export", "tiny", "--names", "own", "--output", f"out/{name}.safetensors"])
        return Path("out/README.md").read_bytes()

    export("a")
    section = export("a").partition(b"<!-- mfm export")[2].partition(b"<!-- end -->")[0]
    Path("out").joinpath("README.md").unlink()
    fence = b"```\n## not a section\n```\r\n"
    mine = b"# Z \xe9\n\n## Use\n" + fence + b"\n## Use\ntwice\n\n<!-- mfm export a.safetensors -->\nno end, mine\n"
    mine += b"\n<!-- mfm export b.safetensors -->\nold\n<!-- end -->  \n\n## A\nlast"
    Path("out/README.md").write_bytes(mine)
    begin = b"<!-- mfm export"
    added = mine + b"\n\n" + begin + section + b"<!-- end -->\n"
    assert export("a") == added
    assert export("a") == added  # again: in its place
    theirs = begin + section.replace(b"a.safetensors", b"b.safetensors")
    assert export("b") == added.replace(begin + b" b.safetensors -->\nold\n", theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", "own", "--output", "x.pt"], "--names own: expected --output NAME.safetensors"),
        (["--dtype", "bf16", "--output", "x.safetensors"], "--dtype is for --names own"),
        (["--licence", "MIT", "--output", "x.safetensors"], "--licence is for --names own"),
    ],
)
def test_options_of_the_other_names_are_refused(package, capsys, options, message):
    with pytest.raises(SystemExit):
        main(["export", "tiny", *options])
    assert message in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", ["mnist", "mnist/features"])
def test_the_classifiers_of_the_package_read_other_peoples_digits(name):
    """scikit-learn's scans of 8x8 pixels are no MNIST: smaller, of other people, and cut closer."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, (20, 20), mode="bilinear")
    images = torch.nn.functional.pad(images, (4, 4, 4, 4))
    classifier = load_classifier(name)
    with torch.no_grad():
        found = classifier(images).argmax(dim=1)
    assert (found == torch.tensor(digits.target)).float().mean() > 0.8
    assert json.loads(read_metadata(find_weights(name, "classifier"))["accuracy"])["low"] > 0.99
    assert find_weights(name, "classifier").parent.joinpath("README.md").read_text().count("- Accuracy: 99.") == 2


def test_what_is_shipped_is_small():
    sizes = {name: path.stat().st_size for name, path in shipped().items()}
    assert sizes["mnist/flow"] + sizes["mnist/mfm"] < 6_000_000
    assert sum(sizes.values()) < 6_500_000


def test_the_model_of_the_package_draws_digits():
    """One-step posterior draws of images with a little noise are near the images: far nearer than other draws are."""
    model = load_model("mnist")
    digits = load_model("mnist").sample_posterior(
        torch.zeros(4, 1, 28, 28), 0.0, 1, generator=torch.Generator().manual_seed(0)
    )[:, 0]
    assert digits.shape == (4, 1, 28, 28)
    assert digits.isfinite().all()
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(1))
    again = model.sample_posterior(0.8 * digits + 0.2 * noise, 0.8, 1, generator=torch.Generator().manual_seed(2))[:, 0]
    own = (again - digits).flatten(1).norm(dim=1)
    others = torch.cdist(digits.flatten(1), digits.flatten(1))[~torch.eye(4, dtype=torch.bool)].min()
    assert own.max() < 0.7 * others
