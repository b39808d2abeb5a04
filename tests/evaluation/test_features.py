"""What an evaluation's features need is asked for before any work."""

from types import SimpleNamespace

import pytest
import torch

from mfm_lightning.checkpoints import save_network
from mfm_lightning.evaluation.features import check_features, features_of
from mfm_lightning.networks import ImageClassifier


def module(classes=3, channels=1, testing=True):
    x, y = torch.rand(40, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(40) % 3
    data = SimpleNamespace(splits={"train": (x, y)}, num_classes=classes, decode=lambda x: (x + 1) / 2)
    trainer = SimpleNamespace(datamodule=data, testing=testing)
    return SimpleNamespace(trainer=trainer, state_shape=(channels, 8, 8))


def classifier(folder):
    torch.manual_seed(0)
    save_network(ImageClassifier(1, 3, width=8, stages=1), folder / "c.safetensors", {"kind": "classifier"})
    return str(folder / "c.safetensors")


def test_what_is_missing_or_does_not_fit_is_refused(tmp_path):
    given = classifier(tmp_path)
    check_features(module(), given)
    check_features(module(), None)
    check_features(module(classes=0, testing=False), None)  # a fit only draws
    with pytest.raises(FileNotFoundError, match="no classifier at mnist/featurs: did you mean mnist/features"):
        check_features(module(), "mnist/featurs")
    with pytest.raises(ValueError, match=r"c\.safetensors does not take images of shape \(3, 8, 8\)"):
        check_features(module(channels=3), given)
    with pytest.raises(ValueError, match="the data, which have no classes: give one, as evaluation"):
        check_features(module(classes=0), None)


def test_features_are_those_of_the_given_classifier(tmp_path):
    data = module().trainer.datamodule
    found, fitted = features_of(data, classifier(tmp_path), tmp_path / "kept.safetensors")
    x = found.features((data.splits["train"][0] + 1) / 2).double()
    torch.testing.assert_close(fitted.mean, x.mean(dim=0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fitted.root @ fitted.root, torch.cov(x.T), atol=1e-6, rtol=1e-4)
