"""The features that benchmarks compare images in: those of a classifier that is trained, kept, or given."""

import pytest
import torch

from mfm_benchmarks.quality import ClassifierQuality
from mfm_lightning.checkpoints import fingerprint
from mfm_lightning.data import DigitsDataModule
from mfm_lightning.metrics.classifier import train_classifier
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.networks import ImageClassifier
from mfm_lightning.networks.files import save_network

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_trained_one_is_kept_for_the_next_run(tmp_path, caplog):
    caplog.set_level("INFO")
    first, second = (ClassifierQuality(DigitsDataModule(), seed=3, steps=4) for _ in range(2))
    first.prepare(CPU)
    second.prepare(CPU)
    assert [message.split(":")[1].split()[0] for message in caplog.messages] == ["kept", "from"]
    assert (tmp_path / "outputs/features/DigitsDataModule.safetensors").is_file()
    data = DigitsDataModule()
    data.setup()
    images, labels = data.splits["train"]
    images = data.decode(images)
    classifier = train_classifier(images, labels, 10, 4, 3)
    for quality in (first, second):
        assert torch.equal(quality.real, classifier.features(images))
        torch.testing.assert_close(quality.gaussian.mean, Gaussian.of_features(quality.real).mean)
        assert torch.equal(quality.classify(images[:50]), classifier(images[:50]).argmax(dim=1))
    assert first.identity == second.identity == {"classifier": "DigitsDataModule", "seed": 3, "steps": 4}


def test_a_given_one_is_taken(tmp_path):
    torch.manual_seed(0)
    network = ImageClassifier(1, 10, 4, 1)
    file = save_network(network, tmp_path / "mine.safetensors", {"kind": "classifier"})
    quality = ClassifierQuality(DigitsDataModule(), classifier=str(file))
    assert not quality.missing()
    quality.prepare(CPU)
    images = torch.rand(20, 1, 8, 8)
    assert torch.equal(quality.features(images), network.features(images))
    assert torch.equal(quality.classify(images), network(images).argmax(dim=1))
    torch.testing.assert_close(quality.gaussian.root, Gaussian.of_features(quality.real).root)
    assert quality.identity["classifier"] == fingerprint(file)
    (line,) = ClassifierQuality(DigitsDataModule(), classifier="mnist/featurs").missing()
    assert line == "quality.classifier: no classifier at mnist/featurs: did you mean mnist/features?"
