"""Features in which sets of images are compared with real ones; they show when a reward was bought by leaving them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfm_lightning.checkpoints import find_weights, fingerprint, read_metadata
from mfm_lightning.data.base import StepDataModule
from mfm_lightning.metrics.classifier import fitted_features, load_features, weights_digest
from mfm_lightning.metrics.frechet import Gaussian
from mfm_lightning.metrics.inception import Inception, find_inception_weights
from mfm_lightning.utils.atomic import whole_file
from mfm_lightning.utils.console import track
from mfm_lightning.utils.images import ImageSet


class Quality(ABC):
    """Features of images `(B, C, H, W)` in [0, 1], and those of real images."""

    def missing(self) -> list[str]:
        """Files that are not there, each with what would be right."""
        return []

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Load or train what it takes."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """`(B, F)`, on the CPU."""

    @property
    @abstractmethod
    def real(self) -> Tensor:
        """`(M, F)`, on the CPU."""

    @property
    def gaussian(self) -> Gaussian:
        """Fitted to the real ones."""
        return Gaussian.of_features(self.real)

    @property
    @abstractmethod
    def identity(self) -> dict[str, object]:
        """What the features depend on."""


class ClassifierQuality(Quality):
    """The last hidden layer of a classifier: a small one, trained here on the data's training split, or a given one;
    not the classifier that gives rewards.

    Args:
        data: a DataModule with splits and `decode`.
        seed: of the training.
        steps: of the training.
        classifier: in place of one trained here, a file that `mfm fit` wrote for `Classification`, or a name, such as
            mnist/features.
        cache: file that keeps the trained classifier and the Gaussian of real features for the next run;
            outputs/features/DATA.safetensors where None.
        reference: with a classifier, in place of the training images: the Gaussian of their features in a file that a
            run kept as its cache, or a name, such as mnist/real_features. Data then are only for suites that take
            images of them.

    Raises:
        ValueError: if the data do not fit in memory; with neither data nor classifier and reference.
    """

    def __init__(
        self,
        data: StepDataModule | None = None,
        seed: int = 0,
        steps: int = 600,
        classifier: str | None = None,
        cache: str | None = None,
        reference: str | None = None,
    ) -> None:
        if (data is None and reference is None) or (reference is not None and classifier is None):
            raise ValueError("ClassifierQuality needs data, or else a classifier and its reference of real features")
        self.data, self.seed, self.steps, self.given = data, seed, steps, classifier
        self.reference = reference
        name = type(data).__name__ + ("" if classifier is None else f"_{Path(classifier).stem}")
        self.cache = Path(cache or f"outputs/features/{name}.safetensors")

    def missing(self) -> list[str]:
        found = []
        for key, name in (("classifier", self.given), ("reference", self.reference)):
            try:
                if name is not None:
                    find_weights(name, key)
            except (FileNotFoundError, ImportError, ValueError) as error:
                found.append(f"quality.{key}: {error}")
        return found

    def prepare(self, device: torch.device) -> None:
        if self.data is not None:
            self.data.setup("test")
        if self.reference is not None:
            self.classifier = load_features(str(self.given))
            self._gaussian = self._kept()
            return
        (images, labels), given = self.splits["train"], self._images_of
        data = given.decode(images), labels, given.num_classes, self.cache
        self.classifier, self._gaussian = (
            fitted_features(*data, steps=self.steps, seed=self.seed)
            if self.given is None
            else fitted_features(*data, load_features(self.given))
        )

    def _kept(self) -> Gaussian:
        """The Gaussian of the reference's file."""
        path = find_weights(str(self.reference), "reference")
        state = load_file(path)
        if absent := {"features.mean", "features.root"} - state.keys():
            raise ValueError(f"quality.reference: {path} has no {min(absent)}, only {', '.join(sorted(state)[:4])}")
        if read_metadata(path).get("classifier") != weights_digest(self.classifier):
            raise ValueError(f"quality.reference: {path} has features of another classifier than {self.given}")
        return Gaussian(state["features.mean"].double(), state["features.root"].double())

    @property
    def splits(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The data's `(x, label)` by "train", "val" and "test"."""
        data = self._images_of
        if (found := getattr(data, "splits", None)) is None:
            raise ValueError(f"quality.data: a {type(data).__name__} with no splits in memory (raise its memory)")
        return found

    @property
    def _images_of(self) -> StepDataModule:
        if self.data is None:
            raise ValueError("quality.data is left out, but the suite takes its images")
        return self.data

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images.cpu())

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The most probable class of each image, `(B,)`."""
        return self.classes(self.features(images))

    @torch.no_grad()
    def classes(self, features: Tensor) -> Tensor:
        """The most probable class by features `(B, F)`, `(B,)`."""
        return self.classifier.head(features).argmax(dim=1)

    @property
    def real(self) -> Tensor:
        return self.features(self._images_of.decode(self.splits["train"][0]))

    @property
    def gaussian(self) -> Gaussian:
        return self._gaussian

    @property
    def identity(self) -> dict[str, object]:
        if self.given is not None:
            weights, real = fingerprint(find_weights(self.given, "classifier")), float(self._gaussian.mean.sum())
            data = self.reference or type(self.data).__name__
            return {"classifier": weights, "data": data, "real": real}
        steps = {} if self.steps == 600 else {"steps": self.steps}
        return {"classifier": type(self.data).__name__, "seed": self.seed, **steps}


class InceptionQuality(Quality):
    """Features of FID's Inception network.

    Args:
        weights: of torch-fidelity's Inception, `weights-inception-2015-12-05-6726825d.pth`.
        reference: real images: a folder of them, of one size (their features are computed once, and kept beside it as
            `FOLDER.inception_v3_F.safetensors`), or a `.safetensors` file with `features` `(M, F)`.
        num_features: 2048 for FID; 768, 192 or 64 of earlier layers for small sets.
        batch_size: images at once.
    """

    def __init__(self, weights: str, reference: str, num_features: int = 2048, batch_size: int = 64) -> None:
        if num_features not in (2048, 768, 192, 64):
            raise ValueError(f"num_features {num_features}: expected 2048, 768, 192 or 64")
        self.weights, self.reference = weights, reference
        self.num_features, self.batch_size = num_features, batch_size

    def missing(self) -> list[str]:
        found = []
        try:
            find_inception_weights(self.weights)
        except (FileNotFoundError, ImportError) as error:
            found.append(f"quality.weights: {error}")
        if not Path(self.reference).exists():
            found.append(
                f"quality.reference: no real images at {self.reference}; give a folder of images, or a .safetensors "
                f"file with 'features' (M, {self.num_features})"
            )
        return found

    def prepare(self, device: torch.device) -> None:
        self.network = Inception(find_inception_weights(self.weights), self.num_features).to(device)
        path = Path(self.reference)
        if path.is_dir():
            path = path.with_name(f"{path.name}.inception_v3_{self.num_features}.safetensors")
            if not path.is_file():
                with whole_file(path) as partial:
                    save_file({"features": self._of_folder()}, partial)
        features = load_file(path).get("features")
        if features is None or features.shape[1:] != (self.num_features,):
            raise ValueError(f"{path}: expected a tensor 'features' of shape (M, {self.num_features})")
        self._real = features.float()

    def _of_folder(self) -> Tensor:
        images = ImageSet(self.reference)
        if images.number is None or images.number < 2:
            raise FileNotFoundError(f"quality.reference: {images.number} image files in {self.reference}")
        starts = range(0, images.number, self.batch_size)
        batches = zip(
            track(starts, describe=lambda start: f"features of real images, from {start}"),
            images.batches(self.batch_size),
            strict=True,
        )
        return torch.cat([self.features(batch) for _, batch in batches])

    def features(self, images: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        found = [self.network(part.to(device))[0] for part in images.split(self.batch_size)]
        return torch.cat(found).float().cpu()

    @property
    def real(self) -> Tensor:
        return self._real

    @property
    def identity(self) -> dict[str, object]:
        return {"inception": self.num_features, "reference": [self.reference, len(self._real), float(self._real.sum())]}
