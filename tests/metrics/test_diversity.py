"""Diversity of a prompt's images: LPIPS against its formula in float64, features by hand, and which is taken."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
import torchmetrics
import torchvision

from mfm_lightning.metrics.diversity import find_diversity, network_file
from mfm_rewards.efficientnet import EfficientNetLite0
from mfm_rewards.testing import smooth_images

SLICES = ((0, 2), (2, 5), (5, 8), (8, 10), (10, 11), (11, 12), (12, 13))  # of SqueezeNet, after which LPIPS looks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty place for torch's downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path


def pairs(images, distance):
    values = [float(distance(a[None], b[None])) for a, b in itertools.combinations(images, 2)]
    return sum(values) / len(values)


def test_lpips_is_its_formula_over_all_pairs(hub):
    """Unit features of each layer, squared differences by the trained weights of its channels, mean over places."""
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None)
    file = network_file("lpips_squeeze")
    file.parent.mkdir()
    torch.save(network.state_dict(), file)
    layers, network = network.features.double(), network.eval()
    linear = torch.load(Path(torchmetrics.__file__).parent / "functional/image/lpips_models/squeeze.pth", "cpu")

    def features(x):
        mean = torch.tensor([-0.030, -0.088, -0.188]).double().reshape(3, 1, 1)
        deviation = torch.tensor([0.458, 0.448, 0.450]).double().reshape(3, 1, 1)
        x = (2 * x.double() - 1 - mean) / deviation
        for begin, end in SLICES:
            x = layers[begin:end](x)
            yield x / x.norm(dim=1, keepdim=True)

    def distance(a, b):
        return sum(
            ((f - g).square() * linear[f"lin{i}.model.1.weight"].double()).sum(dim=1).mean()
            for i, (f, g) in enumerate(zip(features(a), features(b), strict=True))
        )

    images = smooth_images(4, size=80)
    found = find_diversity("lpips_squeeze")
    with torch.no_grad():
        expected = pairs(images, distance)
    assert float(found(images)) == pytest.approx(expected, rel=1e-4)
    assert found.about == "LPIPS (squeezenet1_1)"
    assert find_diversity().kind == "lpips_squeeze"  # the first whose weights are here
    assert float(found(images[:1].repeat(3, 1, 1, 1))) == pytest.approx(0, abs=1e-6)
    assert float(found(images[:2, :, :16, :16])) > 0  # enlarged
    with pytest.raises(
        FileNotFoundError, match=r"lpips_alex: no weights of alexnet at .*alexnet.*; torchvision fetches"
    ):
        find_diversity("lpips_alex")
    with pytest.raises(ValueError, match=r"diversity of 1 image"):
        found(images[:1])


def test_features_of_efficientnet_and_pixels():
    """From the classifier's own last layer: its input is what it multiplies."""
    images = smooth_images(3)
    network, seen = EfficientNetLite0(), []
    network.network.classifier.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    network(images)
    unit = (seen[0] / seen[0].norm(dim=1, keepdim=True)).double()
    expected = pairs(unit, lambda a, b: (a - b).norm())
    assert float(find_diversity("efficientnet_lite0")(images)) == pytest.approx(expected, rel=1e-5)
    grey = images.mean(dim=1, keepdim=True)
    expected = pairs(grey.double(), lambda a, b: (a - b).square().mean().sqrt())
    assert float(find_diversity("pixels")(grey)) == pytest.approx(expected, rel=1e-5)


def test_which_distance_is_taken_is_said(hub, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert find_diversity().kind == "efficientnet_lite0"  # of the LPIPS none has weights here
    assert "diversity: not by lpips_alex: no weights of alexnet" in caplog.text
    assert "diversity of images: Euclidean distance of unit features of EfficientNet-Lite0" in caplog.text

    def no_package():
        raise ImportError("efficientnet_lite0: its weights are missing")

    monkeypatch.setattr("mfm_rewards.efficientnet._packaged", no_package)
    assert find_diversity().kind == "pixels"
    assert "not by efficientnet_lite0: its weights are missing" in caplog.text
    with pytest.raises(ValueError, match="unknown diversity 'lpips': expected one of auto, lpips_alex"):
        find_diversity("lpips")
