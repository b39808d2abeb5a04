"""A small classifier, trained here on the training split or given, whose features measure image quality."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import cast, overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mfm_lightning._version import __version__
from mfm_lightning.checkpoints import load_classifier
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.networks.classifier import ImageClassifier
from mfm_lightning.utils.atomic import save_tensors

log = logging.getLogger(__name__)


class SmallClassifier(nn.Module):
    """Two convolutions and a hidden layer for small images in [0, 1]; the hidden layer gives the features.

    Args:
        in_channels: of the images.
        size: their height and width, in pixels.
        num_classes: number of classes.
    """

    num_features = 32

    def __init__(self, in_channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(64 * ((size + 1) // 2) ** 2, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, num_classes)

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """`(B, num_features)` of images `(B, C, H, W)` in [0, 1], so many at once."""
        return torch.cat([self.body(part) for part in images.split(batch_size)])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def train_classifier(
    images: Tensor, labels: Tensor, num_classes: int, steps: int = 600, seed: int = 0
) -> SmallClassifier:
    """Train on `(N, C, H, W)` images in [0, 1]; the same result each time, and the global random state is kept."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.default_generator.manual_seed(seed)  # and not those of other devices, which would not be restored
        images, labels = images.detach().clone(), labels.clone()
        model = SmallClassifier(images.shape[1], images.shape[2], num_classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            pick = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[pick]), labels[pick]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@overload
def fitted_features(
    images: Tensor, labels: Tensor, num_classes: int, cache: Path, *, steps: int = 600, seed: int = 0
) -> tuple[SmallClassifier, Gaussian]: ...
@overload
def fitted_features(
    images: Tensor, labels: Tensor, num_classes: int, cache: Path, classifier: ImageClassifier
) -> tuple[ImageClassifier, Gaussian]: ...
def fitted_features(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    cache: Path,
    classifier: ImageClassifier | None = None,
    steps: int = 600,
    seed: int = 0,
) -> tuple[SmallClassifier | ImageClassifier, Gaussian]:
    """A classifier of these images and the Gaussian of their features, as `train_classifier` and `Gaussian` make them:
    from the file `cache`, where it is of these images, else made and written there; either is said.

    Args:
        classifier: in place of one that is trained here; labels and num_classes are then of no account.
        steps: of the classifier's training.
        seed: of the classifier's training.
    """
    parts = [images] if classifier is not None else [images, labels]
    given = () if classifier is None else [tensor for _, tensor in sorted(classifier.state_dict().items())]
    settings = (num_classes, *(() if (steps, seed) == (600, 0) else (steps, seed))) if classifier is None else "given"
    digest = hashlib.sha256(f"{tuple(images.shape)} {images.dtype} {settings} {__version__}".encode())
    for part in (*parts, *given):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    identity = digest.hexdigest()
    model = classifier if classifier is not None else SmallClassifier(images.shape[1], images.shape[2], num_classes)
    try:
        with safe_open(cache, framework="pt") as file:
            if (file.metadata() or {}).get("identity") == identity:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dictionary
                fitted = Gaussian(state.pop("features.mean"), state.pop("features.root"))
                if classifier is None:
                    model.load_state_dict(state)
                log.info("features of the training images: from %s", cache)
                return model.eval().requires_grad_(False), fitted
    except (OSError, SafetensorError, KeyError, RuntimeError):  # not there, or damaged: it is made anew
        pass
    if classifier is None:
        model = train_classifier(images, labels, num_classes, steps, seed)
    fitted = Gaussian.of_features(model.eval().features(images))
    tensors = {"features.mean": fitted.mean, "features.root": fitted.root}
    tensors |= model.state_dict() if classifier is None else {}
    of = {} if classifier is None else {"classifier": weights_digest(classifier)}
    save_tensors(tensors, cache, {"identity": identity, **of})
    log.info("features of the %d training images: kept in %s for the next test", len(images), cache)
    return model.requires_grad_(False), fitted


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights, by which a file of features says whose they are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_features(classifier: str) -> ImageClassifier:
    """`load_classifier`, of one that has features.

    Raises:
        FileNotFoundError, CheckpointError: as `load_classifier`.
        ValueError: if it has none.
    """
    loaded = load_classifier(classifier)
    if not hasattr(loaded, "features") or not hasattr(loaded, "head"):
        raise ValueError(
            f"classifier {classifier} is a {type(loaded).__name__}, which has no features: give the file of an "
            "ImageClassifier"
        )
    return cast(ImageClassifier, loaded)  # or one that keeps to its methods


def proportion(hits: int, number: int) -> tuple[float, float]:
    """The 95 % interval of a share, `hits` of `number` (Wilson); 0 to 1 where the number is 0."""
    from scipy.stats import binomtest

    return tuple(binomtest(hits, number).proportion_ci(0.95, "wilson")) if number else (0.0, 1.0)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Share of images classified as labelled, so many at once."""
    found = torch.cat([model(part).argmax(dim=1) for part in images.split(batch_size)])
    return (found == labels).float().mean().item()
