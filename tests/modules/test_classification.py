"""Training of classifiers as a user runs it: accuracy counted another way, what its file says, and refusals."""

import json
import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from mfm_lightning.callbacks import ExportModel
from mfm_lightning.checkpoints import CheckpointError, load_classifier, load_model, read_metadata
from mfm_lightning.commands.main import main, run
from mfm_lightning.data import DigitsDataModule, NoiseDataModule
from mfm_lightning.metrics.classifier import fitted_features, load_features, proportion
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.modules import Classification, Optimization
from mfm_lightning.networks import ImageClassifier
from mfm_lightning.networks.files import save_network
from tests.data.web_shards import image_shards
from tests.distributed_parts import OddDigits
from tests.processes import torchrun

ROOT = Path(__file__).parents[2]
DIGITS = ["--data", "mfm_lightning.data.DigitsDataModule", "--data.batch_size", "64"]
SMALL = ["--model.network.width", "8", "--model.optimization.warmup_steps", "10", "--trainer.logger", "false"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run of the shipped config on scikit-learn's digits, for seconds."""
    folder = tmp_path_factory.mktemp("classifier")
    where = ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    arguments = ["--config", str(ROOT / "configs/mnist/classifier.yaml"), *DIGITS, *SMALL, *where]
    run(["fit", *arguments, "--trainer.max_steps", "200", "--trainer.val_check_interval", "100", "--ema.decay", "0.9"])
    return folder, arguments


def share_right(classifier: nn.Module) -> tuple[int, int]:
    data = DigitsDataModule()
    data.setup()
    x, y = data.splits["test"]
    with torch.no_grad():
        found = [classifier(image[None] / 2 + 0.5).argmax() == label for image, label in zip(x, y, strict=True)]
    return int(sum(found)), len(y)


def test_its_file_tells_class_names_and_the_accuracy_of_the_averaged_weights(fitted, capsys):
    folder, arguments = fitted
    file = folder / "model.safetensors"
    header, classifier = read_metadata(file), load_classifier(file)
    right, number = share_right(classifier)
    said = json.loads(header["accuracy"])
    assert (said["images"], said["accuracy"]) == (number, pytest.approx(right / number))
    assert said["accuracy"] > 0.85
    assert classifier.class_names == json.loads(header["class_names"]) == list("0123456789")
    assert not any(p.requires_grad for p in classifier.parameters())
    run(["test", *arguments])
    rows = json.loads((folder / "test/accuracy.json").read_text())
    assert [row["class"] for row in rows] == [*"0123456789", "all"]
    assert rows[-1] == said
    data = DigitsDataModule()
    data.setup()
    x, y = data.splits["test"]
    with torch.no_grad():
        found = classifier(x / 2 + 0.5).argmax(dim=1)
    for k, row in enumerate(rows[:-1]):
        right = (found[y == k] == k).float().mean().item()
        assert (row["images"], row["accuracy"]) == (int((y == k).sum()), pytest.approx(right))


def test_figures_of_the_folder_are_taken_until_it_is_trained_on(fitted, tmp_path, caplog):
    folder, arguments = shutil.copytree(fitted[0], tmp_path / "run"), [*fitted[1]]
    arguments[arguments.index("--trainer.default_root_dir") + 1] = str(folder)

    def published():
        output = tmp_path / "out/a.safetensors"
        run(["export", str(folder / "model.safetensors"), "--names", "own", "--output", str(output)])
        return json.loads(read_metadata(output).get("measured", "{}"))

    run(["test", *arguments])
    assert published() == {"accuracy": json.loads((folder / "test/accuracy.json").read_text())}
    run(["fit", *arguments, "--trainer.max_steps", "202", "--ckpt_path", "last", "--ema.decay", "0.9"])
    assert not published()
    assert any("accuracy.json (measured on other weights" in message for message in caplog.messages)


def test_a_classifier_is_taken_for_nothing_else(fitted, tmp_path):
    file = fitted[0] / "model.safetensors"
    with pytest.raises(CheckpointError, match="holds a ImageClassifier"):
        load_model(file)
    with pytest.raises(ValueError, match="there is nothing to predict"):
        run(["predict", *fitted[1]])


@pytest.mark.parametrize(("hits", "number"), [(0, 10), (9962, 10000), (7, 7)])
def test_the_interval_is_wilsons(hits, number):
    z, p = 1.959963984540054, hits / number
    middle = (p + z * z / 2 / number) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(p * (1 - p) / number + z * z / 4 / number**2)
    assert proportion(hits, number) == pytest.approx((middle - half, middle + half), abs=1e-12)


def trainer(folder, steps: int) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(
        max_steps=steps,
        max_epochs=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **quiet,
    )


def module(**options) -> Classification:
    torch.manual_seed(0)
    network = options.pop("network", None) or ImageClassifier(1, 10, 4, 1)
    return Classification(network, optimization=Optimization("adamw", 1e-2, warmup_steps=1), **options)


def test_a_resumed_run_augments_as_an_uninterrupted_one(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    augmentation = v2.RandomAffine(10, (0.1, 0.1))
    whole, resumed = module(augmentation=augmentation), module(augmentation=augmentation)
    first = trainer(tmp_path, 6)
    first.callbacks.append(Stop())
    first.fit(whole, DigitsDataModule(batch_size=16))
    torch.manual_seed(123)
    trainer(tmp_path, 6).fit(
        resumed, DigitsDataModule(batch_size=16), ckpt_path=tmp_path / "three.ckpt", weights_only=True
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    plain = module()
    trainer(tmp_path, 6).fit(plain, DigitsDataModule(batch_size=16))
    assert not torch.equal(plain.network.head.weight, whole.network.head.weight)


@pytest.mark.parametrize(
    ("given", "data", "message"),
    [
        (ImageClassifier(3, 10, 4, 1), DigitsDataModule(), r"the network takes images of 3 channels"),
        (ImageClassifier(1, 7, 4, 1), DigitsDataModule(), "data of 10 classes, but the network has 7"),
        (ImageClassifier(1, 4, 4, 1), NoiseDataModule([1, 8, 8], 4), "NoiseDataModule has no decode"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path, given, data, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2).fit(module(network=given), data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OddDigits", "WebDatasetDataModule"])
def test_two_ranks_count_every_test_image_once(tmp_path, kind):
    """51 images of an array and 9 of shards: of both, each rank has as many, so that one would come twice."""
    data = ["--data", "tests.distributed_parts.OddDigits"]
    labels = OddDigits()
    labels.setup()
    labels = labels.splits["test"][1].tolist()
    if kind != "OddDigits":
        image_shards(tmp_path / "shards", [7, 1, 8, 3])
        labels = [i % 3 for i in range(7, 16)]
        data = ["--data", kind, "--data.urls", "shards/{000..003}.tar", "--data.val_urls", "shards/{001..002}.tar"]
        data += ["--data.image", "png", "--data.channels", "1", "--data.num_workers", "0", "--data.num_classes", "3"]
        data += ["--model.network.num_classes", "3"]
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--data.batch_size", "4"]
    where = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.enable_progress_bar", "false"]
    arguments = ["--config", str(ROOT / "configs/mnist/classifier.yaml"), *data, *SMALL, *where, *ranks]
    torchrun(tmp_path, 2, "fit", *arguments, "--trainer.max_steps=3", "--trainer.val_check_interval=3")
    said = json.loads(read_metadata(tmp_path / "run/model.safetensors")["accuracy"])
    assert said["images"] == len(labels)
    torchrun(tmp_path, 2, "test", *arguments)
    rows = json.loads((tmp_path / "run/test/accuracy.json").read_text())
    assert [row["images"] for row in rows] == [*(labels.count(k) for k in range(len(rows) - 1)), len(labels)]
    assert rows[-1] == said


class Untested(L.LightningDataModule):
    """Labelled images without a test set."""

    state_shape, num_classes = (1, 8, 8), 10

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.zeros(32, 1, 8, 8), torch.arange(32) % 10)
        return torch.utils.data.DataLoader(data, batch_size=8)

    def decode(self, x):
        return x


class TwoSets(Untested):
    """With two test sets."""

    def test_dataloader(self):
        return [self.train_dataloader(), self.train_dataloader()]


@pytest.mark.parametrize(("data", "images"), [(Untested(), None), (TwoSets(), 64)])
def test_the_file_says_the_accuracy_where_there_are_test_images(tmp_path, caplog, data, images):
    made = trainer(tmp_path, 2)
    made.callbacks.append(ExportModel())
    made.fit(module(), data)
    header = read_metadata(tmp_path / "model.safetensors")
    assert header["step"] == "2"
    assert (json.loads(header["accuracy"])["images"] if "accuracy" in header else None) == images
    assert any("no test images" in message for message in caplog.messages) == (images is None)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 6 must be a multiple of 4"):
        ImageClassifier(1, 10, 6)
    with pytest.raises(ValueError, match="label_smoothing"):
        module(label_smoothing=1.0)
    with pytest.raises(TypeError, match="no num_classes"):
        Classification(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        ImageClassifier(1, 10)(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 33), (1, 8)])
def test_the_network_takes_any_size_and_features_lead_to_its_logits(channels, size):
    torch.manual_seed(0)
    network, images = ImageClassifier(channels, 5, 8, 2), torch.rand(7, channels, size, size)
    features = network.features(images, batch_size=3)
    assert features.shape == (7, network.num_features) == (7, 16)
    torch.testing.assert_close(network.head(features), network(images))
    images.requires_grad_()
    assert torch.autograd.grad(network(images).sum(), images)[0].isfinite().all()


def test_features_of_a_given_classifier_are_kept(tmp_path, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    images, labels, cache = torch.rand(40, 1, 8, 8), torch.zeros(40, dtype=torch.long), tmp_path / "f.safetensors"
    network = ImageClassifier(1, 3, 4, 1)
    expected = Gaussian.of_features(network.features(images))
    for said in ("kept in", "from"):
        model, fitted = fitted_features(images, labels, 3, cache, network)
        assert model is network
        torch.testing.assert_close(fitted.root, expected.root)
        assert said in caplog.messages[-1]
    with torch.no_grad():
        network.body[0].weight.mul_(2)
    fitted_features(images, labels, 3, cache, network)
    assert "kept in" in caplog.messages[-1]  # of other weights
    own, _ = fitted_features(images, labels, 3, cache, steps=2, seed=4)
    again, _ = fitted_features(images, labels, 3, cache, steps=2, seed=4)
    assert "from" in caplog.messages[-1]
    assert torch.equal(own.head.weight, again.head.weight)
    other, _ = fitted_features(images, labels, 3, cache, steps=2, seed=5)
    assert not torch.equal(own.head.weight, other.head.weight)


class NoFeatures(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.config, self.num_classes = {"num_classes": num_classes}, num_classes
        self.linear = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_a_users_own_class_is_loaded_and_asked_for_features(tmp_path):
    file = save_network(NoFeatures(), tmp_path / "own.safetensors", {"kind": "classifier"})
    assert load_classifier(file)(torch.rand(2, 1, 2, 2)).shape == (2, 3)
    with pytest.raises(ValueError, match="a NoFeatures, which has no features"):
        load_features(str(file))


def test_evaluation_takes_its_file(fitted, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(ROOT)
    options = ["num_samples=32", "ode_steps=2", f"classifier={fitted[0] / 'model.safetensors'}"]
    evaluation = [f"--model.evaluation.{option}" for option in options]
    where = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.enable_progress_bar", "false"]
    run(["fit", "--config", "digits/flow", *where, *steps, *evaluation])
    run(["test", "--config", "digits/flow", *where, *evaluation])
    right, number = share_right(load_classifier(fitted[0] / "model.safetensors"))
    rows = json.loads((tmp_path / "test/frechet.json").read_text())
    assert rows[0]["as labelled"] == pytest.approx(right / number)
    run(["test", "--config", "digits/flow", *where, *evaluation])
    assert any("features of the training images: from" in message for message in caplog.messages)
    published = tmp_path / "out/a.safetensors"
    run(["export", str(tmp_path / "model.safetensors"), "--names", "own", "--output", str(published)])
    assert json.loads(read_metadata(published)["measured"]) == {
        "frechet": json.loads((tmp_path / "test/frechet.json").read_text())
    }
    nowhere = ["--model.evaluation.classifier", "nowhere.safetensors"]
    with pytest.raises(SystemExit, match=r"no classifier at nowhere\.safetensors"):
        main(["test", "--config", "digits/flow", *where, *nowhere])
