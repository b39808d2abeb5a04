"""Features in which benchmarks compare images: of data, or of a file that an earlier run has kept."""

import pytest
import torch
from safetensors.torch import save_file

from mfm_benchmarks.quality import ClassifierQuality
from mfm_lightning.checkpoints import save_network
from mfm_lightning.data import ImageDataModule
from mfm_lightning.networks import ImageClassifier
from tests.fashion_mnist import EXTRACT


def saved(path, seed):
    torch.manual_seed(seed)
    save_network(ImageClassifier(1, 10, width=8, stages=2), path, {"kind": "classifier"})
    return str(path)


def test_a_reference_in_place_of_images(tmp_path):
    """What a run with images kept gives the same distances to a run without them."""
    classifier, kept = saved(tmp_path / "c.safetensors", 0), tmp_path / "kept.safetensors"
    whole = ClassifierQuality(ImageDataModule(str(EXTRACT)), classifier=classifier, cache=str(kept))
    whole.prepare(torch.device("cpu"))
    alone = ClassifierQuality(classifier=classifier, reference=str(kept))
    assert alone.missing() == []
    alone.prepare(torch.device("cpu"))
    real = whole.real.double()
    torch.testing.assert_close(alone.gaussian.mean, real.mean(dim=0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone.gaussian.root @ alone.gaussian.root, torch.cov(real.T), atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"quality\.data is left out, but the suite takes its images"):
        _ = alone.splits


def test_what_does_not_fit(tmp_path):
    classifier, kept = saved(tmp_path / "c.safetensors", 0), tmp_path / "kept.safetensors"
    ClassifierQuality(ImageDataModule(str(EXTRACT)), classifier=classifier, cache=str(kept)).prepare(
        torch.device("cpu")
    )
    with pytest.raises(ValueError, match="needs data, or else a classifier and its reference"):
        ClassifierQuality(classifier=classifier)
    with pytest.raises(ValueError, match="needs data, or else a classifier and its reference"):
        ClassifierQuality(ImageDataModule(str(EXTRACT)), reference=str(kept))
    other = ClassifierQuality(classifier=saved(tmp_path / "other.safetensors", 1), reference=str(kept))
    with pytest.raises(ValueError, match=r"kept\.safetensors has features of another classifier than .*other"):
        other.prepare(torch.device("cpu"))
    save_file({"features": torch.ones(3, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=r"f\.safetensors has no features\.mean, only features"):
        ClassifierQuality(classifier=classifier, reference=str(tmp_path / "f.safetensors")).prepare(torch.device("cpu"))
    missing = ClassifierQuality(classifier="mnist/featurs", reference=str(tmp_path / "none.safetensors")).missing()
    assert "quality.classifier: no classifier at mnist/featurs: did you mean mnist/features" in missing[0]
    assert "quality.reference: no reference at" in missing[1]
